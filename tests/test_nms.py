"""nms, batched_nms and batched_nms_padded against a loop over single numbers, and against torchvision."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retinanet_ext import batched_nms, batched_nms_padded, nms


def arithmetic(boxes, threshold):
    """The type an oracle computes IoU in. float64 for boxes and thresholds of whole quarters, where no operation but
    the division is rounded, and no division so that it meets the threshold: types cannot differ there. Elsewhere that
    which the operator is to compute in."""
    dyadic = float(threshold * 4).is_integer() and bool(((boxes * 4).frac() == 0).all() and (boxes.abs() < 256).all())
    return np.float64 if dyadic or boxes.dtype == torch.float64 else np.float32


def nms_loop(boxes, scores, threshold, labels=None):
    """Greedy suppression a pair at a time: the order, the ties and the NaN rules, spelled out."""
    compute = arithmetic(boxes, threshold)
    boxes = boxes.double().numpy().astype(compute)
    scores = scores.double().tolist()
    labels = [0] * len(scores) if labels is None else labels.tolist()

    def rank(row):  # NaN first, then by descending score; -0.0 == 0.0; then the lower row
        return (0, 0.0, row) if math.isnan(scores[row]) else (1, -scores[row], row)

    kept = []
    for row in sorted(range(len(scores)), key=rank):
        if all(labels[row] != labels[k] or not iou_above(boxes[k], boxes[row], threshold, compute) for k in kept):
            kept.append(row)
    return kept


def iou_above(a, b, threshold, compute):
    with np.errstate(all="ignore"):
        area_a = compute(a[2] - a[0]) * compute(a[3] - a[1])
        area_b = compute(b[2] - b[0]) * compute(b[3] - b[1])
        w = np.maximum(compute(0), compute(np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])))
        h = np.maximum(compute(0), compute(np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])))
        iou = compute(w * h) / compute(compute(area_a + area_b) - compute(w * h))
    return float(iou) > threshold  # as doubles; False for NaN


coordinates = st.one_of(st.integers(0, 8).map(float), st.sampled_from([math.nan, math.inf, -math.inf, 0.1, 1e20]))
score_values = st.sampled_from([0.0, -0.0, 0.5, 0.5, 0.25, 1.0, -1.0, math.nan, math.inf, -math.inf])


@st.composite
def candidates(draw):
    num = draw(st.integers(0, 14))
    odd = draw(st.booleans())  # any coordinates, or boxes on a lattice
    if odd:
        rows = draw(st.lists(st.tuples(*[coordinates] * 4), min_size=num, max_size=num))
    else:
        lattice = st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 5), st.integers(1, 5))
        rows = [(x, y, x + w, y + h) for x, y, w, h in draw(st.lists(lattice, min_size=num, max_size=num))]
    scores = draw(st.lists(score_values, min_size=num, max_size=num))
    labels = draw(st.lists(st.integers(0, 2), min_size=num, max_size=num))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    boxes = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).to(dtype)
    return boxes, torch.tensor(scores, dtype=torch.float64).to(dtype), torch.tensor(labels, dtype=torch.int64)


@settings(max_examples=400, deadline=None)
@given(candidates(), st.sampled_from([0.0, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.7, 1.0]))
def test_agrees_with_a_loop_over_pairs(case, threshold):
    boxes, scores, labels = case
    found = nms(boxes, scores, threshold)
    assert found.dtype == torch.int64
    assert found.tolist() == nms_loop(boxes, scores, threshold)
    assert batched_nms(boxes, scores, labels, threshold).tolist() == nms_loop(boxes, scores, threshold, labels)


def random_case(num, seed=0, dtype=torch.float32, extent=300.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=generator, dtype=torch.float64) * extent
    size = 5 + torch.rand(num, 2, generator=generator, dtype=torch.float64) * 80
    scores = torch.randperm(num, generator=generator).double() / num  # all different
    return torch.cat([corner, corner + size], dim=1).to(dtype), scores.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 0.999])
def test_torchvision_nms(dtype, threshold):
    tv_ops = pytest.importorskip("torchvision.ops", reason="compares with torchvision")
    for num in (1, 255, 256, 257, 1500):  # either side of the tile of the reference
        boxes, scores = random_case(num, seed=num, dtype=dtype)
        assert torch.equal(nms(boxes, scores, threshold), tv_ops.nms(boxes, scores, threshold))


def test_torchvision_batched_nms_where_it_compares_labels():
    tv_ops = pytest.importorskip("torchvision.ops", reason="compares with torchvision")
    boxes, scores = random_case(2000, seed=1)
    labels = torch.randint(0, 7, (2000,), generator=torch.Generator().manual_seed(2))
    expected = tv_ops.boxes._batched_nms_vanilla(boxes, scores, labels, 0.5)
    assert torch.equal(batched_nms(boxes, scores, labels, 0.5), expected)


def test_labels_are_compared_exactly_not_by_moving_the_boxes():
    # 1,000 classes times coordinates of some thousands: an offset in float32 would round the boxes
    boxes = torch.tensor([[0.1, 0.1, 10.3, 10.7], [0.1, 0.1, 10.3, 5.4], [4000.0, 4000.0, 4001.0, 4001.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    iou = nms_threshold_between(boxes[0], boxes[1])
    for label in (0, 999, -5, 2**40):
        labels = torch.full((3,), label)
        assert batched_nms(boxes, scores, labels, math.nextafter(iou, 0)).tolist() == [0, 2]
        assert batched_nms(boxes, scores, labels, iou).tolist() == [0, 1, 2]
    assert batched_nms(boxes, scores, torch.tensor([0, 1, 0]), 0.0).tolist() == [0, 1, 2]


def nms_threshold_between(a, b):
    """The float32 IoU of two boxes as a double."""
    overlap = torch.min(a[2:], b[2:]) - torch.max(a[:2], b[:2])
    inter = overlap[0] * overlap[1]
    area = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return (inter / (area[0] + area[1] - inter)).item()


def test_threshold_is_compared_as_a_double():
    scores = torch.tensor([0.9, 0.8])
    three_tenths = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]])  # float32(0.3) is above 0.3
    assert nms(three_tenths, scores, 0.3).tolist() == [0]
    seven_tenths = torch.tensor([[0.0, 0, 10, 1], [0, 0, 7, 1]])  # float32(0.7) is below 0.7
    assert nms(seven_tenths, scores, 0.7).tolist() == [0, 1]
    assert nms(seven_tenths.double(), scores.double(), 0.7).tolist() == [0, 1]  # equal is not above


def test_equal_scores_keep_their_order():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(5, 1) + torch.arange(5)[:, None] * 100
    assert nms(boxes, torch.tensor([0.5, 0.7, 0.5, 0.7, 0.5]), 0.5).tolist() == [1, 3, 0, 2, 4]
    assert nms(boxes, torch.tensor([-0.0, 0.0, -0.0, 0.0, -0.0]), 0.5).tolist() == [0, 1, 2, 3, 4]
    same = boxes[:1].repeat(5, 1)
    assert nms(same, torch.full((5,), 0.3), 0.5).tolist() == [0]
    nan = float("nan")
    assert nms(boxes, torch.tensor([0.5, nan, math.inf, nan, 0.1]), 0.5).tolist() == [1, 3, 2, 0, 4]


def test_a_box_of_nan_neither_suppresses_nor_is_suppressed():
    nan = float("nan")
    boxes = torch.tensor([[0.0, 0, nan, 10], [0, 0, 10, 10], [nan, nan, nan, nan], [0, 0, 10, 10]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7, 0.6]), 0.1).tolist() == [0, 1, 2]
    empty = torch.zeros(2, 4)  # no area: 0 / 0
    assert nms(empty, torch.tensor([0.1, 0.2]), 0.0).tolist() == [1, 0]


def test_more_boxes_than_torchvisions_index_holds():
    num = 370_800
    corner = (torch.arange(num) % 30 * 10).float()[:, None]
    boxes = torch.cat([corner, corner, corner + 9, corner + 9], dim=1)
    scores = torch.arange(num, 0, -1, dtype=torch.float64)
    assert nms(boxes.double(), scores, 0.5).tolist() == list(range(30))


def keep_in_places(corner, side, labels):
    """bool ``[places, n]``: greedy suppression above an IoU of 1/8 in many places at once, best boxes first, in
    integers: the best box that is left of each place stays and removes others, until none is left."""
    kept, left = np.zeros(labels.shape, bool), np.ones(labels.shape, bool)
    places, area = np.arange(len(labels)), side.prod(axis=2)
    while left.any():
        best = left.argmax(axis=1)  # the first
        some = left[places, best]
        kept[places[some], best[some]] = True
        at, size = corner[places, best][:, None], side[places, best][:, None]
        overlap = np.minimum(corner + side, at + size) - np.maximum(corner, at)
        inter = overlap.clip(0).prod(axis=2)
        above = 8 * inter > area + size.prod(axis=2) - inter
        left &= ~(above & (labels == labels[places, best, None]))
    return kept


def test_400_000_boxes():
    """In 2,000 places that do not meet, on whole quarters of a pixel, where rounding decides nothing."""
    places, each = 2000, 200
    num = places * each
    draw = np.random.default_rng(0)
    corner, side = draw.integers(0, 64, (places, each, 2)), draw.integers(32, 96, (places, each, 2))
    labels = draw.integers(0, 2, (places, each))
    row = draw.permutation(num).reshape(places, each)  # of the operator's input
    scores = -np.sort(-draw.permutation(num).reshape(places, each), axis=1)
    place = np.stack(np.divmod(np.arange(places), 50), axis=1)[:, None] * 160  # 40 pixels apart
    inputs = np.empty((num, 4), np.float32), np.empty(num, np.float32), np.empty(num, np.int64)
    inputs[0][row] = np.concatenate([place + corner, place + corner + side], axis=2) / 4
    inputs[1][row], inputs[2][row] = scores, labels
    boxes, score_of, label_of = map(torch.from_numpy, inputs)
    for found, kept in (
        (nms(boxes, score_of, 0.125), keep_in_places(corner, side, np.zeros_like(labels))),
        (batched_nms(boxes, score_of, label_of, 0.125), keep_in_places(corner, side, labels)),
    ):
        expected = row[kept][np.argsort(-scores[kept])]
        assert len(expected) > 2 * places
        assert torch.equal(found, torch.from_numpy(expected))


def test_the_oracle_computes_in_float64_on_quarters_alone():
    lattice = torch.tensor([[0.0, 0.25, 5, 8.75]], dtype=torch.bfloat16)
    assert arithmetic(lattice, 0.25) is arithmetic(lattice.double(), 0.3) is np.float64
    for boxes, threshold in ((lattice, 0.3), (lattice + 0.1, 0.5), (lattice * math.nan, 0.5), (lattice * 1e9, 0.5)):
        assert arithmetic(boxes.float(), threshold) is np.float32


def test_labels_of_other_types():
    boxes, scores = random_case(50, seed=4)
    labels = torch.arange(50) % 3
    expected = batched_nms(boxes, scores, labels, 0.3)
    for dtype in (torch.int32, torch.uint8, torch.float32, torch.float64):
        assert torch.equal(batched_nms(boxes, scores, labels.to(dtype), 0.3), expected)
    no_label = torch.full((50,), float("nan"))
    assert len(batched_nms(boxes, scores, no_label, 0.0)) == 50


def test_strided_and_differentiable_inputs():
    boxes, scores = random_case(100, seed=5)
    expected = nms(boxes, scores, 0.4)
    strided = boxes.t().contiguous().t().requires_grad_()
    found = nms(strided, scores.repeat_interleave(2)[::2].requires_grad_(), 0.4)
    assert torch.equal(found, expected)


def test_empty_inputs():
    for dtype in (torch.float32, torch.float16):
        found = nms(torch.zeros(0, 4, dtype=dtype), torch.zeros(0, dtype=dtype), 0.5)
        assert found.shape == (0,)
        assert found.dtype == torch.int64
    found = batched_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), 0.5)
    assert found.shape == (0,)
    assert found.dtype == torch.int64
    padded = batched_nms_padded(torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.long), 0.5, 3)
    assert padded.indices.tolist() == [[-1] * 3] * 2
    assert padded.counts.tolist() == [0, 0]


def test_padded():
    boxes, scores = zip(*(random_case(80, seed=seed) for seed in range(3)), strict=True)
    boxes, scores = torch.stack(boxes), torch.stack(scores)
    labels = torch.randint(0, 3, (3, 80), generator=torch.Generator().manual_seed(1))
    num_valid = torch.tensor([80, 0, 37], dtype=torch.int32)
    for max_detections in (0, 5, 200):
        for valid in (None, num_valid, num_valid.long()):
            found = batched_nms_padded(boxes, scores, labels, 0.2, max_detections, valid)
            assert found.indices.shape == (3, max_detections)
            assert found.indices.dtype == torch.int64
            assert found.counts.dtype == torch.int32
            for image in range(3):
                last = 80 if valid is None else valid[image]
                keep = batched_nms(boxes[image, :last], scores[image, :last], labels[image, :last], 0.2)
                keep = keep[:max_detections].tolist()
                assert found.counts[image] == len(keep)
                assert found.indices[image].tolist() == keep + [-1] * (max_detections - len(keep))


@pytest.mark.parametrize(
    ("boxes", "scores", "text"),
    [
        (torch.zeros(3, 5), torch.zeros(3), "boxes should have 4 elements in dimension 1, got 5"),
        (torch.zeros(3, 4), torch.zeros(3, 1), "scores should be a 1d tensor, got 2D"),
        (torch.zeros(12), torch.zeros(3), "boxes should be a 2d tensor, got 1D"),
        (
            torch.zeros(3, 4),
            torch.zeros(2),
            "boxes and scores should have same number of elements in dimension 0, got 3 and 2",
        ),
    ],
)
def test_wrong_shapes_raise_what_torchvision_raises(boxes, scores, text):
    for call in (nms, lambda b, s, t: batched_nms(b, s, torch.zeros(3), t)):
        with pytest.raises(RuntimeError, match=re.escape(text)):
            call(boxes, scores, 0.5)
    try:
        from torchvision.ops import nms as torchvisions
    except ImportError:
        return
    with pytest.raises(RuntimeError, match=re.escape(text)):
        torchvisions(boxes, scores, 0.5)


def test_other_errors():
    boxes, scores, labels = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"batched_nms: boxes and idxs .* got 3 and \[2\]"):
        batched_nms(boxes, scores, labels[:2], 0.5)
    with pytest.raises(RuntimeError, match="nms: boxes should have the same type as scores"):
        nms(boxes, scores.double(), 0.5)
    with pytest.raises(TypeError, match=r"nms: boxes: expected a floating tensor, got .*int64"):
        nms(boxes.long(), scores, 0.5)
    with pytest.raises(TypeError, match="batched_nms: idxs: expected a tensor, got list"):
        batched_nms(boxes, scores, [0, 0, 0], 0.5)
    with pytest.raises(ValueError, match="nms: scores: expected all tensors on one device"):
        nms(boxes, scores.to("meta"), 0.5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(boxes=torch.zeros(3, 4)), ValueError, r"boxes: expected shape \[B, N, 4\], got \[3, 4\]"),
        (dict(scores=torch.zeros(2, 4)), ValueError, r"scores: expected shape \[2, 3\], got \[2, 4\]"),
        (dict(scores=torch.zeros(2, 3).double()), TypeError, "scores: expected torch.float32.*float64"),
        (
            dict(labels=torch.zeros(2, 3)),
            TypeError,
            "labels: expected a tensor of integers, got torch.float32",
        ),
        (dict(labels=torch.zeros(2, 2).long()), ValueError, r"labels: expected shape \[2, 3\]"),
        (dict(max_detections=-1), ValueError, "max_detections: expected at least 0, got -1"),
        (dict(num_valid=torch.zeros(2)), TypeError, "num_valid: expected a tensor of int32 or int64"),
        (dict(num_valid=torch.zeros(3).int()), ValueError, r"num_valid: expected shape \[2\], got \[3\]"),
    ],
)
def test_padded_errors(change, error, text):
    arguments = dict(
        boxes=torch.zeros(2, 3, 4),
        scores=torch.zeros(2, 3),
        labels=torch.zeros(2, 3, dtype=torch.long),
        iou_threshold=0.5,
        max_detections=2,
    )
    with pytest.raises(error, match="batched_nms_padded: " + text):
        batched_nms_padded(**(arguments | change))


def test_vmap_is_refused_in_plain_words():
    boxes, scores = torch.rand(2, 5, 4), torch.rand(2, 5)
    labels = torch.zeros(5, dtype=torch.long)
    for call in (lambda b, s: nms(b, s, 0.5), lambda b, s: batched_nms(b, s, labels, 0.5)):
        with pytest.raises(RuntimeError, match="nms: vmap is not supported"):
            torch.func.vmap(call)(boxes, scores)
    with pytest.raises(RuntimeError, match="batched_nms_padded: vmap is not supported"):
        torch.func.vmap(lambda b: batched_nms_padded(b, scores[:1], labels[None], 0.5, 3))(boxes[:, None])
