"""Encoding and decoding boxes, beside torchvision's BoxCoder."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import retinanet_ext

COUNTS = [100, 5000, 201_600]  # foreground anchors; the best candidates of an image; all anchors of 800 x 1344
SMOKE = 50
DTYPES = {"float32": torch.float32, "float64": torch.float64}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FUNCTIONS = {"encode": retinanet_ext.encode_boxes, "decode": retinanet_ext.decode_boxes}


def make_case(task, count, dtype, device):
    generator = torch.Generator().manual_seed(0)
    corner, size = (torch.rand(count, 2, generator=generator) * scale for scale in (1000, 200))
    anchors = torch.cat((corner, corner + size + 8), dim=1)
    if task == "encode":
        values = anchors + torch.randn(count, 4, generator=generator)
    else:
        values = torch.randn(count, 4, generator=generator) * 0.3
    return values.to(device, dtype), anchors.to(device, dtype)


def make_call(function, arguments, backward):
    if not backward:
        return lambda: function(*arguments)
    values = arguments[0].clone().requires_grad_()
    return lambda: torch.autograd.grad(function(values, arguments[1]).sum(), values)[0]


def peers(task, arguments, backward, timed):
    if importlib.util.find_spec("torchvision") is None:
        yield "torchvision", "torchvision is not installed"
        return
    from torchvision.models.detection._utils import BoxCoder

    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    function = coder.encode_single if task == "encode" else coder.decode_single
    yield "torchvision", make_call(function, arguments, backward)
    # Compiling takes the CPU many seconds: there for many boxes alone.
    if timed and (arguments[0].is_cuda or (len(arguments[0]) == COUNTS[-1] and arguments[0].element_size() > 2)):
        yield "torchvision compiled", make_call(torch.compile(function, dynamic=False), arguments, backward)
    else:
        yield "torchvision compiled", "compiling takes the CPU many seconds: done for all anchors of an image alone"


DIRECTIONS = ("forward", "forward+backward")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("task", FUNCTIONS)
def test_box_coder(compare, device, timed, task, count, dtype, direction):
    run_case(compare, device, timed, task, count, dtype, direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("task", FUNCTIONS)
def test_box_coder_of_halves(compare, device, timed, task, dtype, direction):
    run_case(compare, device, timed, task, COUNTS[-1], dtype, direction)


def run_case(compare, device, timed, task, count, dtype, direction):
    count = count if timed else SMOKE
    backward = direction == "forward+backward"
    arguments = make_case(task, count, dtype, device)
    name = next(name for name, value in {**DTYPES, **HALVES}.items() if value == dtype)
    half = dtype in HALVES.values()

    def agree(ours, theirs):
        """exp and log differ by a unit in the last place, of numbers up to the largest; torchvision rounds halves on
        the way, of coordinates up to 1,200."""
        if half and not backward:
            atol = {"encode": 0.02 if dtype == torch.float16 else 0.2, "decode": 1200 * torch.finfo(dtype).eps}[task]
            difference = (ours.float() - theirs.float()).abs()
            assert difference.mean() < atol, f"{difference.mean():.2g} apart on average"
            return
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=8 * eps * theirs.abs().max().item())

    row = 4 * arguments[0].element_size()
    compare(
        f"{task}_boxes {count} {name} {direction}",
        make_call(FUNCTIONS[task], arguments, backward),
        dict(peers(task, arguments, backward, timed)),
        agree,
        elements=count,
        bytes=count * row * (6 if backward else 3),
    )
