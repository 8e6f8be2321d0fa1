"""box_iou under autograd, torch.func, torch.compile and torch.export."""

import functools

import pytest
import torch

from retinanet_ext import box_iou, reference

OPS = torch.ops.retinanet_ext
FORMATS = ("xyxy", "xywh", "cxcywh")


def random_boxes(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 40
    size = 5 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 40
    return torch.cat([corner, corner + size], dim=-1).to(dtype)


def leaves(*shapes, dtype=torch.float64):
    return [random_boxes(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shapes", [((3,), (4,)), ((2, 3), (4,)), ((2, 1, 2), (3, 2)), ((1, 2), (2, 3))], ids=str)
def test_gradient(shapes, fmt):
    boxes = leaves(*shapes)
    assert torch.autograd.gradcheck(functools.partial(box_iou, fmt=fmt), boxes)


@pytest.mark.parametrize("fmt", FORMATS)
def test_second_derivatives(fmt):
    assert torch.autograd.gradgradcheck(functools.partial(box_iou, fmt=fmt), leaves((2,), (1, 3)))
    function = functools.partial(OPS.box_iou, fmt=FORMATS.index(fmt))
    assert torch.autograd.gradgradcheck(function, leaves((2,), (3,)))


def boxes_that_tie():
    """Boxes with equal sides, boxes apart, touching ones, and one inside the other."""
    steps, sides = torch.arange(2.0) * 3, torch.tensor([4.0, 6.0])
    boxes = torch.cartesian_prod(steps, steps, sides, sides)
    boxes = torch.cat((boxes, boxes + 1, boxes[:3] + 20))
    return boxes, boxes[::2] - torch.tensor([0.0, 0.0, 1.0, 0.0])


def gradients_of(function, boxes, grad, dtype):
    inputs = [one.to(dtype).requires_grad_() for one in boxes]
    return torch.autograd.grad(function(*inputs), inputs, grad)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradient_is_pytorchs(dtype, fmt):
    boxes = boxes_that_tie()
    grad = torch.randn(len(boxes[0]), len(boxes[1]))
    peer_function = functools.partial(reference.box_iou, fmt=fmt)
    ours = gradients_of(functools.partial(box_iou, fmt=fmt), boxes, grad, dtype)
    peers = gradients_of(peer_function, boxes, grad, torch.float32)
    truth = gradients_of(peer_function, boxes, grad.double(), torch.float64)
    for gradient, peer, right in zip(ours, peers, truth, strict=True):
        assert gradient.dtype == dtype
        assert right.abs().max() > 0.01
        # twice the float32 error of PyTorch, and of halves half a unit in the last place
        rounding = torch.finfo(dtype).eps / 2 * right.abs() if dtype != torch.float32 else 0.0
        assert ((gradient - right).abs() <= 2 * (peer - right).abs().max() + rounding).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_gradient_of_float64_is_pytorchs(fmt):
    boxes = boxes_that_tie()
    grad = torch.randn(len(boxes[0]), len(boxes[1]), dtype=torch.float64)
    ours = gradients_of(functools.partial(box_iou, fmt=fmt), boxes, grad, torch.float64)
    peers = gradients_of(functools.partial(reference.box_iou, fmt=fmt), boxes, grad, torch.float64)
    for gradient, peer in zip(ours, peers, strict=True):
        torch.testing.assert_close(gradient, peer, rtol=1e-13, atol=1e-15)


# One lane, whole lanes and more; rows that go to float64 (128) and chunks of them (1024).
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("shapes", [((1,), (1,)), ((33,), (15,)), ((129,), (16,)), ((1030,), (17,)), ((2100,), (3,))])
def test_the_cpu_s_gradient_over_lanes_runs_and_chunks(shapes, fmt):
    check_against_pytorch(shapes, fmt)


@pytest.mark.parametrize("shapes", [((7,), (512,)), ((7,), (513,)), ((300,), (1100,)), ((3, 1, 2, 9), (5, 1, 530))])
def test_the_cpu_s_gradient_over_runs_and_batches(shapes):
    check_against_pytorch(shapes, "xyxy")


def check_against_pytorch(shapes, fmt):
    boxes = leaves(*shapes)
    iou = box_iou(*boxes, fmt)
    grad = torch.randn(iou.shape, dtype=torch.float64)
    compiled = torch.autograd.grad(iou, boxes, grad, retain_graph=True)
    composed = torch.autograd.grad(iou, boxes, grad, create_graph=True)
    for one, other, leaf in zip(compiled, composed, boxes, strict=True):
        assert not one.requires_grad
        assert other.requires_grad
        assert one.shape == leaf.shape
        torch.testing.assert_close(one, other.detach(), rtol=1e-11, atol=1e-13 * max(grad.shape))


def test_the_cpu_s_gradient_of_any_strides_and_expanded_upstream_gradients():
    wide = random_boxes(40, seed=1).repeat(1, 2)
    boxes1, boxes2 = wide[:, 1:5], random_boxes(60, seed=2).T.contiguous().T[::2]
    inputs = [boxes1.detach().requires_grad_(), boxes2.detach().requires_grad_()]
    assert not inputs[1].is_contiguous()
    contiguous = [one.detach().contiguous().requires_grad_() for one in inputs]
    strided = torch.autograd.grad(box_iou(*inputs).sum(), inputs)
    for one, other in zip(strided, torch.autograd.grad(box_iou(*contiguous).sum(), contiguous), strict=True):
        assert torch.equal(one, other)


def test_the_cpu_s_gradient_has_the_same_bits_for_any_number_of_threads(num_threads):
    boxes = leaves((1500,), (700,), dtype=torch.float32)
    grad = torch.randn(1500, 700)
    gradients = []
    for threads in (1, 2, 5):
        num_threads(threads)
        gradients.append(torch.autograd.grad(box_iou(*boxes), boxes, grad))
    for other in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("counts", [(0, 4), (4, 0), (0, 0)])
def test_gradient_of_no_boxes(counts):
    boxes = leaves((counts[0],), (counts[1],))
    for gradient, leaf in zip(torch.autograd.grad(box_iou(*boxes).sum(), boxes), boxes, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_the_gradient_s_operator_checks_its_arguments():
    boxes1, boxes2 = random_boxes(3, seed=1), random_boxes(4, seed=2)
    for grad in (torch.ones(4, 3), torch.ones(3, 4), torch.ones(4, 3, dtype=torch.float64).T):
        with pytest.raises(RuntimeError, match="box_iou_backward: grad must be contiguous, of the result's type and"):
            OPS.box_iou_backward(grad, boxes1, boxes2, 0)
    torch.library.opcheck(
        OPS.box_iou_backward.default,
        (torch.ones(3, 4, dtype=torch.float64), boxes1, boxes2, 0),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_infinite_and_nan_boxes_have_pytorchs_gradients():
    values = torch.tensor([0.0, 2.0, torch.inf, torch.nan], dtype=torch.float64)
    boxes = torch.cartesian_prod(values[:3], values[:2], values[1:], values[1:])
    inputs = [boxes.clone().requires_grad_(), random_boxes(1, seed=3).requires_grad_()]
    iou = box_iou(*inputs)
    grad = torch.ones_like(iou)
    for one, other in zip(
        torch.autograd.grad(iou, inputs, grad, retain_graph=True),
        torch.autograd.grad(reference.box_iou(*inputs), inputs, grad),
        strict=True,
    ):
        assert torch.equal(one.isfinite(), other.isfinite())
        torch.testing.assert_close(one[one.isfinite()], other[one.isfinite()], rtol=1e-12, atol=1e-14)


def test_gradient_of_one_side_alone():
    boxes1, boxes2 = leaves((3,), (4,))
    both = torch.autograd.grad(box_iou(boxes1, boxes2).sum(), (boxes1, boxes2))
    (first,) = torch.autograd.grad(box_iou(boxes1, boxes2.detach()).sum(), (boxes1,))
    (second,) = torch.autograd.grad(OPS.box_iou(boxes1.detach(), boxes2, 0).sum(), (boxes2,))
    assert torch.equal(first, both[0])
    assert torch.equal(second, both[1])


def test_boxes_without_area_have_a_gradient_that_is_not_a_number():
    boxes = torch.zeros(1, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(box_iou(boxes, torch.zeros(1, 4)).sum(), (boxes,))
    assert gradient.isnan().all()


def test_no_gradient_no_graph():
    boxes1, boxes2 = leaves((3,), (4,))
    with torch.no_grad():
        assert not box_iou(boxes1, boxes2).requires_grad
    assert box_iou(boxes1, boxes2.detach()).grad_fn is not None


@pytest.mark.parametrize("shapes", [((5,), (7,)), ((2, 1, 5), (3, 7)), ((0,), (7,))], ids=str)
@pytest.mark.parametrize(("dtype", "code"), [(torch.float32, 0), (torch.float64, 1), (torch.bfloat16, 2)])
def test_opcheck(dtype, code, shapes):
    torch.library.opcheck(OPS.box_iou.default, (*leaves(*shapes, dtype=dtype), code))


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("batch", [False, True])
def test_vmap(in_dims, batch):
    boxes1, boxes2 = random_boxes(3, 5, seed=1), random_boxes(*(2,) * batch, 3, 6, seed=2)
    boxes1, boxes2 = (
        boxes.movedim(-3, dim) if dim is not None else boxes.select(-3, 0)
        for boxes, dim in zip((boxes1, boxes2), in_dims, strict=True)
    )
    mapped = torch.func.vmap(box_iou, in_dims)(boxes1, boxes2)
    for entry in range(3):
        one, other = (
            boxes if dim is None else boxes.select(dim, entry)
            for boxes, dim in zip((boxes1, boxes2), in_dims, strict=True)
        )
        assert torch.equal(mapped[entry], box_iou(one, other))


def test_func_transforms():
    boxes1, boxes2 = random_boxes(2, 3, seed=1), random_boxes(4, seed=2)

    def loss(boxes):
        return box_iou(boxes, boxes2).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(boxes1)
    for entry in range(2):
        leaf = boxes1[entry].clone().requires_grad_()
        torch.testing.assert_close(gradients[entry], torch.autograd.grad(loss(leaf), leaf)[0], rtol=1e-14, atol=0)
    jacobian = torch.func.jacrev(box_iou)(boxes1[0], boxes2)
    expected = torch.autograd.functional.jacobian(lambda boxes: reference.box_iou(boxes, boxes2), boxes1[0])
    torch.testing.assert_close(jacobian, expected, rtol=1e-12, atol=1e-15)
    hessian = torch.func.jacrev(torch.func.grad(loss))(boxes1[0])
    expected = torch.autograd.functional.hessian(
        lambda boxes: reference.box_iou(boxes, boxes2).square().sum(), boxes1[0]
    )
    torch.testing.assert_close(hessian, expected, rtol=1e-12, atol=1e-15)


def test_batched_upstream_gradients():
    boxes1, boxes2 = leaves((3,), (4,))
    iou = box_iou(boxes1, boxes2)
    grads = torch.randn(5, 3, 4, dtype=torch.float64)
    batched = torch.autograd.grad(iou, (boxes1, boxes2), grads, is_grads_batched=True, retain_graph=True)
    for entry in range(5):
        each = torch.autograd.grad(iou, (boxes1, boxes2), grads[entry], retain_graph=True)
        for one, other in zip(batched, each, strict=True):
            torch.testing.assert_close(one[entry], other, rtol=1e-14, atol=1e-17)


def test_forward_mode_is_refused_not_forgotten():
    boxes1, boxes2 = random_boxes(3, seed=1), random_boxes(4, seed=2)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"),
    ):
        box_iou(torch.autograd.forward_ad.make_dual(boxes1, boxes1), boxes2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def loss(boxes1, boxes2):
        return (box_iou(boxes1, boxes2, "cxcywh") * 2).square().sum()

    for count in (4, 9):
        compiled, eager = leaves((2, 3), (count,)), leaves((2, 3), (count,))
        loss(*compiled).backward()
        (box_iou(*eager, "cxcywh") * 2).square().sum().backward()
        for one, other in zip(compiled, eager, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-14, atol=1e-17)


def test_exports():
    class Pairs(torch.nn.Module):
        def forward(self, boxes1, boxes2):
            return box_iou(boxes1, boxes2, "xywh")

    boxes1, boxes2 = random_boxes(3, seed=1), random_boxes(5, seed=2)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Pairs(), (boxes1, boxes2), dynamic_shapes=({0: rows}, {}))
    other = random_boxes(8, seed=3)
    assert torch.equal(program.module()(other, boxes2), box_iou(other, boxes2, "xywh"))


def test_fake_tensors():
    for shape1, shape2 in (((3,), (5,)), ((2, 1, 3), (4, 5))):
        for dtype in (torch.float16, torch.float32, torch.float64):
            boxes1, boxes2 = random_boxes(*shape1, dtype=dtype), random_boxes(*shape2, dtype=dtype)
            fake = box_iou(boxes1.to("meta"), boxes2.to("meta"))
            real = box_iou(boxes1, boxes2)
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
