"""mmdet's `MaxIoUAssigner` under the patch, and `match_anchors(policy="mmdet")`: mmdet's own results, bit for bit."""

import inspect
import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
from peer_modules import assert_same, importable, is_installed, outcome, record_calls

import retinanet_ext


@pytest.fixture(scope="module", autouse=True)
def peers():
    with importable("mmcv", "mmdet"):
        import mmdet.models.task_modules.assigners  # noqa: F401

        yield


@pytest.fixture
def make(peers):
    from mmdet.models.task_modules.assigners import MaxIoUAssigner

    def assigner(cls=MaxIoUAssigner, **options):
        return cls(**{"pos_iou_thr": 0.5, "neg_iou_thr": 0.4, **options})

    return assigner


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch, ["match_anchors"])


def grid_anchors(dtype=torch.float32):
    """Integer boxes on a regular grid: equal overlaps by the dozen."""
    corners = torch.cartesian_prod(torch.arange(0, 48, 8), torch.arange(0, 48, 8))
    return torch.cat([torch.cat([corners, corners + side], dim=1) for side in (8, 12, 16, 24)]).to(dtype)


def integer_boxes(count, far=False, dtype=torch.float32):
    corners = torch.randint(0, 40, (count, 2))
    boxes = torch.cat([corners, corners + torch.randint(1, 24, (count, 2))], dim=1)
    boxes[: count // 3] = boxes[count // 3 : 2 * (count // 3)]  # the same ones again
    if far:
        boxes[-1] = torch.tensor([500, 500, 510, 510])  # overlaps no anchor
    return boxes.to(dtype)


def arguments(priors, boxes, labels=None, ignored=None):
    labels = torch.arange(len(boxes)) % 7 if labels is None else labels
    ignored = None if ignored is None else SimpleNamespace(bboxes=ignored)
    return SimpleNamespace(priors=priors), SimpleNamespace(bboxes=boxes, labels=labels), ignored


def assert_same_assignment(assigner, *instances):
    """Under the patch as without it. Returns the assignment."""
    expected = assigner.assign(*instances)
    with retinanet_ext.patch("mmdet", "MaxIoUAssigner"):
        found = assigner.assign(*instances)
    assert isinstance(found, type(expected))
    assert found.num_gts == expected.num_gts
    for name in ("gt_inds", "labels", "max_overlaps"):
        assert_same(getattr(found, name), getattr(expected, name))
    return found


OPTIONS = [
    {"min_pos_iou": minimum, "match_low_quality": low_quality, "gt_max_assign_all": assign_all}
    for minimum, low_quality, assign_all in itertools.product((0.0, 0.2, 0.5), (True, False), (True, False))
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("far", [False, True], ids=["", "flooded"])
def test_random_boxes_on_a_grid(make, calls, options, far):
    anchors = grid_anchors()
    for seed in range(12):
        torch.manual_seed(seed)
        # 0.3 and 0.7 are rounded to float32 when they are compared
        assigner = make(pos_iou_thr=(0.5, 0.7)[seed % 2], neg_iou_thr=(0.4, 0.3)[seed % 2], **options)
        assert_same_assignment(assigner, *arguments(anchors, integer_boxes(9, far)))
    ours = options["gt_max_assign_all"] or not options["match_low_quality"]
    assert ("match_anchors" in calls) == ours


@pytest.mark.parametrize("options", [option for option in OPTIONS if option["gt_max_assign_all"]], ids=str)
def test_the_operator_has_mmdets_matches(make, options):
    """`retinanet_ext.match_anchors` itself, of a batch of images with other numbers of boxes."""
    assigner, anchors = make(**options), grid_anchors()
    for seed in range(12):
        torch.manual_seed(100 + seed)
        batch = [integer_boxes(count, far=count == 6) for count in (1, 6, 15)] + [torch.rand(8, 4).cumsum(1) * 20]
        found = retinanet_ext.match_anchors(
            anchors, batch, 0.5, 0.4, options["match_low_quality"], policy="mmdet", min_pos_iou=options["min_pos_iou"]
        )
        for matched, boxes in zip(found, batch, strict=True):
            gt_inds = assigner.assign(*arguments(anchors, boxes)).gt_inds
            expected = torch.where(gt_inds > 0, gt_inds - 1, torch.where(gt_inds == 0, -1, -2))
            assert_same(matched.long(), expected)


def test_the_operators_labels_are_mmdets(make):
    assigner, anchors = make(), grid_anchors()
    boxes, labels = integer_boxes(9), torch.randint(80, (9,))
    assigned = retinanet_ext.assign_targets(anchors, [boxes], [labels], policy="mmdet")
    expected = assigner.assign(*arguments(anchors, boxes, labels))
    foreground = expected.gt_inds > 0
    assert_same(assigned.labels[0][foreground].long(), expected.labels[foreground])
    assert_same(assigned.labels[0] == -1, expected.gt_inds == 0)
    assert assigned.num_foreground.item() == foreground.sum()


def test_realistic_boxes_of_both_types(make, calls):
    for dtype in (torch.float32, torch.float64):
        corners = torch.rand(3000, 2, dtype=dtype) * 600
        priors = torch.cat([corners, corners + 8 + torch.rand(3000, 2, dtype=dtype) * 200], dim=1)
        boxes = priors[:40] + torch.randn(40, 4, dtype=dtype)
        found = assert_same_assignment(make(), *arguments(priors, boxes))
        assert (found.gt_inds == 0).any()
        assert (found.gt_inds == -1).any()
        assert (found.gt_inds > 0).any()
        assert found.max_overlaps.dtype == dtype
    assert len(calls) == 4  # matches, and the best overlaps as they are asked for


def test_priors_without_area_or_the_wrong_way_round(make, calls):
    """Whose areas may cancel a box's: mmdet's unions are 1e-6 at least."""
    odd = torch.tensor([[9.0, 0, 0, 9], [0, 0, 0, 9], [9, 9, 0, 0], [4, 4, 4, 4]])
    boxes = torch.tensor([[20.0, 20, 29, 29], [0, 0, 9, 9]])
    assert_same_assignment(make(), *arguments(torch.cat([odd, grid_anchors()]), boxes))
    assert len(calls) == 2


def test_best_overlaps_are_computed_when_they_are_asked_for(make, calls):
    with retinanet_ext.patch("mmdet"):
        found = make().assign(*arguments(grid_anchors(), integer_boxes(5)))
    assert calls == ["match_anchors"]
    overlaps = found.max_overlaps
    assert found.max_overlaps is overlaps
    assert calls == ["match_anchors"] * 2
    found.max_overlaps = overlaps + 1
    assert_same(found.max_overlaps, overlaps + 1)
    assert_same(pickle.loads(pickle.dumps(found)).gt_inds, found.gt_inds)


def test_boxes_are_added_as_priors(make):
    results = []
    for functions in ([], ["MaxIoUAssigner"]):
        boxes = integer_boxes(5) if not results else boxes  # noqa: F821 - the same twice
        instances = arguments(grid_anchors(), boxes, torch.arange(5))
        if functions:
            with retinanet_ext.patch("mmdet", functions):
                results.append(make().assign(*instances))
        else:
            results.append(make().assign(*instances))
        results[-1].add_gt_(torch.arange(5))
    for name in ("gt_inds", "labels", "max_overlaps"):
        assert_same(getattr(results[1], name), getattr(results[0], name))


def test_many_boxes_stay_where_they_are(make, calls):
    """`gpu_assign_thr` moves mmdet's matrix to the CPU; the answer is the same, and there is none to move."""
    assert_same_assignment(make(gpu_assign_thr=2), *arguments(grid_anchors(), integer_boxes(9)))
    assert calls == ["match_anchors"] * 2


def test_ignored_boxes_that_are_not_looked_at(make, calls):
    instances = arguments(grid_anchors(), integer_boxes(9), ignored=integer_boxes(3))
    assert_same_assignment(make(), *instances)
    assert len(calls) == 2
    assert_same_assignment(
        make(ignore_iof_thr=0.5), *arguments(grid_anchors(), integer_boxes(9), ignored=torch.rand(0, 4))
    )
    assert len(calls) == 4


MMDETS_OWN = {
    "ignored boxes": ({"ignore_iof_thr": 0.5}, {"ignored": torch.tensor([[0.0, 0, 20, 20]])}),
    "first of equals": ({"gt_max_assign_all": False}, {}),
    "range of background": ({"neg_iou_thr": (0.1, 0.4)}, {}),
    "background of an int": ({"neg_iou_thr": 0}, {}),
    "thresholds the wrong way round": ({"neg_iou_thr": 0.6}, {}),
    "halves": ({"iou_calculator": {"type": "BboxOverlaps2D", "dtype": "fp16"}}, {}),
    "no boxes": ({}, {"boxes": torch.zeros(0, 4)}),
    "no priors": ({}, {"priors": torch.zeros(0, 4)}),
    "no area": ({}, {"boxes": torch.tensor([[3.0, 3, 3, 9], [0, 0, 9, 9]])}),
    "tiny boxes": ({}, {"boxes": torch.tensor([[3.0, 3, 3.0005, 3.0005], [0, 0, 9, 9]])}),
    "nan": ({}, {"boxes": torch.tensor([[3.0, 3, float("nan"), 9], [0, 0, 9, 9]])}),
    "infinite": ({}, {"boxes": torch.tensor([[3.0, 3, float("inf"), 9], [0, 0, 9, 9]])}),
    "nan prior": ({}, {"priors": torch.tensor([[3.0, 3, float("nan"), 9], [0, 0, 9, 9]])}),
    "types": ({}, {"priors": torch.tensor([[0.0, 0, 9, 9]], dtype=torch.float64)}),
    "labels of another type": ({}, {"labels": torch.arange(6, dtype=torch.int32)}),
    "columns": ({}, {"boxes": torch.rand(3, 3)}),
}


@pytest.mark.parametrize("name", MMDETS_OWN)
def test_what_only_mmdet_defines_goes_to_mmdet(make, calls, name):
    settings, changed = MMDETS_OWN[name]
    instances = arguments(**{"priors": grid_anchors(), "boxes": integer_boxes(6), **changed})
    expected = outcome(make(**settings).assign, *instances)
    with retinanet_ext.patch("mmdet"):
        found = outcome(make(**settings).assign, *instances)
    assert calls == []
    if isinstance(expected, tuple):
        assert found == expected
    else:
        for attribute in ("gt_inds", "labels", "max_overlaps"):
            assert_same(getattr(found, attribute), getattr(expected, attribute))


def test_overridden_parts_stay(make, calls):
    from mmdet.models.task_modules.assigners import BboxOverlaps2D, MaxIoUAssigner

    class Doubled(BboxOverlaps2D):
        def __call__(self, *arguments, **options):
            return (2 * super().__call__(*arguments, **options)).clamp(max=1)

    class NoneLeftOut(MaxIoUAssigner):
        def assign_wrt_overlaps(self, overlaps, gt_labels):
            result = super().assign_wrt_overlaps(overlaps, gt_labels)
            result.gt_inds = result.gt_inds.clamp(min=0)
            return result

    instances = arguments(grid_anchors(), integer_boxes(6))
    doubled = make()
    doubled.iou_calculator = Doubled()
    assert_same_assignment(doubled, *instances)
    found = assert_same_assignment(make(NoneLeftOut), *instances)
    assert (found.gt_inds >= 0).all()
    assert calls == []


def test_mmdet_itself_was_what_was_compared_with(make):
    if not is_installed("mmdet"):
        pytest.skip("mmdet is not installed: what stands in for it was compared with")
    assert "standins" not in inspect.getsourcefile(type(make()))
