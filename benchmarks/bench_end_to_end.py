"""A whole training step and a whole inference of a ResNet-50 RetinaNet, beside torchvision's.

All sides start from the same weights. A step is resize, forward, losses, backward and the update by SGD, by each side
in turn. Ours is channels_last, as this library's commands have it; torchvision's is timed so, and contiguous, as it is
built. In inference the class scores are spread as a trained detector's on a busy image: about one in 60 logits passes
the threshold. "model" is this library's RetinaNet, in inference with BatchNorm folded, as `retinanet-ext predict` has
it; "accelerate" is torchvision's own after `retinanet_ext.accelerate`.
"""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from agreement import same_detections
from torch import nn

import retinanet_ext
from retinanet_ext.models import fold_batch_norm, retinanet_resnet50_fpn

K, BOXES = 91, 8
# Image as the user has it (the network sees it resized to 800 pixels), batch.
CASES = {"480x640 B=1": ((480, 640), 1), "480x640 B=8": ((480, 640), 8)}
SMOKE, SMOKE_SIZE = ((48, 64), 1), 64
SMOKE_INFERENCE = ((48, 64), 4)  # BatchNorm needs more than the four cells that one image has in C5
PRECISIONS = {"float32": torch.float32, "bfloat16 autocast": torch.bfloat16, "float16 autocast": torch.float16}
MISSING = importlib.util.find_spec("torchvision") is None

pytestmark = pytest.mark.skipif(MISSING, reason="torchvision, the peer, is not installed")


@pytest.fixture(params=PRECISIONS)
def precision(request, device):
    if device.type == "cpu" and PRECISIONS[request.param] == torch.float16:
        pytest.skip("float16 is trained on GPUs")
    return request.param


@pytest.fixture(params=CASES)
def case(request, device):
    if device.type == "cpu" and CASES[request.param][1] > 1:
        pytest.skip("on a CPU a step takes minutes")
    return request.param


def make_models(side, device, timed):
    """Ours and torchvision's, channels_last with the same weights."""
    from torchvision.models.detection import retinanet_resnet50_fpn as torchvision_retinanet

    torch.manual_seed(0)
    sizes = {} if timed else {"min_size": SMOKE_SIZE, "max_size": SMOKE_SIZE}
    theirs = torchvision_retinanet(weights=None, weights_backbone=None, **sizes)
    if side == "accelerate":
        ours = retinanet_ext.accelerate(copy.deepcopy(theirs))
    else:
        ours = retinanet_resnet50_fpn(num_classes=K, **sizes)
        ours.load_state_dict(theirs.state_dict())
    return [model.to(device, memory_format=torch.channels_last) for model in (ours, theirs)]


def contiguous(model):
    return copy.deepcopy(model).to(memory_format=torch.contiguous_format)


def compiled(model):
    """A copy whose backbone, pyramid and subnets are compiled; torch.compile breaks its graph at the resizing, the
    matching and the post-processing, whose shapes depend on the data."""
    model = copy.deepcopy(model)
    model.backbone.compile()
    model.head.compile()
    return model


def not_compiled(side, device, timed, quick):
    """Why torchvision's model is not timed compiled too, or None."""
    if not timed:
        return "a smoke run compiles nothing"
    if side == "accelerate":
        return "as beside the model: it is the same network"
    if device.type == "cpu" and quick:
        return "on the CPU --quick compiles no whole network"
    return None


def make_inputs(case, device):
    (height, width), batch = case
    generator = torch.Generator(device).manual_seed(0)
    limit = torch.tensor([width, height], device=device)

    def rand(*shape):
        return torch.rand(shape, generator=generator, device=device)

    images = [rand(3, height, width) for _ in range(batch)]
    corners = [rand(BOXES, 2) * limit * 0.7 for _ in images]
    targets = [
        {
            "boxes": torch.cat([corner, corner + (0.05 + 0.25 * rand(BOXES, 2)) * limit], dim=1),
            "labels": torch.randint(0, K, (BOXES,), generator=generator, device=device),
        }
        for corner in corners
    ]
    return images, targets


def training_step(model, images, targets, precision):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    first = None  # the losses by which sides are compared, however many steps each has taken

    def step():
        nonlocal first
        optimizer.zero_grad()
        with torch.autocast(images[0].device.type, dtype=precision, enabled=precision != torch.float32):
            losses = model(images, targets)
            total = losses["classification"] + losses["bbox_regression"]
        total.backward()
        optimizer.step()
        if first is None:
            first = torch.stack([losses["classification"], losses["bbox_regression"]]).detach()
        return first

    return step


def imitate_training(model, images):
    """BatchNorm with statistics of its inputs, and class scores spread as a trained detector's, in inference."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    logits = []
    convolution = model.head.classification_head.cls_logits
    hook = convolution.register_forward_hook(lambda _module, _inputs, output: logits.append(output))
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0  # what the next pass sees
        inputs = model.transform(images)[0].tensors
        model.backbone.train()(inputs)
        model.head(list(model.backbone.eval()(inputs).values()))
        spread = torch.cat([level.flatten() for level in logits]).float()
        convolution.weight.mul_(1.2 / (spread - convolution.bias.mean()).std())
        convolution.bias.fill_(-5.5)
    hook.remove()
    for norm in norms:
        norm.momentum = 0.1


def facts(model, images):
    """What the step reads at the least: the images and the weights."""
    tensors = [*images, *model.parameters()]
    return {
        "elements": sum(image.numel() for image in images),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "images": len(images),
    }


@pytest.mark.parametrize("side", ["model", "accelerate"])
def test_training_step(compare, device, timed, quick, case, side, precision):
    ours, theirs = make_models(side, device, timed)
    images, targets = make_inputs(CASES[case] if timed else SMOKE, device)
    others = {"torchvision": contiguous(theirs), "torchvision, channels_last": theirs}
    reason = not_compiled(side, device, timed, quick)
    if reason is None:
        others["torchvision, channels_last, compiled"] = compiled(theirs)
    peers = {name: training_step(model, images, targets, PRECISIONS[precision]) for name, model in others.items()}
    if reason is not None:
        peers["torchvision, channels_last, compiled"] = reason
    compare(
        f"training step {side} {case if timed else 'smoke'} {precision}",
        training_step(ours, images, targets, PRECISIONS[precision]),
        peers,
        lambda mine, its: torch.testing.assert_close(mine, its, rtol=1e-4 if precision == "float32" else 0.02, atol=0),
        dtype=precision,
        **facts(theirs, images),
    )


@pytest.mark.parametrize("side", ["model", "accelerate"])
def test_inference(compare, device, timed, quick, case, side, precision):
    ours, theirs = make_models(side, device, timed)
    images, _ = make_inputs(CASES[case] if timed else SMOKE_INFERENCE, device)
    imitate_training(theirs, images)
    ours.load_state_dict(theirs.state_dict())
    if side == "model":
        fold_batch_norm(ours.eval())
    dtype = PRECISIONS[precision]

    def detections(model, dtype=dtype):
        model.eval()

        def call():
            with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                return model(images)

        return call

    def best_scores(found):
        return torch.cat([image["scores"][:20].float() for image in found])

    def agree(mine, its):
        """In float32 by every detection. In halves by how far the best scores are from those of float32, on average:
        where some are nearly equal, rounding decides which suppresses the other."""
        if dtype == torch.float32:
            for one, other in zip(mine, its, strict=True):
                same_detections(one, other, rtol=1e-3, pixels=0.05, open_share=0.02)
        else:
            error, its_error = ((best_scores(found) - best_scores(exact)).abs().mean().item() for found in (mine, its))
            assert error < 2 * its_error + 0.005, f"its error is {error:.2g} beside {its_error:.2g}"

    others = {"torchvision": contiguous(theirs), "torchvision, channels_last": theirs}
    reason = not_compiled(side, device, timed, quick)
    if reason is None:
        others["torchvision, channels_last, compiled"] = compiled(theirs)
    peers = {name: detections(model) for name, model in others.items()}
    if reason is not None:
        peers["torchvision, channels_last, compiled"] = reason
    if dtype != torch.float32:  # that they are the same models shows in float32 alone
        exact = detections(theirs, torch.float32)()
        for one, other in zip(detections(ours, torch.float32)(), exact, strict=True):
            same_detections(one, other, rtol=1e-3, pixels=0.05, open_share=0.02)
    compare(
        f"inference {side} {case if timed else 'smoke'} {precision}",
        detections(ours),
        peers,
        agree,
        dtype=precision,
        **facts(theirs, images),
    )
