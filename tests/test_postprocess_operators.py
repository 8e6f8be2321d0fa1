"""The compiled detect: many candidates, ties, thresholds, types, threads; registrations; raw arguments."""

import pytest
import torch
from logit_kinds import LOGIT_KINDS, logits_of_kind
from started_anew import on_instruction_sets

from retinanet_ext import detect, reference
from retinanet_ext.models.anchors import AnchorGenerator

OPS = torch.ops.retinanet_ext
A, K = 9, 7
IMAGE, GRIDS = (64, 96), ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))
SIZES = [(60, 90), (64, 33)]


def make_case(dtype=torch.float32, spread=2.0, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(batch, A * K, *grid, generator=generator) * spread - 1 for grid in GRIDS]
    deltas = [torch.randn(batch, A * 4, *grid, generator=generator) * 0.3 for grid in GRIDS]
    anchors = AnchorGenerator()(IMAGE, GRIDS)
    return [level.to(dtype) for level in logits], [level.to(dtype) for level in deltas], anchors


def assert_same(found, expected):
    """What is found is the same; boxes and scores but for the roundings of two exponentials."""
    for name in ("labels", "indices", "counts"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    eps = torch.finfo(expected.boxes.dtype).eps
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=4 * 512 * eps)
    torch.testing.assert_close(found.scores, expected.scores, rtol=2 * torch.finfo(expected.scores.dtype).eps, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_types_and_layouts(dtype, layout):
    logits, deltas, anchors = make_case(dtype)
    expected = reference.detect(logits, deltas, anchors, SIZES, topk_per_level=50)
    if layout == "channels_last":
        logits, deltas = ([lv.contiguous(memory_format=torch.channels_last) for lv in v] for v in (logits, deltas))
    if layout == "rows":
        logits = [reference.focal_loss.anchor_rows(level, K) for level in logits]
        deltas = [reference.focal_loss.anchor_rows(level, 4) for level in deltas]
    assert_same(detect(logits, deltas, anchors, SIZES, topk_per_level=50), expected)


MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.float64, torch.bfloat16),
]


@pytest.mark.parametrize(("logit_type", "delta_type"), MIXED)
def test_logits_and_deltas_of_two_types(logit_type, delta_type):
    logits, deltas, anchors = make_case()
    logits, deltas = [level.to(logit_type) for level in logits], [level.to(delta_type) for level in deltas]
    options = {"topk_per_level": 50, "max_detections": 60}
    assert_same(
        detect(logits, deltas, anchors, SIZES, **options), reference.detect(logits, deltas, anchors, SIZES, **options)
    )


def test_each_level_may_lie_in_its_own_way():
    logits, deltas, anchors = make_case()
    expected = detect(logits, deltas, anchors, SIZES)
    last = torch.channels_last
    logits[0], deltas[1] = logits[0].contiguous(memory_format=last), deltas[1].contiguous(memory_format=last)
    logits[2], deltas[2] = (
        reference.focal_loss.anchor_rows(level[2], width) for level, width in ((logits, K), (deltas, 4))
    )
    logits[3] = logits[3].repeat_interleave(2, dim=3)[..., ::2]
    found = detect(logits, deltas, anchors, SIZES)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_anchors_of_each_image():
    logits, deltas, anchors = make_case()
    others = anchors.flip(0) + torch.tensor([3.0, -2.0, 5.0, 1.0])
    found = detect(logits, deltas, torch.stack([anchors, others]), SIZES)
    for image, own in enumerate((anchors, others)):
        alone = [[level[image : image + 1] for level in levels] for levels in (logits, deltas)]
        expected = detect(*alone, own, SIZES[image : image + 1])
        assert all(torch.equal(a[image : image + 1], b) for a, b in zip(found, expected, strict=True))
    assert_same(found, reference.detect(logits, deltas, torch.stack([anchors, others]), SIZES))


@pytest.mark.parametrize("clip_before_nms", [True, False])
def test_deltas_and_anchors_that_are_no_numbers(clip_before_nms):
    """NaN stays NaN, infinities end at the image's sides, and neither takes part in suppression but as the reference
    has it."""
    logits, deltas, anchors = make_case()
    generator = torch.Generator().manual_seed(1)
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e30, -1e30])
    for level in deltas:
        places = torch.rand(level.shape, generator=generator) < 0.1
        level[places] = odd[torch.randint(len(odd), (int(places.sum()),), generator=generator)]
    anchors[::50, 0], anchors[7::50, 2], anchors[9::50] = odd[0], odd[1], odd[2]
    options = {"max_detections": 500, "clip_before_nms": clip_before_nms}
    found = detect(logits, deltas, anchors, SIZES, **options)
    expected = reference.detect(logits, deltas, anchors, SIZES, **options)
    for name in ("labels", "indices", "counts"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.boxes.isnan().any()
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=4 * 512 * 2**-23, equal_nan=True)


def test_no_class_is_nothing_found():
    _logits, deltas, anchors = make_case()
    logits = [torch.zeros(2, 0, *grid) for grid in GRIDS]
    for function in (detect, reference.detect):
        found = function(logits, deltas, anchors, SIZES, max_detections=3)
        assert found.boxes.shape == (2, 3, 4)
        assert found.counts.tolist() == [0, 0]
        assert not found.boxes.any()
        assert not found.scores.any()
        assert (found.labels == -1).all()
        assert (found.indices == -1).all()


def test_all_candidates_are_of_one_class_of_many():
    logits, deltas, anchors = make_case()
    logits = [level.view(2, A, K, *level.shape[2:]).clone() for level in logits]
    for level in logits:
        level[:, :, :3], level[:, :, 4:] = -30, -30
        level[:, :, 3] += 8
    logits = [level.flatten(1, 2) for level in logits]
    found = detect(logits, deltas, anchors, SIZES)
    assert_same(found, reference.detect(logits, deltas, anchors, SIZES))
    assert (found.labels[found.indices >= 0] == 3).all()
    assert (found.counts > 0).all()


@pytest.mark.parametrize("logits_of", LOGIT_KINDS)
@pytest.mark.parametrize("topk", [1, 30, 600, 1500, 10**9])
def test_more_candidates_than_are_wanted(logits_of, topk):
    """The finest level has 6,048 of them, a thread thins them out as it goes; of equal ones the lower index stays."""
    logits, deltas, anchors = make_case()
    logits = logits_of_kind(logits_of, logits)
    options = {"score_thresh": 0.01, "topk_per_level": topk, "max_detections": 400}
    assert_same(
        detect(logits, deltas, anchors, SIZES, **options), reference.detect(logits, deltas, anchors, SIZES, **options)
    )


@pytest.mark.parametrize("score_thresh", [-1.0, 0.0, 1e-30, 0.05, 0.5, 0.999999, 1.0, 2.0, float("nan")])
def test_thresholds(score_thresh):
    logits, deltas, anchors = make_case(spread=40.0)
    logits[0][0, 0, 0, :3] = torch.tensor([float("-inf"), -200.0, float("inf")])
    options = {"score_thresh": score_thresh, "topk_per_level": 300}
    assert_same(
        detect(logits, deltas, anchors, SIZES, **options), reference.detect(logits, deltas, anchors, SIZES, **options)
    )


def test_scores_at_the_threshold_are_left_out():
    """Exactly at it, and the next number above."""
    _logits, _deltas, anchors = make_case()
    flat = torch.full((1, len(anchors), K), -9.0)
    flat[0, 0, 0], flat[0, 9, 1] = 0.0, 1e-6
    rows = torch.zeros(1, len(anchors), 4)
    assert detect(flat, rows, anchors, [(64, 96)], score_thresh=0.5).indices[0, :2].tolist() == [9 * K + 1, -1]


def test_any_number_of_threads(num_threads):
    case = make_case(batch=3)
    results = []
    for threads in (1, 2, 5):
        num_threads(threads)
        results.append(detect(*case, [(64, 96)] * 3, topk_per_level=200))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def found_in_both_types():
    options = {"score_thresh": 0.02, "topk_per_level": 300}
    return [tuple(detect(*make_case(dtype), SIZES, **options)) for dtype in (torch.float32, torch.float64)]


def test_every_instruction_set_finds_the_same(tmp_path):
    """Which candidates, and of them which stay; decoding rounds as the instructions have it."""
    expected = found_in_both_types()
    for results in on_instruction_sets(found_in_both_types, tmp_path).values():
        for mine, right in zip(results, expected, strict=True):
            assert_same(reference.Detections(*mine), reference.Detections(*right))


def test_empty_levels_and_batches():
    logits, deltas, anchors = make_case()
    expected = detect(logits, deltas, anchors, SIZES)
    none = [torch.zeros(2, A * channels, 0, 5) for channels in (K, 4)]
    found = detect([none[0], *logits], [none[1], *deltas], anchors, SIZES)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found = detect([level[:0] for level in logits], [level[:0] for level in deltas], anchors, [])
    assert found.boxes.shape == (0, 300, 4)


def raw_arguments():
    logits, deltas, anchors = make_case()
    return logits, deltas, anchors, None, [60.0, 90.0, 64.0, 33.0], K, 0.05, 100, 0.5, 20, True


def test_opcheck():
    torch.library.opcheck(OPS.detect.default, raw_arguments())


def test_compiles_as_one_graph_and_exports():
    class Detect(torch.nn.Module):
        def forward(self, logits, deltas, anchors, sizes):
            return tuple(detect(logits, deltas, anchors, sizes, max_detections=20))

    logits, deltas, anchors = make_case()
    arguments = (logits, deltas, anchors, torch.tensor(SIZES))
    expected = detect(*arguments, max_detections=20)
    compiled = torch.compile(Detect(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Detect(), arguments).module()
    for module in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(module(*arguments), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments[:3], SIZES), expected, strict=True))


def test_compiles_with_inductor_between_other_operations():
    def best(logits, deltas, anchors, sizes):
        found = detect([level * 2 for level in logits], deltas, anchors, sizes, max_detections=20)
        return found.boxes / 2, found.scores.sum(), found.labels + 1

    logits, deltas, anchors = make_case()
    arguments = (logits, deltas, anchors, torch.tensor(SIZES))
    compiled = torch.compile(best, fullgraph=True)
    for mine, right in zip(compiled(*arguments), best(*arguments), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=0)


def test_exports_with_any_batch():
    class Detect(torch.nn.Module):
        def forward(self, logits, deltas, anchors, sizes):
            return tuple(detect(logits, deltas, anchors, sizes, max_detections=20))

    logits, deltas, anchors = make_case()
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    dynamic_shapes = ([batch] * 5, [batch] * 5, None, batch)
    arguments = (logits, deltas, anchors, torch.tensor(SIZES))
    program = torch.export.export(Detect(), arguments, dynamic_shapes=dynamic_shapes).module()
    for count in (1, 3):
        logits, deltas, anchors = make_case(seed=count, batch=count)
        sizes = torch.tensor([(64, 80)] * count)
        expected = detect(logits, deltas, anchors, sizes, max_detections=20)
        found = program(logits, deltas, anchors, sizes)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: []}, "cls_logits and box_deltas must hold as many levels, at least one, and hold 0 and 5"),
        ({0: [torch.zeros(2, A * K, *grid).int() for grid in GRIDS]}, "cls_logits must share one floating dtype"),
        ({1: [torch.zeros(2, A * 3, *grid) for grid in GRIDS]}, "each level must be .* and level 0 is"),
        ({2: torch.zeros(5, 4)}, r"anchors must be floating, of shape \[1161, 4\] or \[2, 1161, 4\]"),
        ({3: torch.zeros(3, 2)}, r"image_sizes must have shape \[2, 2\], and have shape \[3, 2\]"),
        ({4: [1.0, 2.0]}, "size_list must hold 4 numbers, height and width of each image, and holds 2"),
        ({5: 0}, "num_classes must be at least 1, and is 0"),
        ({7: -1}, "topk_per_level and max_detections must be at least 0, and are -1 and 20"),
    ],
)
def test_raw_errors(change, text):
    arguments = list(raw_arguments())
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match="detect: " + text):
        OPS.detect(*arguments)
