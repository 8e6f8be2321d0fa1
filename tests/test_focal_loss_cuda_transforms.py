"""sigmoid_focal_loss on CUDA: streams, devices, opcheck, torch.compile, torch.func and autocast."""

import importlib.util
import os
import shutil

import pytest
import torch

from retinanet_ext import reference, sigmoid_focal_loss

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
OPS = torch.ops.retinanet_ext


def sample(rows, classes, dtype=torch.float32, device=DEVICE):
    """Logits, and a row in five that is no background: a class, beyond the classes, ignored."""
    targets = torch.full((rows,), -1)
    targets[::5] = torch.randint(-2, classes + 2, (len(targets[::5]),))
    return torch.randn(rows, classes).to(device, dtype), targets.to(device)


def loss_and_gradient(function, inputs, targets, **options):
    inputs = inputs.detach().requires_grad_()
    loss = function(inputs, targets, **options)
    (gradient,) = torch.autograd.grad(loss, inputs, torch.ones_like(loss))
    return loss.detach(), gradient


def test_the_current_stream_is_used():
    """On the default stream the operator would overtake the copy, which waits behind a long kernel."""
    logits, targets = sample(5000, 80)
    expected = loss_and_gradient(sigmoid_focal_loss, logits, targets, reduction="sum")
    inputs = torch.zeros_like(logits)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles, about a tenth of a second
        inputs.copy_(logits)
        results = loss_and_gradient(sigmoid_focal_loss, inputs, targets, reduction="sum")
    stream.synchronize()
    for result, truth in zip(results, expected, strict=True):
        assert torch.equal(result, truth)


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    inputs, targets = sample(300, 13, device="cpu")
    expected = loss_and_gradient(sigmoid_focal_loss, inputs.to("cuda:0"), targets.to("cuda:0"), reduction="sum")
    results = loss_and_gradient(sigmoid_focal_loss, inputs.to("cuda:1"), targets.to("cuda:1"), reduction="sum")
    assert torch.cuda.current_device() == 0
    for result, truth in zip(results, expected, strict=True):
        assert result.device == torch.device("cuda:1")
        assert torch.equal(result.cpu(), truth.cpu())
    with pytest.raises(ValueError, match="must be on the device of inputs, cuda:1"):
        sigmoid_focal_loss(inputs.to("cuda:1"), targets.to("cuda:0"))


def test_tensors_of_two_devices_are_refused():
    inputs, targets = torch.randn(4, 3, device=DEVICE), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="targets must be on the device of inputs, cuda:0, and are on cpu"):
        sigmoid_focal_loss(inputs, targets)
    with pytest.raises(ValueError, match="weight must be on the device of inputs, cuda:0, and is on cpu"):
        sigmoid_focal_loss(inputs, targets.to(DEVICE), weight=torch.ones(3))


@pytest.mark.parametrize("case", ["indices", "weighted", "soft", "soft transposed", "half", "by class"])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_opcheck(case, reduction):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports it, and it is not installed")
    dtype = torch.bfloat16 if case == "half" else torch.float32
    inputs, targets = torch.randn(6, 5, device=DEVICE).to(dtype), torch.tensor([0, 4, -1, -2, 5, 2], device=DEVICE)
    if case.startswith("soft"):
        inputs = torch.randn(5, 6, device=DEVICE).t() if "transposed" in case else inputs
        targets = inputs.sigmoid()
    weight = torch.rand(5, device=DEVICE) if case == "weighted" else None
    class_alpha = torch.rand(5, device=DEVICE) if case == "by class" else None
    arguments = (weight, class_alpha, 0.25, 1.5, 0.1 if case == "weighted" else 0.0, -2, reduction)
    forward, leaf = OPS.sigmoid_focal_loss, inputs.detach().requires_grad_()
    torch.library.opcheck(forward, (leaf, targets, *arguments, False))
    grad = torch.ones_like(forward(inputs, targets, *arguments, False))
    torch.library.opcheck(OPS.sigmoid_focal_loss_backward, (grad, inputs, targets, *arguments))
    if reduction:
        torch.library.opcheck(OPS.sigmoid_focal_loss_with_grad, (inputs, targets, *arguments))


def inductor_missing():
    """Why torch.compile cannot generate code for the GPU here; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton for CUDA, and it is not installed"
    compiler = os.environ.get("CC", "").split()[:1] or ["gcc", "clang", "cc"]
    if not any(map(shutil.which, compiler)):
        return "triton needs a C compiler, and there is none on the PATH"
    return None


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_compile_fullgraph(reduction, backend):
    if backend == "inductor" and (reason := inductor_missing()):
        pytest.skip(reason)
    torch.compiler.reset()

    def step(x, targets):
        return sigmoid_focal_loss(x * 2 - 1, targets, gamma=1.5, reduction=reduction)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for rows in (200, 333):
        inputs, targets = sample(rows, 9)
        expected = loss_and_gradient(step, inputs, targets)
        for result, truth in zip(loss_and_gradient(compiled, inputs, targets), expected, strict=True):
            torch.testing.assert_close(result, truth, rtol=2e-5, atol=1e-7)  # x * 2 - 1 may be contracted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_autocast_returns_float32_and_casts_no_input(dtype):
    inputs, targets = sample(70, 9, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast("cuda", torch.bfloat16):
        loss, gradient = loss_and_gradient(sigmoid_focal_loss, inputs, targets)
    assert loss.dtype == wide
    assert gradient.dtype == dtype
    expected = reference.sigmoid_focal_loss(inputs.cpu().double(), targets.cpu())
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=2e-5, atol=0)  # inputs cast to bfloat16 would show
    with torch.autocast("cpu", torch.bfloat16):
        assert sigmoid_focal_loss(inputs, targets).dtype == dtype  # another device's autocast


def test_per_sample_gradients():
    inputs, targets = sample(120, 9)
    inputs, targets = inputs.view(4, 30, 9), targets.view(4, 30)
    gradient = torch.func.grad(lambda x, t: sigmoid_focal_loss(x, t, reduction="mean"))
    expected = torch.stack([gradient(x, t) for x, t in zip(inputs, targets, strict=True)])
    torch.testing.assert_close(torch.func.vmap(gradient)(inputs, targets), expected, rtol=4e-5, atol=1e-12)


def test_double_backward_says_so():
    inputs, targets = sample(5, 4)
    inputs.requires_grad_()
    loss = sigmoid_focal_loss(inputs, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss.square(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        gradient.square().sum().backward()
