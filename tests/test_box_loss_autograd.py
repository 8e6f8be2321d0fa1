"""box_regression_loss under autograd, torch.func, torch.compile and autocast, and the raw operators."""

import copy

import pytest
import torch

from retinanet_ext import box_regression_loss, reference

OPS = torch.ops.retinanet_ext
A = 2
SIZES = ((3, 4), (2, 2))


def make_case(dtype=torch.float32, batch=2):
    """Levels of two layouts, anchors, a list of boxes, and matches of which a third is foreground."""
    levels = [torch.randn(batch, 4 * A, *size).to(dtype) for size in SIZES]
    levels[1] = levels[1].contiguous(memory_format=torch.channels_last)
    count = A * sum(height * width for height, width in SIZES)
    gt_boxes = [random_boxes(3 + image) for image in range(batch)]
    return levels, random_boxes(count), gt_boxes, torch.randint(-6, 3, (batch, count))


def random_boxes(count):
    corner = torch.rand(count, 2) * 60
    return torch.cat([corner, corner + 5 + torch.rand(count, 2) * 40], dim=1)


def packed(gt_boxes):
    counts = torch.tensor([0] + [len(boxes) for boxes in gt_boxes])
    return torch.cat(gt_boxes), counts.cumsum(0).int()


def gradients(function, levels, *arguments, **options):
    leaves = [level.detach().requires_grad_() for level in levels]
    return torch.autograd.grad(function(leaves, *arguments, **options), leaves)


def raw_arguments(levels, anchors, gt_boxes, matched, loss=2, normalizer=None):
    return levels, anchors, gt_boxes, None, matched, normalizer, loss, 0.5, 10.0, 10.0, 5.0, 5.0, 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("loss", [0, 1, 2])
def test_opcheck(dtype, loss):
    levels, anchors, gt_boxes, matched = make_case(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for normalizer in (None, torch.tensor([2.0, 3.0], dtype=compute)):
        arguments = raw_arguments(levels, anchors, gt_boxes, matched, loss, normalizer)
        torch.library.opcheck(OPS.box_regression_loss_backward, (torch.ones((), dtype=compute), *arguments))
        leaves = [level.clone().requires_grad_() for level in levels]
        torch.library.opcheck(OPS.box_regression_loss, (leaves, *arguments[1:]))


def test_opcheck_of_packed_boxes():
    levels, anchors, gt_boxes, matched = make_case()
    boxes, offsets = packed(gt_boxes)
    arguments = raw_arguments([level.requires_grad_() for level in levels], anchors, [boxes], matched)
    torch.library.opcheck(OPS.box_regression_loss, (*arguments[:3], offsets, *arguments[4:]))


def test_the_raw_operator_has_the_wrappers_gradient():
    levels, anchors, gt_boxes, matched = make_case()
    leaves = [level.clone().requires_grad_() for level in levels]
    raw = OPS.box_regression_loss(*raw_arguments(leaves, anchors, gt_boxes, matched))
    expected = gradients(
        box_regression_loss, levels, anchors, gt_boxes, matched, "giou", 0.5, (10, 10, 5, 5), normalizer=2.0
    )
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(raw, leaves), expected, strict=True))


NUM_ANCHORS = A * sum(height * width for height, width in SIZES)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: []}, "deltas must hold at least one level"),
        (
            {0: [torch.zeros(2, 8, 3, 4), torch.zeros(2, 8, 2, 2).half()]},
            "deltas must share one floating dtype; there are float32 and",
        ),
        (
            {0: [torch.zeros(2, 7, 3, 4), torch.zeros(2, 8, 2, 2)]},
            r"each level of deltas must be .* and one has shape \[2, 7, 3, 4\]",
        ),
        (
            {0: [torch.zeros(2, 8, 3, 4), torch.zeros(1, 8, 2, 2)]},
            r"deltas and matched must have one batch size; .* \[1, 8, 2, 2\]",
        ),
        ({0: [torch.zeros(2, 8, 3, 4)]}, f"matched names {NUM_ANCHORS} anchors an image, and deltas hold 24"),
        (
            {1: torch.zeros(NUM_ANCHORS, 5)},
            rf"anchors must be floating, of shape \[n, 4\], and are float32 of shape \[{NUM_ANCHORS}, 5\]",
        ),
        ({1: torch.zeros(NUM_ANCHORS, 4).long()}, r"anchors must be floating, of shape \[n, 4\], and are int64"),
        ({1: torch.zeros(NUM_ANCHORS - 1, 4)}, r"anchors must be \[N, 4\] or \[B, N, 4\] with matched of .*, and are"),
        ({1: torch.zeros(3, NUM_ANCHORS, 4)}, rf"anchors must be .*, and are \[3, {NUM_ANCHORS}, 4\]"),
        ({2: [torch.zeros(3, 4)]}, "gt_boxes must be those of 2 images, and are 1"),
        ({2: [torch.zeros(3, 4), torch.zeros(3)]}, r"gt_boxes must be floating, of shape \[n, 4\]"),
        ({3: torch.zeros(3, dtype=torch.int32)}, "gt_boxes must be one tensor where there are gt_offsets, and are 2"),
        ({2: [torch.zeros(6, 4)], 3: torch.zeros(2, dtype=torch.int32)}, r"gt_offsets must be int32 of shape \[3\]"),
        ({2: [torch.zeros(6, 4)], 3: torch.zeros(3, dtype=torch.int64)}, r"gt_offsets must be int32 of shape \[3\]"),
        ({4: torch.zeros(2, NUM_ANCHORS)}, r"matched must be int64 or int32 of shape \[B, N\], and is float32"),
        (
            {4: torch.zeros(NUM_ANCHORS).long()},
            r"matched must be int64 or int32 of shape \[B, N\], and is int64 of shape",
        ),
        ({5: torch.ones(3)}, r"normalizer must be a scalar or have shape \[2\], and has shape \[3\]"),
        ({5: torch.ones(2).double()}, "normalizer must be float32 on the device of deltas"),
        ({6: 3}, r"loss must be 0 \(l1\), 1 \(smooth_l1\) or 2 \(giou\), and is 3"),
        ({7: -1.0}, "beta must be at least 0, and is -1"),
        ({7: float("nan")}, "beta must be at least 0, and is nan"),
        ({9: 0.0}, "weights must be positive"),
    ],
)
def test_raw_errors(change, text):
    arguments = list(raw_arguments(*make_case()))
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match="^box_regression_loss: " + text):
        OPS.box_regression_loss(*arguments)
    with pytest.raises(RuntimeError, match="^box_regression_loss: " + text):
        OPS.box_regression_loss_backward(torch.ones(()), *arguments)


@pytest.mark.parametrize("grad", [torch.ones(1), torch.ones((), dtype=torch.float64)], ids=["a vector", "float64"])
def test_the_raw_backward_refuses_another_gradient(grad):
    with pytest.raises(RuntimeError, match="box_regression_loss_backward: grad must be a float32 scalar"):
        OPS.box_regression_loss_backward(grad, *raw_arguments(*make_case()))


@pytest.mark.parametrize("name", ["anchors", "gt_boxes", "normalizer"])
def test_the_raw_operator_names_what_has_no_gradient(name):
    levels, anchors, gt_boxes, matched = make_case()
    normalizer = torch.tensor([2.0, 3.0])
    for tensor in {"anchors": [anchors], "gt_boxes": gt_boxes, "normalizer": [normalizer]}[name]:
        tensor.requires_grad_()
    loss = OPS.box_regression_loss(*raw_arguments(levels, anchors, gt_boxes, matched, normalizer=normalizer))
    with pytest.raises(RuntimeError, match=f"box_regression_loss: the operator has no gradient for {name}; detach it"):
        loss.backward()


def test_anchors_boxes_and_normalizer_get_no_gradient():
    levels, anchors, gt_boxes, matched = make_case()
    normalizer = torch.tensor([2.0, 3.0])
    others = [anchors, *gt_boxes, normalizer]
    for tensor in others:
        tensor.requires_grad_()
    assert not box_regression_loss(levels, anchors, gt_boxes, matched, normalizer=normalizer).requires_grad
    levels[0].requires_grad_()
    box_regression_loss(levels, anchors, gt_boxes, matched, normalizer=normalizer).backward()
    assert levels[0].grad.any()
    assert all(tensor.grad is None for tensor in others)


@pytest.mark.parametrize("upstream", [1.0, -2.5, float("nan"), float("inf")])
def test_upstream_gradient(upstream):
    levels, anchors, gt_boxes, matched = make_case()
    leaves = [level.clone().requires_grad_() for level in levels]
    loss = box_regression_loss(leaves, anchors, gt_boxes, matched, "smooth_l1")
    found = torch.autograd.grad(loss, leaves, torch.tensor(upstream), retain_graph=True)
    again = torch.autograd.grad(loss, leaves, torch.tensor(upstream))
    unit = gradients(box_regression_loss, levels, anchors, gt_boxes, matched, "smooth_l1")
    for one, other, base in zip(found, again, unit, strict=True):
        torch.testing.assert_close(one, torch.where(base == 0, 0, base * upstream), rtol=1e-6, atol=0, equal_nan=True)
        torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)


def test_second_derivatives_are_an_error():
    levels, anchors, gt_boxes, matched = make_case()
    leaves = [level.requires_grad_() for level in levels]
    message = "box_regression_loss: second derivatives are not implemented"
    for loss in (
        box_regression_loss(leaves, anchors, gt_boxes, matched, "giou"),
        OPS.box_regression_loss(*raw_arguments(leaves, anchors, gt_boxes, matched)),
    ):
        (first, _) = torch.autograd.grad(loss, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            first.sum().backward()


@pytest.mark.parametrize("loss", ["l1", "giou"])
def test_func_grad(loss):
    levels, anchors, gt_boxes, matched = make_case()

    def total(first, second):
        return box_regression_loss([first * 2, second], anchors, gt_boxes, matched, loss)

    found = torch.func.grad(total, argnums=(0, 1))(*levels)
    leaves = [level.clone().requires_grad_() for level in levels]
    expected = torch.autograd.grad(total(*leaves), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    value, pullback = torch.func.vjp(total, *levels)
    torch.testing.assert_close(value, total(*levels), rtol=0, atol=0)
    upstreams = torch.tensor([1.0, -3.0])
    for one, other in zip(torch.func.vmap(pullback)(upstreams), expected, strict=True):
        torch.testing.assert_close(one, torch.stack([other, other * -3]), rtol=1e-6, atol=0)


def test_batched_upstream_gradients():
    levels, anchors, gt_boxes, matched = make_case(torch.bfloat16)
    leaves = [level.requires_grad_() for level in levels]
    loss = box_regression_loss(leaves, anchors, gt_boxes, matched, normalizer=torch.tensor([3, 7]))
    upstreams = torch.tensor([1.0, 0.3])
    found = torch.autograd.grad(loss, leaves, upstreams, is_grads_batched=True, retain_graph=True)
    for i, upstream in enumerate(upstreams):
        expected = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[i], other, rtol=2**-8, atol=0)


def test_vmap_is_an_error():
    levels, anchors, gt_boxes, matched = make_case()
    message = "box_regression_loss: vmap is not supported: pass the whole batch"

    def total(level, anchors, boxes, matched, normalizer):
        return box_regression_loss([level, levels[1]], anchors, boxes, matched, normalizer=normalizer)

    arguments = (levels[0], anchors, gt_boxes, matched, torch.tensor([2.0, 3.0]))
    for place in range(5):
        dims = [None] * 5
        dims[place] = [0, 0] if place == 2 else 0
        batched = list(arguments)
        batched[place] = [boxes[None] for boxes in gt_boxes] if place == 2 else arguments[place][None]
        with pytest.raises(RuntimeError, match=message):
            torch.func.vmap(total, in_dims=tuple(dims))(*batched)
    with pytest.raises(RuntimeError, match=message):
        torch.func.vmap(torch.func.grad(total), in_dims=(0, None, None, None, None))(levels[0][None], *arguments[1:])


@pytest.mark.parametrize("loss", ["l1", "smooth_l1", "giou"])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("normalizer", [None, 2.5, torch.tensor([2.0, 3.0]), torch.tensor(4)], ids=str)
def test_compile_fullgraph(loss, pack, normalizer):
    levels, anchors, gt_boxes, matched = make_case()
    gt_boxes, offsets = packed(gt_boxes) if pack else (gt_boxes, None)

    def step(first, second, gt_boxes, matched):
        return box_regression_loss(
            [first, second], anchors, gt_boxes, matched, loss, 0.5, normalizer=normalizer, gt_offsets=offsets
        )

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")

    def run(function):
        leaves = [level.detach().requires_grad_() for level in levels]
        total = function(*leaves, gt_boxes, matched)
        return total.detach(), *torch.autograd.grad(total, leaves)

    for one, other in zip(run(compiled), run(step), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_compile_with_any_number_of_boxes():
    levels, anchors, gt_boxes, matched = make_case()
    torch.compiler.reset()
    compiled = torch.compile(box_regression_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for extra in (0, 2, 5):
        boxes = [torch.cat([one, random_boxes(extra)]) for one in gt_boxes]
        assert torch.equal(
            compiled(levels, anchors, boxes, matched), box_regression_loss(levels, anchors, boxes, matched)
        )


def test_exports_with_any_batch():
    class Loss(torch.nn.Module):
        def forward(self, levels, anchors, boxes, offsets, matched):
            return box_regression_loss(levels, anchors, boxes, matched, "giou", gt_offsets=offsets)

    def batch_of(count):
        levels, anchors, gt_boxes, matched = make_case(batch=count)
        boxes, offsets = packed(gt_boxes)
        return levels, anchors, torch.cat([boxes, boxes.new_zeros(40 - len(boxes), 4)]), offsets, matched

    batch = torch.export.Dim("batch", min=2, max=16)
    shapes = ([{0: batch}, {0: batch}], {}, {}, {0: batch + 1}, {0: batch})
    program = torch.export.export(Loss(), batch_of(3), dynamic_shapes=shapes).module()
    for count in (2, 5):
        arguments = batch_of(count)
        assert torch.equal(program(*arguments), Loss()(*arguments))


def test_fake_tensors_have_the_shapes_and_layouts():
    levels, anchors, gt_boxes, matched = make_case(torch.bfloat16)
    expected = gradients(box_regression_loss, levels, anchors, gt_boxes, matched)
    mode = torch._subclasses.FakeTensorMode()
    fakes = [mode.from_tensor(level) for level in levels]
    others = mode.from_tensor(anchors), [mode.from_tensor(boxes) for boxes in gt_boxes], mode.from_tensor(matched)
    with mode:
        found = gradients(box_regression_loss, fakes, *others)
        assert box_regression_loss(fakes, *others).dtype == torch.float32
    assert [(one.shape, one.dtype, one.stride()) for one in found] == [
        (one.shape, one.dtype, one.stride()) for one in expected
    ]


def test_autocast_casts_nothing():
    levels, anchors, gt_boxes, matched = make_case()
    expected = box_regression_loss(levels, anchors, gt_boxes, matched, "giou")
    with torch.autocast("cpu", torch.bfloat16):
        found = box_regression_loss(levels, anchors, gt_boxes, matched, "giou")
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_a_training_step_moves_the_boxes_towards_the_truth():
    """Through a convolution, as in a head: the loss falls as the reference's does."""
    torch.manual_seed(1)
    head = torch.nn.Conv2d(3, 4 * A, 3, padding=1)
    features = [torch.randn(2, 3, *size) for size in SIZES]
    _, anchors, gt_boxes, matched = make_case()
    losses = {}
    for name, function in (("ours", box_regression_loss), ("reference", reference.box_regression_loss)):
        model = copy.deepcopy(head)
        losses[name] = []
        for _ in range(5):
            loss = function([model(one) for one in features], anchors, gt_boxes, matched, "smooth_l1", normalizer=20)
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.05 * parameter.grad
            losses[name].append(loss.item())
    assert losses["ours"][-1] < losses["ours"][0]
    assert losses["ours"] == pytest.approx(losses["reference"], rel=1e-4)
