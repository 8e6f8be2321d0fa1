"""Ring 1: the box coder and the GIoU loss that the CPU and CUDA kernels share, as C++ functions over NumPy arrays.

Built by conftest with the flags of the CPU kernels and run under every instruction set they dispatch to. Values are
compared with the reference to the bit, where both take exp and log from here; gradients with autograd of the
reference, in float64; values also with 40 digits.
"""

import math

import mpmath
import numpy as np
import pytest
import torch

from retinanet_ext.reference import anchor_match, decode_boxes, encode_boxes
from retinanet_ext.reference.box_loss import _giou_loss

DTYPES = {"float32": torch.float32, "float64": torch.float64}
WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (3.7, 0.3, 1.1, 7.0)]
CLIP = math.log(1000 / 16)
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="session")
def box_math(test_module):
    """csrc/common/box_math.h over NumPy arrays."""
    return test_module("_box_math")


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, box_math):
    if not box_math.supported(request.param):
        pytest.skip(f"this processor has no {request.param}")
    return request.param


@pytest.fixture
def exp_and_log_of_the_coder(box_math, monkeypatch):
    """In the reference: PyTorch's own are other implementations, which round the last place another way."""

    def patched(name):
        def apply(values):
            function = getattr(functions_of(box_math, values.dtype), name)
            return torch.from_numpy(function(values.flatten().numpy(), "baseline")).reshape(values.shape)

        return staticmethod(apply)

    class Coder:
        exp, log = patched("exp"), patched("log")

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(anchor_match, "torch", Coder())


def functions_of(box_math, dtype):
    return getattr(box_math, next(name for name, value in DTYPES.items() if value == dtype))


def random_boxes(count, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 1000 - 100
    size = torch.exp(torch.rand(count, 2, generator=generator, dtype=torch.float64) * 7)
    return torch.cat([corner, corner + size], dim=1).to(dtype)


def neighbours(count, dtype, seed):
    """Anchors, and boxes near them: overlapping, inside, sharing edges, apart."""
    generator = torch.Generator().manual_seed(seed)
    anchors = random_boxes(count, torch.float64, seed)
    size = (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
    boxes = anchors + torch.randn(count, 4, generator=generator, dtype=torch.float64) * 0.3 * size
    boxes = torch.cat([torch.minimum(boxes[:, :2], boxes[:, 2:] - 1), boxes[:, 2:]], dim=1)
    anchors, boxes = anchors.to(dtype), boxes.to(dtype)
    shared = torch.rand(count, 4, generator=generator) < 0.1
    return anchors, torch.where(shared, anchors, boxes)


def random_deltas(count, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64).to(dtype)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-30, 1e-3, 1e30, -1e30, INF, -INF, NAN]


def special_rows(dtype):
    """Rows of every kind of number, in every place beside ordinary ones, and all of them mixed."""
    rows = torch.tensor([3.0, 5.0, 40.0, 70.0], dtype=dtype).repeat(4 * len(SPECIAL), 1)
    for place in range(4):
        for i, value in enumerate(SPECIAL):
            rows[place * len(SPECIAL) + i, place] = value
    index = torch.randint(0, len(SPECIAL), (400, 4), generator=torch.Generator().manual_seed(0))
    return torch.cat([rows, torch.tensor(SPECIAL, dtype=dtype)[index]])


def with_special_rows(one, other, dtype):
    special = special_rows(dtype)
    plain = random_boxes(len(special), dtype, 7)
    return torch.cat([one, special, plain, special]), torch.cat([other, plain, special, special.flip(0)])


def assert_bits(found, expected):
    """Equal, zeros by their sign too; NaN stands for NaN."""
    expected = expected.numpy()
    np.testing.assert_array_equal(found, expected)
    kept = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found[kept]), np.signbit(expected[kept]))


def every(step, first, last):
    """Each `step`th float32 between these bit patterns."""
    return np.arange(first, last, step, dtype=np.uint32).view(np.float32)


LARGEST = 0x7F7FFFFF


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("exp", np.concatenate([every(997, 0x20000000, 0x42B17217), -every(997, 0x20000000, 0x42D00000)])),
        ("log", np.concatenate([every(2003, 1, LARGEST), every(101, 0x3F700000, 0x3F900000)])),
    ],
    ids=["exp", "log"],
)
def test_exp_and_log_are_within_a_unit_in_the_last_place(box_math, isa, name, numbers):
    """Of all numbers whose exponential is neither 0 nor infinite, and of all that have a logarithm."""
    found = getattr(box_math.float32, name)(numbers, isa).astype(np.float64)
    expected = getattr(np, name)(numbers.astype(np.float64))
    _, exponents = np.frexp(expected)
    units = np.ldexp(1.0, np.maximum(exponents, -125) - 24)
    assert np.abs(found - expected).max() > 0
    assert (np.abs(found - expected) / units).max() < 1.001


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exp_and_log_of_special_numbers(box_math, isa, dtype):
    functions = getattr(box_math, dtype)
    numbers = np.array([0.0, -0.0, INF, -INF, NAN, 1000.0, -1000.0, 1.0, -1.0], dtype)
    with np.errstate(all="ignore"):
        assert_bits(functions.exp(numbers[:7], isa), torch.tensor(np.exp(numbers[:7])))
        logarithms = [place for place in range(9) if place != 5]  # of 1000 the last place is anybody's
        assert_bits(functions.log(numbers, isa)[logarithms], torch.tensor(np.log(numbers)[logarithms]))


def test_exp_and_log_have_the_same_bits_on_every_instruction_set(box_math, isa):
    numbers = every(10_007, 0, 0xFFFFFFFF)
    for name in ("exp", "log"):
        function = getattr(box_math.float32, name)
        np.testing.assert_array_equal(function(numbers, isa), function(numbers, "baseline"))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_encoding_is_the_references_to_the_bit(box_math, isa, exp_and_log_of_the_coder, dtype, weights):
    anchors, boxes = with_special_rows(*neighbours(2000, dtype, 1), dtype)
    found = functions_of(box_math, dtype).encode(boxes.numpy(), anchors.numpy(), weights, isa)
    assert_bits(found, encode_boxes(boxes, anchors, weights))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("clip", [CLIP, 0.5])
def test_decoding_is_the_references_to_the_bit(box_math, isa, exp_and_log_of_the_coder, dtype, weights, clip):
    deltas, anchors = random_deltas(2000, dtype, 2) * 3, random_boxes(2000, dtype, 3)
    deltas[:50, 2:] = clip * weights[2]
    deltas, anchors = with_special_rows(deltas, anchors, dtype)
    found = functions_of(box_math, dtype).decode(deltas.numpy(), anchors.numpy(), weights, clip, isa)
    assert_bits(found, decode_boxes(deltas, anchors, weights, clip))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_giou_loss_is_the_references_to_the_bit(box_math, isa, dtype):
    one, other = with_special_rows(*neighbours(2000, dtype, 4), dtype)
    far = random_boxes(2000, dtype, 5), random_boxes(2000, dtype, 6)
    one, other = torch.cat([one, far[0], far[0]]), torch.cat([other, far[1], far[0]])
    found = functions_of(box_math, dtype).giou_loss(one.numpy(), other.numpy(), isa)
    assert_bits(found, _giou_loss(one, other))


def autograd(function, upstream, *inputs):
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    return torch.autograd.grad(function(*inputs), inputs, upstream)


def assert_as_good_as_autograd(function, found, upstream, *inputs, differentiated=None):
    """In units of the largest entry of a row: 4 roundings in float64; float32 by what autograd itself is off."""
    dtype = inputs[0].dtype
    exact = autograd(function, upstream.double(), *(value.double() for value in inputs))
    peers = autograd(function, upstream, *inputs)
    for mine, peer, true in list(zip(found, peers, exact, strict=False))[:differentiated]:
        scale = true.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        error = ((torch.from_numpy(mine).double() - true).abs() / scale).amax(dim=1)
        peer_error = ((peer.double() - true).abs() / scale).amax(dim=1)
        assert error.isfinite().all()
        if dtype == torch.float64:
            # `true` is this same float64, with roundings of its own
            assert error.max() <= 1e-12
        else:
            assert error.max() <= 2 * peer_error.max()
            assert error.mean() <= 2 * peer_error.mean()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_gradients_of_encoding(box_math, isa, dtype, weights):
    upstream = random_deltas(4000, dtype, 1)
    anchors, boxes = neighbours(4000, dtype, 2)
    found = functions_of(box_math, dtype).encode_gradient(
        upstream.numpy(), boxes.numpy(), anchors.numpy(), weights, isa
    )
    assert_as_good_as_autograd(lambda gt, a: encode_boxes(gt, a, weights), found, upstream, boxes, anchors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_gradients_of_decoding(box_math, isa, dtype, weights):
    upstream, deltas = random_deltas(4000, dtype, 1), random_deltas(4000, dtype, 2)
    deltas[:500, 2:] = 100 * weights[2]
    anchors = random_boxes(4000, dtype, 3)
    found = functions_of(box_math, dtype).decode_gradient(
        upstream.numpy(), deltas.numpy(), anchors.numpy(), weights, CLIP, isa
    )
    assert_as_good_as_autograd(lambda d, a: decode_boxes(d, a, weights), found, upstream, deltas, anchors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradient_of_the_giou_loss(box_math, isa, dtype):
    one, other = neighbours(4000, dtype, 4)
    far = random_boxes(4000, dtype, 5), random_boxes(4000, dtype, 6)
    for predicted, gt in ((one, other), far):
        found = functions_of(box_math, dtype).giou_loss_gradient(predicted.numpy(), gt.numpy(), isa)
        upstream = torch.ones(len(gt), dtype=dtype)
        assert_as_good_as_autograd(_giou_loss, [found], upstream, predicted, gt, differentiated=1)


def test_gradient_at_the_clip(box_math, isa):
    """All of it at the clip, none above it and none of NaN; the anchor's gradient goes on."""
    scale = torch.tensor([0.5, np.nextafter(0.5, 0), np.nextafter(0.5, 1), 7.0, INF, -INF, NAN], dtype=torch.float64)
    deltas = torch.zeros(len(scale), 4, dtype=torch.float64)
    deltas[:, 2], deltas[:, 3] = scale, -0.25
    anchors = random_boxes(len(scale), torch.float64, 1)
    upstream = random_deltas(len(scale), torch.float64, 2)
    found = box_math.float64.decode_gradient(upstream.numpy(), deltas.numpy(), anchors.numpy(), (1, 1, 1, 1), 0.5, isa)
    expected = autograd(lambda d, a: decode_boxes(d, a, clip=0.5), upstream, deltas, anchors)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-12, atol=1e-12)
    assert (found[0][:2, 2] != 0).all()
    assert (found[0][2:, 2] == 0).all()


def boxes_with_ties():
    """Every order and tie of two intervals' ends on both axes, none of them empty."""
    intervals = [(low, high) for low in range(4) for high in range(low + 1, 5)]
    pairs = [((a, b), (c, d)) for a in intervals for b in intervals[::3] for c in intervals for d in intervals[::3]]
    rows = [[(ax[0], ay[0], ax[1], ay[1]), (bx[0], by[0], bx[1], by[1])] for (ax, ay), (bx, by) in pairs]
    return torch.tensor(rows, dtype=torch.float64).unbind(dim=1)


def test_ties_share_the_gradient(box_math, isa):
    predicted, gt = boxes_with_ties()
    expected, _ = autograd(_giou_loss, torch.ones(len(gt), dtype=torch.float64), predicted, gt)
    found = box_math.float64.giou_loss_gradient(predicted.numpy(), gt.numpy(), isa)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-12)


def test_a_tie_is_a_kink_and_gets_the_mean_of_both_sides(box_math, isa):
    predicted, gt = boxes_with_ties()
    step = 1e-6
    for place in range(4):
        moved = [predicted + sign * step * torch.eye(4, dtype=torch.float64)[place] for sign in (1, -1)]
        up, down = (box_math.float64.giou_loss(boxes.numpy(), gt.numpy(), isa) for boxes in moved)
        found = box_math.float64.giou_loss_gradient(predicted.numpy(), gt.numpy(), isa)[:, place]
        # touching boxes (an overlap of zero) take the side of overlap, as torch's clamp does
        low = torch.maximum(predicted[:, :2], gt[:, :2])
        high = torch.minimum(predicted[:, 2:], gt[:, 2:])
        smooth = ((high - low) != 0).all(dim=1).numpy()
        np.testing.assert_allclose(found[smooth], ((up - down) / (2 * step))[smooth], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [1e-8, 1e-3, 1.0, 1e4, 1e8])
def test_gradients_of_extreme_boxes_are_finite(box_math, isa, dtype, size):
    """Also where a product of areas, or a square of one, is beyond float32."""
    anchors, boxes = (value.to(dtype) for value in neighbours(500, torch.float64, 3))
    anchors, boxes = anchors * size, boxes * size
    functions = functions_of(box_math, dtype)
    found = functions.giou_loss_gradient(boxes.numpy(), anchors.numpy(), isa)
    expected, _ = autograd(_giou_loss, torch.ones(500, dtype=torch.float64), boxes.double(), anchors.double())
    # what the terms of the gradient are made of, some of which cancel: a side over the union
    hull = torch.maximum(anchors, boxes)[:, 2:] - torch.minimum(anchors, boxes)[:, :2]
    area = ((boxes[:, 2:] - boxes[:, :2]).prod(dim=1)).double() + 1e-7
    scale = hull.amax(dim=1).double() / area
    error = (torch.from_numpy(found).double() - expected).abs().amax(dim=1)
    assert (error / scale).max() <= 16 * torch.finfo(dtype).eps
    weights = (1.0, 1.0, 1.0, 1.0)
    upstream = np.ones((500, 4), found.dtype)
    for gradient in functions.encode_gradient(upstream, boxes.numpy(), anchors.numpy(), weights, isa):
        assert np.isfinite(gradient).all()


def test_nan_of_a_prediction_reaches_its_loss_and_gradient(box_math, isa):
    gt = random_boxes(4, torch.float32, 1).numpy()
    for place in range(4):
        predicted = gt + np.float32([[1, 2, 3, 4]])
        predicted[:, place] = NAN
        assert np.isnan(box_math.float32.giou_loss(predicted, gt, isa)).all()
        assert np.isnan(box_math.float32.giou_loss_gradient(predicted, gt, isa)[:, place]).all()


def exact_encoding(gt, anchor, weights):
    result = []
    for axis in range(2):
        size, gt_size = anchor[axis + 2] - anchor[axis], gt[axis + 2] - gt[axis]
        shift = gt[axis] + gt_size / 2 - anchor[axis] - size / 2
        result += [weights[axis] * shift / size, weights[axis + 2] * mpmath.log(gt_size / size)]
    return [result[0], result[2], result[1], result[3]]


def exact_decoding(deltas, anchor, weights):
    low, high = [], []
    for axis in range(2):
        size = anchor[axis + 2] - anchor[axis]
        center = anchor[axis] + size / 2 + deltas[axis] / weights[axis] * size
        half = size * mpmath.exp(min(deltas[axis + 2] / weights[axis + 2], mpmath.log(1000) - mpmath.log(16))) / 2
        low.append(center - half)
        high.append(center + half)
    return low + high


def rows_of(*arrays):
    """Rows as numbers of 40 digits."""
    for row in zip(*(array.tolist() for array in arrays), strict=True):
        yield [[mpmath.mpf(value) for value in part] for part in row]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_coder_against_40_digits(box_math, isa, dtype, weights):
    """A few roundings of the largest number on the way: coordinates up to 2,100, sizes up to 1,100 and 62.5 of them."""
    unit = torch.finfo(dtype).eps
    anchors, boxes = neighbours(200, dtype, 5)
    deltas = random_deltas(200, dtype, 6) * 2
    functions = functions_of(box_math, dtype)
    encoded = functions.encode(boxes.numpy(), anchors.numpy(), weights, isa)
    decoded = functions.decode(deltas.numpy(), anchors.numpy(), weights, CLIP, isa)
    with mpmath.workdps(40):
        exact_weights = [mpmath.mpf(float(torch.tensor(w, dtype=dtype))) for w in weights]
        for i, (gt, anchor, delta) in enumerate(rows_of(boxes, anchors, deltas)):
            reach = max(abs(value) for value in gt + anchor) / min(
                *(box[axis + 2] - box[axis] for box in (gt, anchor) for axis in range(2))
            )
            for found, true, weight in zip(
                encoded[i], exact_encoding(gt, anchor, exact_weights), exact_weights, strict=True
            ):
                assert abs(found - true) <= 4 * unit * weight * (reach + abs(true) / weight + 1)
            exact = exact_decoding(delta, anchor, exact_weights)
            reach = max(abs(value) for value in exact + anchor)
            # the exponent carries the rounding of its quotient
            assert max(abs(a - b) for a, b in zip(decoded[i], exact, strict=True)) <= 8 * unit * reach


def test_the_clip_is_torchvisions(box_math):
    assert box_math.delta_clip == CLIP == anchor_match.DELTA_CLIP
