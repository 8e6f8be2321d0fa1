"""multilevel_focal_loss against a loop over anchors, each a call of sigmoid_focal_loss in float64."""

import math
import re

import pytest
import torch

from retinanet_ext import multilevel_focal_loss, sigmoid_focal_loss

A, K = 3, 5
SIZES = ((4, 6), (2, 3), (1, 2))
LAYOUTS = ("contiguous", "channels_last", "rows", "slices", "mixed")


def head_outputs(layout, batch=2, sizes=SIZES, dtype=torch.float32):
    """Levels [B, A*K, H, W] or [B, H*W*A, K], and targets that hold every kind of row."""
    levels = []
    for i, (height, width) in enumerate(sizes):
        form = ("contiguous", "channels_last", "rows")[i % 3] if layout == "mixed" else layout
        level = (torch.randn(batch, A * K, height, width) * 3).to(dtype)
        if form == "channels_last":
            level = level.contiguous(memory_format=torch.channels_last)
        elif form == "slices":
            wide = torch.full((batch, A * K + 4, height, width + 2), math.nan, dtype=dtype)
            wide[:, 2:-2, :, 1:-1] = level
            level = wide[:, 2:-2, :, 1:-1]
        elif form == "rows":
            level = (torch.randn(batch, height * width * A, K) * 3).to(dtype)
        levels.append(level)
    num_anchors = sum(height * width for height, width in sizes) * A
    return levels, torch.randint(-3, K + 2, (batch, num_anchors))


def anchor_by_anchor(levels, targets, alpha=0.25, gamma=2.0, normalizer=None):
    """Level, then row y, column x, then anchor a; channel a*K + k."""
    batch = targets.shape[0]
    total = sum(level.double().sum() * 0 for level in levels)  # levels without an anchor belong to the graph too
    for b in range(batch):
        n = 0
        loss = torch.zeros((), dtype=torch.float64)
        for level in levels:
            if level.dim() == 3:
                rows = list(level[b])
            else:
                _, _, height, width = level.shape
                rows = [
                    level[b, a * K : (a + 1) * K, y, x]
                    for y in range(height)
                    for x in range(width)
                    for a in range(level.shape[1] // K)
                ]
            for row in rows:
                loss = loss + sigmoid_focal_loss(row.double(), targets[b, n], alpha, gamma, "sum")
                n += 1
        assert n == targets.shape[1]
        if normalizer is None:
            divisor = 1.0
        elif isinstance(normalizer, torch.Tensor) and normalizer.dim() == 1:
            divisor = float(normalizer[b])
        else:
            divisor = float(normalizer)
        total = total + loss / divisor
    return total


def gradients(function, levels, targets, **options):
    leaves = [level.detach().clone(memory_format=torch.preserve_format).requires_grad_() for level in levels]
    loss = function(leaves, targets, **options)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def assert_equals_the_loop(levels, targets, **options):
    loss, grads = gradients(multilevel_focal_loss, levels, targets, **options)
    expected, expected_grads = gradients(anchor_by_anchor, levels, targets, **options)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    for grad, truth, level in zip(grads, expected_grads, levels, strict=True):
        assert grad.dtype == level.dtype
        assert grad.shape == level.shape
        info = torch.finfo(level.dtype)
        torch.testing.assert_close(
            grad.double(), truth.double(), rtol=2e-5 + info.eps, atol=info.tiny * info.eps + 1e-30
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"alpha": -1, "gamma": 0.0}, {"alpha": 0.6, "gamma": 1.5}], ids=str)
def test_every_layout(layout, options):
    levels, targets = head_outputs(layout)
    assert_equals_the_loop(levels, targets, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype(dtype):
    levels, targets = head_outputs("mixed", dtype=dtype)
    assert_equals_the_loop(levels, targets)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8])
def test_every_dtype_of_the_targets(dtype):
    levels, targets = head_outputs("contiguous")
    expected = multilevel_focal_loss(levels, targets)
    assert torch.equal(multilevel_focal_loss(levels, targets.to(dtype)), expected)
    strided = torch.stack([targets, targets], -1)[..., 0]
    assert torch.equal(multilevel_focal_loss(levels, strided), expected)


@pytest.mark.parametrize(
    "normalizer",
    [
        None,
        7,
        2.5,
        torch.tensor(3.0),
        torch.tensor(4),
        torch.tensor([2.0, 9.0]),
        torch.tensor([3, 8]),
        torch.tensor([5.0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["contiguous", "mixed"])
def test_normalizer(layout, normalizer):
    levels, targets = head_outputs(layout)
    if isinstance(normalizer, torch.Tensor) and normalizer.shape == (1,):
        expected = multilevel_focal_loss(levels, targets, normalizer=5.0)
        assert torch.equal(multilevel_focal_loss(levels, targets, normalizer=normalizer), expected)
    else:
        assert_equals_the_loop(levels, targets, normalizer=normalizer)


def test_no_gradient_flows_into_the_normalizer():
    levels, targets = head_outputs("contiguous")
    levels[0].requires_grad_()
    normalizer = torch.tensor([2.0, 9.0], requires_grad=True)
    multilevel_focal_loss(levels, targets, normalizer=normalizer).backward()
    assert normalizer.grad is None
    assert levels[0].grad.any()


def test_torchvision_normalization():
    """B * max(1, foreground of the image) is torchvision's mean over images of sum / foreground."""
    levels, targets = head_outputs("contiguous")
    targets[1] = -1
    foreground = ((targets >= 0) & (targets < K)).sum(1)
    loss = multilevel_focal_loss(levels, targets, normalizer=2 * foreground.clamp(min=1))
    images = [
        multilevel_focal_loss([level[b : b + 1] for level in levels], targets[b : b + 1]) / max(1, int(foreground[b]))
        for b in range(2)
    ]
    torch.testing.assert_close(loss, sum(images) / 2, rtol=1e-6, atol=0)


def test_ignored_anchors_hide_anything():
    levels, targets = head_outputs("contiguous")
    targets[0, 4] = targets[1, -1] = -2
    expected, expected_grads = gradients(multilevel_focal_loss, levels, targets)
    levels[0][0, K : 2 * K, 0, 1] = math.nan  # anchor 1 of cell (0, 1): row 4
    levels[-1][1, -K:, -1, -1] = math.inf
    loss, grads = gradients(multilevel_focal_loss, levels, targets)
    assert torch.equal(loss, expected)
    for grad, truth in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad, truth)
    assert (grads[0][0, K : 2 * K, 0, 1] == 0).all()


def test_every_anchor_ignored_is_no_loss():
    levels, targets = head_outputs("contiguous")
    loss, grads = gradients(multilevel_focal_loss, levels, torch.full_like(targets, -2))
    assert loss == 0
    assert not any(grad.any() for grad in grads)


def test_images_without_objects_have_a_loss():
    levels, targets = head_outputs("channels_last")
    assert_equals_the_loop(levels, torch.full_like(targets, -1), normalizer=2.0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows", "mixed"])
@pytest.mark.parametrize(
    "sizes", [((4, 6), (0, 3), (1, 2)), ((0, 0), (2, 2)), ((3, 0),), ((0, 4), (0, 2), (0, 1))], ids=str
)
def test_empty_levels(layout, sizes):
    levels, targets = head_outputs(layout, sizes=sizes)
    loss, grads = gradients(multilevel_focal_loss, levels, targets)
    expected, _ = gradients(anchor_by_anchor, levels, targets)
    torch.testing.assert_close(loss.double(), expected.double(), rtol=2e-6, atol=0)
    assert [grad.shape for grad in grads] == [level.shape for level in levels]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows", "mixed"])
def test_an_empty_batch(layout):
    levels, targets = head_outputs(layout, batch=0)
    for normalizer in (None, 2.0, torch.ones(0)):
        loss, grads = gradients(multilevel_focal_loss, levels, targets, normalizer=normalizer)
        assert loss == 0
        assert [grad.shape for grad in grads] == [level.shape for level in levels]


def test_levels_of_different_anchors_a_cell():
    levels = [torch.randn(2, 2 * K, 3, 2), torch.randn(2, 4 * K, 1, 2), torch.randn(2, 9, K)]
    targets = torch.randint(-2, K, (2, 12 + 8 + 9))
    assert_equals_the_loop(levels, targets)


def test_one_class_and_one_anchor():
    levels = [torch.randn(2, 1, 3, 2), torch.randn(2, 1, 1, 1)]
    targets = torch.randint(-2, 1, (2, 7))
    rows = torch.cat([levels[0].reshape(2, 6, 1), levels[1].reshape(2, 1, 1)], 1)
    expected = sigmoid_focal_loss(rows, targets, reduction="sum")
    torch.testing.assert_close(multilevel_focal_loss(levels, targets), expected, rtol=1e-6, atol=0)


def test_no_class_is_no_loss():
    for levels in ([torch.randn(2, 12, 0)], [torch.randn(2, 0, 3, 4)]):
        loss, grads = gradients(multilevel_focal_loss, levels, torch.zeros(2, 12, dtype=torch.int64))
        assert loss == 0
        assert [grad.shape for grad in grads] == [level.shape for level in levels]


@pytest.mark.parametrize("normalizer", [0.0, torch.tensor(0.0), torch.zeros(1)], ids=str)
def test_a_normalizer_of_zero_is_infinite_even_where_most_losses_vanish(normalizer):
    logits = torch.full((1, 40_000, 1), -200.0)
    logits[0, 0] = 1
    targets = torch.full((1, 40_000), -1)
    assert multilevel_focal_loss([logits], targets, normalizer=normalizer) == math.inf


def test_a_gamma_beyond_float32():
    logits = torch.tensor([[[200.0]]])
    loss = multilevel_focal_loss([logits], torch.tensor([[-1]]), alpha=-1, gamma=1e39)
    assert loss == 200
    assert sigmoid_focal_loss(logits[0], torch.tensor([-1]), -1, 1e39, "sum") == 200


def test_under_compile_and_autocast():
    levels, targets = head_outputs("mixed")
    normalizer = torch.tensor([2.0, 9.0])

    def step(a, b, c):
        return multilevel_focal_loss([a, b, c], targets, normalizer=normalizer)

    torch.compiler.reset()
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(*levels)
    torch.testing.assert_close(result, step(*levels), rtol=1e-6, atol=0)
    halves = [level.bfloat16() for level in levels]
    with torch.autocast("cpu", torch.bfloat16):
        loss = step(*halves)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, step(*[level.float() for level in halves]), rtol=1e-6, atol=0)


LEVELS = [torch.zeros(2, 10, 2, 2), torch.zeros(2, 10, 1, 1)]
TARGETS = torch.zeros(2, 10, dtype=torch.int64)

MISTAKES = {
    "no level": (([], TARGETS), "logits must be a list of one tensor at least, and is empty"),
    "a sparse level": (
        ([LEVELS[0], LEVELS[1].to_sparse()], TARGETS),
        "logits[1] must be a dense tensor, and is torch.sparse_coo",
    ),
    "soft targets": (
        (LEVELS, TARGETS.float()),
        "targets must be integers of shape [B, N], and are torch.float32 of shape (2, 10)",
    ),
    "targets of one image": (
        (LEVELS, TARGETS[0]),
        "targets must be integers of shape [B, N], and are torch.int64 of shape (10,)",
    ),
    "another batch": (
        (LEVELS, TARGETS[:1]),
        "logits[0] must be [1, A*K, H, W] or [1, n, K], and has shape (2, 10, 2, 2)",
    ),
    "a level of two dimensions": (
        ([LEVELS[0], torch.zeros(2, 10)], TARGETS),
        "logits[1] must be [2, A*K, H, W] or [2, n, K], and has shape (2, 10)",
    ),
    "two dtypes": (
        ([LEVELS[0], LEVELS[1].half()], TARGETS),
        "logits must share one floating dtype, and logits[1] is torch.float16",
    ),
    "integer logits": (
        ([LEVELS[0].long(), LEVELS[1].long()], TARGETS),
        "logits must share one floating dtype, and logits[0] is torch.int64",
    ),
    "another device": (
        ([LEVELS[0], LEVELS[1].to("meta")], TARGETS),
        "logits and targets must be on one device; logits[1] is on meta, targets on cpu",
    ),
    "more anchors than logits": (
        (LEVELS, torch.zeros(2, 51, dtype=torch.int64)),
        "targets name 51 anchors an image",
    ),
    "anchors that do not divide the logits": (
        (LEVELS, torch.zeros(2, 7, dtype=torch.int64)),
        "targets name 7 anchors an image",
    ),
    "channels that hold no whole anchors": (
        (LEVELS, torch.zeros(2, 50 // 25, dtype=torch.int64)),
        "logits[0] has 10 channels, which do not hold whole anchors of 25 classes",
    ),
    "rows of other classes": (
        ([torch.zeros(2, 5, 4), torch.zeros(2, 4, 5)], torch.zeros(2, 10, dtype=torch.int64)),
        "logits[1] has 5 channels, which do not hold whole anchors of 4 classes",
    ),
    "alpha": ((LEVELS, TARGETS, 1.5), "alpha must be in [0, 1], or -1 for no balancing, and is 1.5"),
    "gamma": ((LEVELS, TARGETS, 0.25, -1), "gamma must be finite and >= 0, and is -1"),
    "normalizer": (
        (LEVELS, TARGETS, 0.25, 2.0, torch.ones(3)),
        "normalizer must be a number, or a scalar or [2] tensor, and has shape (3,)",
    ),
    "complex normalizer": (
        (LEVELS, TARGETS, 0.25, 2.0, torch.ones(2, dtype=torch.complex64)),
        "normalizer must be a tensor of real numbers, and is torch.complex64",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_value_error_that_names_it(name):
    arguments, message = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(f"multilevel_focal_loss: {message}")):
        multilevel_focal_loss(*arguments)


def test_a_normalizer_elsewhere_or_of_another_kind():
    normalizer = torch.ones(2, device="meta")
    with pytest.raises(ValueError, match="normalizer must be on the device of logits, cpu, and is on meta"):
        multilevel_focal_loss(LEVELS, TARGETS, normalizer=normalizer)
    with pytest.raises(TypeError, match="normalizer must be a number or a tensor, and is str"):
        multilevel_focal_loss(LEVELS, TARGETS, normalizer="a")


@pytest.mark.parametrize(
    "value", [5, None, LEVELS[0], iter(LEVELS), dict(enumerate(LEVELS))], ids=lambda v: type(v).__name__
)
def test_logits_that_are_no_list(value):
    words = f"logits must be a list of tensors, one a level, and is {type(value).__name__}"
    with pytest.raises(TypeError, match=f"multilevel_focal_loss: {words}"):
        multilevel_focal_loss(value, TARGETS)


@pytest.mark.parametrize(
    ("option", "value"), [("alpha", "a"), ("alpha", None), ("alpha", torch.ones(5)), ("gamma", "2"), ("gamma", None)]
)
def test_options_that_are_no_numbers(option, value):
    words = f"multilevel_focal_loss: {option} must be a number, and is {type(value).__name__}"
    with pytest.raises(TypeError, match=words):
        multilevel_focal_loss(LEVELS, TARGETS, **{option: value})


def test_what_is_no_tensor():
    with pytest.raises(TypeError, match="multilevel_focal_loss: targets must be a tensor, and is list"):
        multilevel_focal_loss(LEVELS, [[0] * 10] * 2)
    with pytest.raises(
        TypeError, match=re.escape("multilevel_focal_loss: logits[1] must be a tensor, and is NoneType")
    ):
        multilevel_focal_loss([LEVELS[0], None], TARGETS)
