"""detect against a loop over single candidates, and against torchvision's post-processing."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from retinanet_ext import detect

GRIDS = [(5, 6), (3, 3), (1, 2)]
A = 3
NUM_ANCHORS = A * sum(h * w for h, w in GRIDS)
SIZES = [(60, 90), (48, 64)]


def make_case(num_classes=4, seed=0, dtype=torch.float32, batch=2, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(batch, A * num_classes, h, w, generator=generator) * spread - 2 for h, w in GRIDS]
    deltas = [torch.randn(batch, A * 4, h, w, generator=generator) * 0.3 for h, w in GRIDS]
    corner = torch.rand(NUM_ANCHORS, 2, generator=generator) * 60
    anchors = torch.cat([corner, corner + 10 + torch.rand(NUM_ANCHORS, 2, generator=generator) * 30], dim=1)
    return [level.to(dtype) for level in logits], [level.to(dtype) for level in deltas], anchors


def as_rows(level, columns):
    batch, channels, height, width = level.shape
    level = level.reshape(batch, channels // columns, columns, height, width)
    return level.permute(0, 3, 4, 1, 2).reshape(batch, -1, columns)


def decode(deltas, anchors):
    """The formula of Girshick et al. (2014), with torchvision's limit of the exponent: boxes ``[n, 4]``."""
    size = anchors[:, 2:] - anchors[:, :2]
    center = anchors[:, :2] + 0.5 * size + deltas[:, :2] * size
    half = 0.5 * (deltas[:, 2:].clamp(max=math.log(1000 / 16)).exp() * size)
    return torch.cat([center - half, center + half], dim=1)


def suppresses(a, b, threshold):
    """Whether the IoU of two boxes, rounded at each step as their type has it, is above the threshold (0 / 0 is not),
    and whether that is as clear with other roundings of the boxes."""
    sides = torch.min(a[2:], b[2:]) - torch.max(a[:2], b[:2])
    overlap = sides.clamp(min=0).prod()
    iou = (overlap / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - overlap)).item()
    touching = (sides != 0) & (sides.abs() < 1e-4)
    return iou > threshold, not (touching.any() or 0 < abs(iou - threshold) < 1e-5)


def suppress(boxes, labels, threshold, most, when_clear=lambda clear: None):
    """Rows that stay of boxes in descending order, a pair at a time: at most `most`, of a label no two with an IoU
    above the threshold."""
    kept = []
    for row in range(len(boxes)):
        if len(kept) == most:
            break
        stays = True
        for other in kept:
            if labels[other] == labels[row]:
                above, clear = suppresses(boxes[other], boxes[row], threshold)
                when_clear(clear)
                stays &= not above
        if stays:
            kept.append(row)
    return kept


def detect_loop(logits, deltas, anchors, sizes, score_thresh, topk, nms_thresh, max_detections, clip_first):
    """Candidates as Python tuples, and nothing of this library. Where rounding may decide, it is no example."""
    found = []
    for image in range(len(sizes)):
        chosen, first_anchor = [], 0
        for level_logits, level_deltas in zip(logits, deltas, strict=True):
            num_classes = level_logits.shape[1] * 4 // level_deltas.shape[1]
            rows = as_rows(level_logits, num_classes)[image].float()
            scores = torch.sigmoid(rows)
            candidates = [
                (-rows[n, k].item(), (first_anchor + n) * num_classes + k, scores[n, k].item())
                for n in range(rows.shape[0])
                for k in range(num_classes)
                if scores[n, k] > torch.tensor(score_thresh)
            ]
            chosen += sorted(candidates)[:topk]
            first_anchor += rows.shape[0]
        chosen.sort()
        indices = torch.tensor([index for _, index, _ in chosen], dtype=torch.int64)
        scores = torch.tensor([score for _, _, score in chosen])
        all_deltas = torch.cat([as_rows(level, 4)[image] for level in deltas]).float()
        boxes = decode(all_deltas[indices // num_classes], anchors[indices // num_classes])
        limit = torch.tensor([sizes[image][1], sizes[image][0]] * 2)
        clipped = boxes.clamp(min=0).minimum(limit.float())
        labels = (indices % num_classes).tolist()
        keep = suppress(clipped if clip_first else boxes, labels, nms_thresh, max_detections, assume)
        found.append((clipped[keep], scores[keep], indices[keep] % num_classes, indices[keep]))
    return found


def assert_same_boxes(found, expected):
    """The two exponentials are each within an ulp of the truth, and half of a box's size is one of them times another
    number: coordinates up to 100 agree to four roundings of 100."""
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * 100 * torch.finfo(expected.dtype).eps)


def assert_same_detections(found, expected, max_detections):
    assert found.boxes.shape == (len(expected), max_detections, 4)
    assert (found.labels.dtype, found.indices.dtype, found.counts.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    for image, (boxes, scores, labels, indices) in enumerate(expected):
        count = found.counts[image].item()
        assert count == len(indices)
        assert torch.equal(found.indices[image, :count], indices)
        assert torch.equal(found.labels[image, :count], labels)
        assert_same_boxes(found.boxes[image, :count], boxes)
        # the vectorised and the plain sigmoid of PyTorch differ in the last place
        torch.testing.assert_close(found.scores[image, :count], scores, rtol=2**-22, atol=0)
        assert (found.boxes[image, count:] == 0).all()
        assert (found.scores[image, count:] == 0).all()
        assert (found.labels[image, count:] == -1).all()
        assert (found.indices[image, count:] == -1).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_classes=st.sampled_from([1, 2, 5]),
    coarse=st.booleans(),
    topk=st.sampled_from([0, 1, 7, 1000]),
    nms_thresh=st.sampled_from([0.0, 0.3, 0.5]),
    max_detections=st.sampled_from([0, 1, 10, 300]),
    clip_first=st.booleans(),
)
def test_agrees_with_a_loop(seed, num_classes, coarse, topk, nms_thresh, max_detections, clip_first):
    logits, deltas, anchors = make_case(num_classes, seed)
    if coarse:  # few different logits: ties at every step, also across the cut at top-k
        logits = [level.round() for level in logits]
    expected = detect_loop(logits, deltas, anchors, SIZES, 0.1, topk, nms_thresh, max_detections, clip_first)
    found = detect(
        logits,
        deltas,
        anchors,
        SIZES,
        score_thresh=0.1,
        topk_per_level=topk,
        nms_thresh=nms_thresh,
        max_detections=max_detections,
        clip_before_nms=clip_first,
    )
    assert_same_detections(found, expected, max_detections)


def test_sizes_stop_growing_at_the_limit_of_the_exponent():
    """An anchor grows to 1000 / 16 of its size; all boxes lie within the image, so that nothing else holds them."""
    logits, deltas, anchors = make_case()
    anchors = 250 + (anchors - anchors[:, :2].repeat(1, 2)) / 5  # sides of 2 to 8
    limit = math.log(1000 / 16)
    growth = torch.tensor([limit, 4.0, 4.13, 4.14, 5.0, 50.0, 1e4, math.inf])
    for level in deltas:
        for channel in (2, 3):
            level[:, channel::4] = growth[torch.randint(len(growth), level[:, channel::4].shape)]
    options = {"score_thresh": 0.0, "nms_thresh": 1.0, "max_detections": 4 * NUM_ANCHORS}
    found = detect(logits, deltas, anchors, [(512, 512)] * 2, **options)
    for image in range(2):
        rows = found.indices[image] // 4
        expected = decode(torch.cat([as_rows(level, 4)[image] for level in deltas])[rows], anchors[rows])
        torch.testing.assert_close(found.boxes[image], expected, rtol=0, atol=4 * 512 * 2**-23)
        sides = (found.boxes[image, :, 2:] - found.boxes[image, :, :2]) / (anchors[rows, 2:] - anchors[rows, :2])
        assert sides.max() == pytest.approx(1000 / 16, rel=1e-4)


@pytest.mark.parametrize(("topk", "max_detections"), [(1000, 300), (40, 20)])
def test_torchvision_postprocess_detections(topk, max_detections):
    tv = pytest.importorskip("torchvision.models.detection.retinanet", reason="compares with torchvision")
    from torchvision.models.detection._utils import BoxCoder

    model = SimpleNamespace(
        score_thresh=0.05,
        topk_candidates=topk,
        nms_thresh=0.5,
        detections_per_img=max_detections,
        box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0)),
    )
    for seed in range(5):
        logits, deltas, anchors = make_case(6, seed)
        outputs = {
            "cls_logits": [as_rows(level, 6) for level in logits],
            "bbox_regression": [as_rows(level, 4) for level in deltas],
        }
        split = list(anchors.split([A * h * w for h, w in GRIDS]))
        expected = tv.RetinaNet.postprocess_detections(model, outputs, [split, split], SIZES)
        found = detect(logits, deltas, anchors, SIZES, topk_per_level=topk, max_detections=max_detections)
        for image in range(2):
            count = found.counts[image]
            assert_same_boxes(found.boxes[image, :count], expected[image]["boxes"])
            assert torch.equal(found.labels[image, :count], expected[image]["labels"])
            torch.testing.assert_close(found.scores[image, :count], expected[image]["scores"], rtol=2**-22, atol=0)


def detectron2_inference(logits, deltas, anchors, sizes, num_classes, score_thresh, topk, nms_thresh, most):
    """What detectron2's RetinaNet does with an image's head outputs, and its postprocessing with the result: boxes are
    suppressed as decoded, the best 100 stay, and these are clipped."""
    results = []
    for image, (height, width) in enumerate(sizes):
        chosen, first = [], 0
        for level, level_deltas in zip(logits, deltas, strict=True):
            scores = as_rows(level, num_classes)[image].flatten().sigmoid()
            passing = (scores > score_thresh).nonzero().squeeze(1)
            order = scores[passing].sort(descending=True, stable=True).indices[:topk]
            rows = passing[order] // num_classes
            boxes = decode(as_rows(level_deltas, 4)[image][rows], anchors[first:][rows])
            chosen.append((boxes, scores[passing[order]], passing[order] % num_classes))
            first += as_rows(level_deltas, 4).shape[1]
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        order = scores.sort(descending=True, stable=True).indices
        boxes, scores, labels = boxes[order], scores[order], labels[order]
        keep = suppress(boxes, labels.tolist(), nms_thresh, most)
        limit = torch.tensor([width, height, width, height], dtype=boxes.dtype)
        results.append((boxes[keep].clamp(min=0).minimum(limit), scores[keep], labels[keep]))
    return results


@pytest.mark.parametrize("seed", range(5))
def test_detectron2_inference(seed):
    logits, deltas, anchors = make_case(6, seed, spread=3.0)
    expected = detectron2_inference(logits, deltas, anchors, SIZES, 6, 0.05, 60, 0.5, 100)
    options = {"topk_per_level": 60, "max_detections": 100, "clip_before_nms": False}
    found = detect(logits, deltas, anchors, SIZES, **options)
    for image, (boxes, scores, labels) in enumerate(expected):
        count = found.counts[image]
        assert count == len(labels) > 50
        assert torch.equal(found.labels[image, :count], labels)
        assert_same_boxes(found.boxes[image, :count], boxes)
        torch.testing.assert_close(found.scores[image, :count], scores, rtol=2**-22, atol=0)


def test_layouts_agree_to_the_bit():
    logits, deltas, anchors = make_case()
    expected = detect(logits, deltas, anchors, SIZES)
    assert expected.counts.min() > 5
    channels_last = [
        [level.contiguous(memory_format=torch.channels_last) for level in levels] for levels in (logits, deltas)
    ]
    rows = [[as_rows(level, 4) for level in levels] for levels in (logits, deltas)]
    strided = [[lv.repeat_interleave(2, dim=3)[..., ::2] for lv in levels] for levels in (logits, deltas)]
    for other_logits, other_deltas in (channels_last, rows, strided):
        found = detect(other_logits, other_deltas, anchors, SIZES)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for sizes in (torch.tensor(SIZES), torch.tensor(SIZES, dtype=torch.int32), torch.tensor(SIZES).float()):
        found = detect(logits, deltas, anchors.expand(2, -1, -1), sizes)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_one_tensor_is_one_level():
    logits, deltas, anchors = make_case()
    rows = (
        torch.cat([as_rows(level, 4) for level in logits], 1),
        torch.cat([as_rows(lv, 4) for lv in deltas], 1),
    )
    found = detect(*rows, anchors, SIZES, topk_per_level=9)
    assert found.counts.max() <= 9
    whole = detect(*rows, anchors, SIZES)
    by_level = detect(logits, deltas, anchors, SIZES)
    assert all(torch.equal(a, b) for a, b in zip(whole, by_level, strict=True))


def single(logits, anchors=None, **options):
    """detect for one image of 100 x 100, one level [n, K], deltas of zero."""
    logits = torch.tensor(logits)
    if anchors is None:  # far from each other
        corner = torch.arange(len(logits)).float()[:, None] * 4
        anchors = torch.cat([corner, corner, corner + 2, corner + 2], dim=1)
    deltas = torch.zeros(1, len(logits), 4)
    return detect(logits[None], deltas, torch.as_tensor(anchors), [(100, 100)], **options)


def test_score_threshold_is_strict():
    assert single([[0.0]], score_thresh=0.5).counts.tolist() == [0]  # sigmoid(0) is 0.5
    assert single([[1e-6]], score_thresh=0.5).counts.tolist() == [1]
    assert single([[-200.0], [200.0]], score_thresh=0.0).scores[0, 0] == 1
    assert single([[-200.0]], score_thresh=0.0).counts.tolist() == [0]  # underflows to 0


def test_order_and_ties_are_by_logit_then_index():
    # all three have a float32 score of exactly 1: the logit still orders them
    assert single([[30.0], [50.0], [40.0]]).indices[0, :3].tolist() == [1, 2, 0]
    tied = [[1.0, 2.0], [2.0, 1.0], [-0.0, 0.0]]
    assert single(tied).indices[0, :6].tolist() == [1, 2, 0, 3, 4, 5]
    assert single(tied, topk_per_level=1).indices[0, :2].tolist() == [1, -1]
    assert single([[1.0]] * 20, topk_per_level=7, max_detections=7).indices[0].tolist() == list(range(7))


def test_nan_and_infinite_logits():
    found = single([[float("nan")], [float("inf")], [0.0], [float("-inf")]])
    assert found.indices[0, :3].tolist() == [1, 2, -1]
    assert found.scores[0, :2].tolist() == [1.0, 0.5]


def test_suppression_is_within_a_class():
    same = torch.tensor([[0.0, 0, 50, 50], [0, 0, 50, 50]])
    found = single([[3.0, 2.0], [2.5, 1.0]], same)
    assert found.indices[0, :3].tolist() == [0, 1, -1]
    assert found.labels[0, :2].tolist() == [0, 1]


def test_clipping_before_or_after_suppression():
    # clipped to the image the two are one box; unclipped their IoU is 0.2
    anchors = torch.tensor([[50.0, 0, 100, 100], [50.0, 0, 300, 100]])
    assert single([[1.0], [0.0]], anchors).indices[0, :2].tolist() == [0, -1]
    found = single([[1.0], [0.0]], anchors, clip_before_nms=False)
    assert found.indices[0, :2].tolist() == [0, 1]
    assert found.boxes[0, :2].tolist() == [[50.0, 0, 100, 100]] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_scored_and_decoded_in_float32(dtype):
    logits, deltas, anchors = make_case(dtype=dtype, spread=1.0)  # bfloat16 has ties in plenty
    found = detect(logits, deltas, anchors, SIZES)
    expected = detect([lv.float() for lv in logits], [lv.float() for lv in deltas], anchors, SIZES)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_float64_stays_float64():
    logits, deltas, anchors = make_case(dtype=torch.float64)
    found = detect(logits, deltas, anchors.double(), SIZES)
    assert found.boxes.dtype == found.scores.dtype == torch.float64


def test_nothing_to_detect_and_empty_inputs():
    logits, deltas, anchors = make_case()
    found = detect([level - 1000 for level in logits], deltas, anchors, SIZES, max_detections=5)
    assert found.counts.tolist() == [0, 0]
    assert (found.indices == -1).all()
    none = detect([lv[:0] for lv in logits], [lv[:0] for lv in deltas], anchors, [], max_detections=5)
    assert none.boxes.shape == (0, 5, 4)
    no_anchors = detect(torch.zeros(2, 0, 3), torch.zeros(2, 0, 4), torch.zeros(0, 4), SIZES, max_detections=5)
    assert no_anchors.counts.tolist() == [0, 0]
    empty_level = [torch.zeros(2, A * 4, 0, 7)]
    found = detect([*logits, *empty_level], [*deltas, *empty_level], anchors, SIZES)
    assert torch.equal(found.indices, detect(logits, deltas, anchors, SIZES).indices)


def test_results_carry_no_graph():
    logits, deltas, anchors = make_case()
    found = detect([lv.requires_grad_() for lv in logits], [lv.requires_grad_() for lv in deltas], anchors, SIZES)
    assert not any(tensor.requires_grad for tensor in found)


def test_vmap_is_refused_in_plain_words():
    logits, deltas = torch.zeros(2, 1, 5, 3), torch.zeros(1, 5, 4)
    with pytest.raises(RuntimeError, match="detect: vmap is not supported"):
        torch.func.vmap(lambda x: detect(x, deltas, torch.zeros(5, 4), SIZES[:1]))(logits)


LOGITS, DELTAS, ANCHORS = make_case()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(cls_logits=3), TypeError, "cls_logits: expected a tensor or a list of tensors, got int"),
        (dict(cls_logits=LOGITS[:2]), ValueError, "expected as many levels.*got 2 and 3"),
        (dict(cls_logits=[], box_deltas=[]), ValueError, "at least one"),
        (
            dict(cls_logits=[lv.long() for lv in LOGITS]),
            TypeError,
            r"cls_logits\[0\]: expected a floating tensor",
        ),
        (
            dict(cls_logits=[LOGITS[0].half(), *LOGITS[1:]]),
            TypeError,
            r"cls_logits\[1\]: expected torch.float16",
        ),
        (
            dict(cls_logits=[LOGITS[0][:, :-1], *LOGITS[1:]]),
            ValueError,
            r"cls_logits\[0\], box_deltas\[0\]: expected",
        ),
        (
            dict(cls_logits=[LOGITS[0][:, :9], *LOGITS[1:]]),
            ValueError,
            r"same number of classes.*got \[3, 4\]",
        ),
        (dict(box_deltas=[DELTAS[0][:1], *DELTAS[1:]]), ValueError, "expected a batch of 2 at each level"),
        (dict(anchors=ANCHORS[1:]), ValueError, "anchors: expected 123, as many as box_deltas, got 122"),
        (dict(image_sizes=SIZES[:1]), ValueError, "image_sizes: expected 2 pairs"),
        (
            dict(image_sizes=torch.zeros(2, 3)),
            ValueError,
            r"image_sizes: expected shape \[2, 2\], got \[2, 3\]",
        ),
        (dict(topk_per_level=-1), ValueError, "topk_per_level: expected at least 0, got -1"),
        (dict(max_detections=-1), ValueError, "max_detections: expected at least 0, got -1"),
    ],
)
def test_errors_name_the_argument(change, error, text):
    arguments = dict(cls_logits=LOGITS, box_deltas=DELTAS, anchors=ANCHORS, image_sizes=SIZES) | change
    with pytest.raises(error, match="detect: .*" + text):
        detect(**arguments)
