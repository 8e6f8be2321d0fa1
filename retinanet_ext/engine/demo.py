"""The demonstration: a generated data set, a RetinaNet from random weights, its evaluation, and pictures."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from retinanet_ext.data import generate_shapes, open_dataset
from retinanet_ext.data.extras import require_all

from .checkpoint import load_model
from .config import TrainConfig, resolve_amp, resolve_device
from .evaluate import evaluate, format_best
from .run_folder import RunFolder
from .sheets import spread, write_annotations, write_detections
from .train import EXTRAS, Training

# Below this AP50 on the held-out images something is wrong with the installation, not with the luck of a run.
EXPECTED_AP50 = 0.8
IMAGE_SIZE = 96


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration reached and wrote."""

    run_dir: Path
    ap: float
    ap50: float
    seconds: float
    pictures: tuple[Path, ...]


def demo_config(data: Path, *, epochs: int, device: str, seed: int) -> TrainConfig:
    """The recipe: ResNet-18, square anchors from 16 px for images of 96 px, AdamW with warm-up and cosine.

    The learning rate is low for AdamW: from random weights the subnets, which start small, get through their
    first steps sooner with it.
    """
    return TrainConfig(
        data=str(data),
        arch="resnet18",
        min_size=(IMAGE_SIZE,),
        max_size=IMAGE_SIZE,
        anchor_sizes=(16, 32, 64, 128, 256),
        aspect_ratios=(1.0,),
        epochs=epochs,
        batch_size=4,
        lr=2e-4,
        warmup_steps=30,
        hflip=0.5,
        vflip=0.5,
        seed=seed,
        device=device,
    )


def run_demo(
    run_dir: str | Path,
    *,
    epochs: int = 3,
    train_images: int = 640,
    val_images: int = 100,
    device: str = "auto",
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Generate, train, evaluate, draw. Everything goes under `run_dir`; see `RunFolder` for the training's
    part."""
    require_all(*EXTRAS)
    start = time.perf_counter()
    run_dir = Path(run_dir)
    run = RunFolder(run_dir)
    run.check_free()
    data = run_dir / "data"
    # Before anything is written: they refuse wrong arguments.
    config = demo_config(data, epochs=epochs, device=device, seed=seed)
    torch_device = resolve_device(device)
    generate_shapes(data, train_images=train_images, val_images=val_images, image_size=IMAGE_SIZE, seed=seed)
    say(f"generated {train_images} training and {val_images} validation images in {data}")
    Training(config, run_dir, say=say).fit()
    amp = resolve_amp(None, torch_device)
    model, class_names, checkpoint = load_model(run.best, torch_device)
    model.to(memory_format=torch.channels_last)
    val_set = open_dataset(data, "val", class_names=class_names)
    result = evaluate(model, val_set, device=torch_device, amp=amp)
    run.write_evaluation(result, val_set)
    predictions, labels = run_dir / "predictions.jpg", run_dir / "labels.jpg"
    shown = spread(len(val_set), 12)
    write_detections(val_set, shown, result.detections, predictions, score=0.5)
    write_annotations(val_set, shown, labels)
    say(format_best(result, checkpoint["epoch"], epochs))
    return DemoResult(
        run_dir,
        result.metrics["AP"],
        result.metrics["AP50"],
        time.perf_counter() - start,
        (predictions, labels, run_dir / "PR_curve.png", run_dir / "results.png"),
    )
