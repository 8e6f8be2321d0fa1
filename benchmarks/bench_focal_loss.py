"""Sigmoid focal loss, sum: forward, and forward with backward, beside torchvision (eager, compiled), fvcore
(scripted, as detectron2 takes it), mmcv and apex.

Logits look like those of a detector in training: mostly confident background, one row in 500 positive. torchvision
takes one-hot targets, which are made before the clock starts.
"""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

import retinanet_ext

# rows, classes: the 60,000 x 80 of a 480 x 640 image; one COCO image at 800 x 1333; OpenImages classes at 800 x 800;
# 16 and 64 of these COCO images, for a GPU.
SIZES = {"60000x80": (60_000, 80), "201600x80": (201_600, 80), "120087x264": (120_087, 264)}
BATCHES = {"3225600x80": (3_225_600, 80), "12902400x80": (12_902_400, 80)}
SMOKE_SIZE = (600, 80)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DIRECTIONS = ("forward", "forward+backward")
SPECIAL_OPS = 2.0  # of the CUDA kernel at gamma = 2, an element; loss and gradient share them


def make_case(rows, classes, dtype, device):
    random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    logits = (torch.randn(rows, classes, **random) - 4).to(dtype)
    targets = torch.full((rows,), classes, device=device)  # mmcv's background
    positive = torch.arange(0, rows, 500, device=device)
    targets[positive] = torch.randint(0, classes, (len(positive),), **random)
    return logits, targets


def one_hot(targets, classes, dtype):
    return torch.nn.functional.one_hot(targets, classes + 1)[:, :classes].to(dtype)


def make_call(loss, logits, targets, backward):
    """A call that computes the loss, and with `backward` the gradient, which it returns."""
    if not backward:

        def forward():
            with torch.no_grad():
                return loss(logits, targets)

        return forward

    leaf = logits.detach().clone().requires_grad_()

    def forward_backward():
        leaf.grad = None
        loss(leaf, targets).backward()
        return leaf.grad

    return forward_backward


def peers(logits, targets, dense, backward, timed):
    if importlib.util.find_spec("torchvision") is None:
        yield "torchvision", "torchvision is not installed"
    else:
        from torchvision.ops import sigmoid_focal_loss

        eager = functools.partial(sigmoid_focal_loss, reduction="sum")
        yield "torchvision", make_call(eager, logits, dense, backward)
        if timed:
            compiled = torch.compile(eager)
            yield "torchvision compiled", make_call(compiled, logits, dense, backward)
    if importlib.util.find_spec("fvcore") is None:
        yield "fvcore", "fvcore is not installed"
    else:
        from fvcore.nn import sigmoid_focal_loss_jit

        yield "fvcore", make_call(lambda x, t: sigmoid_focal_loss_jit(x, t, 0.25, 2.0, "sum"), logits, dense, backward)
    if importlib.util.find_spec("mmcv") is None:
        yield "mmcv", "mmcv is not installed"
    elif not logits.is_cuda:
        yield "mmcv", "mmcv's focal loss runs on CUDA only"
    else:
        from mmcv.ops import sigmoid_focal_loss as mmcv_focal_loss

        yield (
            "mmcv",
            make_call(lambda x, t: mmcv_focal_loss(x, t, 2.0, 0.25, None, "sum"), logits, targets, backward),
        )
    if importlib.util.find_spec("apex") is None:
        yield "apex", "apex is not installed"
    elif not logits.is_cuda:
        yield "apex", "apex's focal loss runs on CUDA only"
    else:
        from apex.contrib.focal_loss import focal_loss as apex_focal_loss

        foreground = torch.ones(1, device=logits.device)
        own = torch.where(targets == logits.shape[1], -1, targets)
        yield (
            "apex",
            make_call(
                lambda x, t: apex_focal_loss(x, t, foreground, x.shape[1], 0.25, 2.0, 0.0),
                logits,
                own,
                backward,
            ),
        )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("targets_form", ["indices", "one-hot"])
def test_sigmoid_focal_loss(compare, device, timed, targets_form, size, dtype, direction):
    run_case(compare, device, timed, targets_form, size, dtype, direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", BATCHES)
def test_batches(compare, device, timed, size, direction):
    """In bfloat16: the peers' sum over 64 images, in the logits' dtype, is beyond float16."""
    if timed and device.type == "cpu":
        pytest.skip("16 images and more take the CPU peers seconds a call; one image says as much")
    run_case(compare, device, timed, "indices", size, torch.bfloat16, direction)


def run_case(compare, device, timed, targets_form, size, dtype, direction):
    rows, classes = {**SIZES, **BATCHES}[size] if timed else SMOKE_SIZE
    backward = direction == "forward+backward"
    logits, targets = make_case(rows, classes, dtype, device)
    dense = one_hot(targets, classes, dtype)
    ours = functools.partial(retinanet_ext.sigmoid_focal_loss, reduction="sum")
    own_targets = targets if targets_form == "indices" else dense

    def agree(a, b):
        # The peers compute in the dtype of the logits, and lose digits at large logits: this guards against comparing
        # different things, the tests are about accuracy.
        scale = b.abs().max().item()
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * scale)

    width = logits.element_size()
    per_element = 2 * width if backward else width  # read once, and with backward the gradient written
    if targets_form == "one-hot":
        per_element += width
    name = next(name for name, value in DTYPES.items() if value == dtype)
    compare(
        f"sigmoid_focal_loss {targets_form} {size if timed else 'smoke'} {name} {direction}",
        make_call(ours, logits, own_targets, backward),
        dict(peers(logits, targets, dense, backward, timed)),
        agree,
        elements=logits.numel(),
        bytes=logits.numel() * per_element + (targets.numel() * 8 if targets_form == "indices" else 0),
        special_ops=SPECIAL_OPS * logits.numel() if targets_form == "indices" else 0.0,
        dtype=name,
    )
