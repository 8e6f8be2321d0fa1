"""The compiled nms, batched_nms and batched_nms_padded at sizes where tiles, labels and threads matter: against the
reference and torchvision; any instruction set; registrations; raw arguments."""

import pytest
import torch
from started_anew import on_instruction_sets

from retinanet_ext import batched_nms, batched_nms_padded, nms, reference

OPS = torch.ops.retinanet_ext


def clustered(count, clusters=40, seed=0, dtype=torch.float32):
    """Boxes that overlap a lot, with scores that tie now and then."""
    generator = torch.Generator().manual_seed(seed)
    center = (torch.rand(clusters, 2, generator=generator) * 400)[
        torch.randint(clusters, (count,), generator=generator)
    ]
    center = center + torch.randn(count, 2, generator=generator) * 6
    size = torch.rand(count, 2, generator=generator) * 40 + 20
    scores = (torch.rand(count, generator=generator) * 2000).round() / 2000
    return torch.cat((center - size / 2, center + size / 2), dim=1).to(dtype), scores.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [511, 512, 513, 3000])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_tiles_of_candidates(count, threshold, dtype):
    boxes, scores = clustered(count, dtype=dtype)
    keep = nms(boxes, scores, threshold)
    assert 20 < len(keep) < count
    assert torch.equal(keep, reference.nms(boxes, scores, threshold))


@pytest.mark.parametrize("labels_of", ["one large, many small", "two large", "all different", "negative and huge"])
def test_labels(labels_of):
    boxes, scores = clustered(3000)
    rows = torch.arange(3000)
    labels = {
        "one large, many small": torch.where(rows % 2 == 0, 7, rows % 31),
        "two large": rows % 2,
        "all different": rows,
        "negative and huge": (rows % 5 - 2) * (1 << 61),
    }[labels_of]
    assert torch.equal(batched_nms(boxes, scores, labels, 0.4), reference.batched_nms(boxes, scores, labels, 0.4))


def test_torchvision():
    ops = pytest.importorskip("torchvision.ops", reason="the peer is not installed")
    boxes, scores = clustered(4000)
    scores = scores[torch.randperm(4000)].argsort() / 4000  # torchvision leaves the order of ties open
    for threshold in (0.0, 0.2, 0.5, 0.8):
        assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 1.0, 2.0, float("nan"), float("inf")])
def test_thresholds_of_all_kinds(threshold):
    boxes, scores = clustered(700)
    boxes[5] = torch.tensor([10.0, 10.0, 5.0, 5.0])  # inverted, without area, not a number, infinite
    boxes[6], boxes[7], boxes[8] = 20.0, float("nan"), torch.tensor([0.0, 0.0, float("inf"), 9.0])
    assert torch.equal(nms(boxes, scores, threshold), reference.nms(boxes, scores, threshold))


@pytest.mark.parametrize("scale", [1e-23, 1e-20, 1e17, 1e19])
def test_areas_that_vanish_or_overflow(scale):
    boxes, scores = clustered(600)
    boxes = boxes * scale
    assert torch.equal(nms(boxes, scores, 0.5), reference.nms(boxes, scores, 0.5))


def test_everything_and_nothing_is_suppressed():
    same = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(2000, 1)
    scores = torch.rand(2000)
    assert nms(same, scores, 0.5).tolist() == [scores.argmax().item()]
    apart = same + torch.arange(2000)[:, None] * 20
    assert torch.equal(nms(apart, torch.full((2000,), 0.5), 0.5), torch.arange(2000))


@pytest.mark.parametrize("max_detections", [0, 1, 100, 5000])
def test_padded(max_detections):
    cases = [clustered(1500, seed=seed) for seed in range(3)]
    boxes, scores = (torch.stack(column) for column in zip(*cases, strict=True))
    labels = torch.arange(1500).expand(3, -1) % 7 - 3
    for num_valid in (None, torch.tensor([1500, 0, 700]), torch.tensor([1 << 40, -5, 1], dtype=torch.int64)):
        clamped = None if num_valid is None else num_valid.clamp(0, 1500)
        expected = reference.batched_nms_padded(boxes, scores, labels, 0.4, max_detections, clamped)
        found = batched_nms_padded(boxes, scores, labels, 0.4, max_detections, num_valid)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_any_number_of_threads(num_threads):
    boxes, scores = clustered(5000)
    labels = torch.where(torch.arange(5000) % 2 == 0, 0, torch.arange(5000) % 80)
    results = []
    for threads in (1, 2, 5):
        num_threads(threads)
        images = [tensor.view(5, 1000, *tensor.shape[1:]) for tensor in (boxes, scores, labels)]
        padded = batched_nms_padded(*images, 0.4, 300, torch.tensor([1000, 0, 1, 999, 500]))
        results.append((nms(boxes, scores, 0.4), batched_nms(boxes, scores, labels, 0.4), *padded))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def kept_in_both_types():
    kept = []
    for dtype in (torch.float32, torch.float64):
        boxes, scores = clustered(1500, dtype=dtype)
        labels = torch.arange(1500) % 3
        kept += [nms(boxes, scores, 0.45), batched_nms(boxes, scores, labels, 0.45)]
        kept += batched_nms_padded(
            boxes.view(3, 500, 4), scores.view(3, 500), labels.view(3, 500), 0.45, 200, torch.tensor([500, 20, 333])
        )
    return kept


def test_every_instruction_set_keeps_the_same(tmp_path):
    expected = kept_in_both_types()
    for isa, results in on_instruction_sets(kept_in_both_types, tmp_path).items():
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), isa


def test_opcheck():
    boxes, scores = clustered(50)
    labels = torch.arange(50) % 3
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.nms.default, (boxes[None], scores[None], None, 0.5), test_utils=tests)
    torch.library.opcheck(OPS.nms.default, (boxes[None], scores[None], labels[None], 0.5), test_utils=tests)
    for num_valid in (None, torch.tensor([20, 50], dtype=torch.int32)):
        arguments = (boxes.expand(2, -1, -1), scores.expand(2, -1), labels.expand(2, -1), num_valid, 0.5, 10)
        torch.library.opcheck(OPS.batched_nms_padded.default, arguments)


def test_any_number_of_images_and_boxes_exports():
    class Suppress(torch.nn.Module):
        def forward(self, boxes, scores, labels, num_valid):
            return tuple(batched_nms_padded(boxes, scores, labels, 0.5, 20, num_valid))

    def images_of(batch, count):
        boxes, scores = clustered(batch * count)
        images = [boxes.view(batch, count, 4), scores.view(batch, count), torch.arange(count).expand(batch, -1) % 3]
        return *images, torch.arange(batch) * 7

    batch, rows = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("rows", min=1, max=4096)
    shapes = ({0: batch, 1: rows}, {0: batch, 1: rows}, {0: batch, 1: rows}, {0: batch})
    program = torch.export.export(Suppress(), images_of(3, 60), dynamic_shapes=shapes).module()
    for arguments in (images_of(1, 33), images_of(4, 200)):
        expected = batched_nms_padded(*arguments[:3], 0.5, 20, arguments[3])
        assert all(torch.equal(a, b) for a, b in zip(program(*arguments), expected, strict=True))


def test_any_number_of_boxes_exports():
    class Suppress(torch.nn.Module):
        def forward(self, boxes, scores, labels):
            return nms(boxes, scores, 0.5), batched_nms(boxes, scores, labels, 0.5)

    def rows_of(count):
        return *clustered(count), (torch.arange(count) % 3).float()  # as a detector gives them, in one tensor

    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Suppress(), rows_of(60), dynamic_shapes=({0: rows},) * 3).module()
    for count in (2, 300):
        arguments = rows_of(count)
        expected = nms(*arguments[:2], 0.5), batched_nms(*arguments, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(program(*arguments), expected, strict=True))


def test_padded_compiles_as_one_graph_and_exports():
    boxes, scores = (tensor.expand(2, *tensor.shape) for tensor in clustered(60))
    labels, num_valid = torch.arange(60).expand(2, -1) % 3, torch.tensor([60, 31])

    class Suppress(torch.nn.Module):
        def forward(self, *arguments):
            return tuple(batched_nms_padded(*arguments[:3], 0.5, 20, arguments[3]))

    arguments = (boxes, scores, labels, num_valid)
    expected = batched_nms_padded(boxes, scores, labels, 0.5, 20, num_valid)
    compiled = torch.compile(Suppress(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Suppress(), arguments).module()
    for module in (compiled, exported):
        assert all(torch.equal(a, b) for a, b in zip(module(*arguments), expected, strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: torch.zeros(1, 5, 4).half()}, "boxes must be float32 or float64, and are float16"),
        ({0: torch.zeros(1, 5, 3)}, r"boxes must have shape \[B, N, 4\], and have shape \[1, 5, 3\]"),
        ({1: torch.zeros(1, 4)}, r"scores must be float32 of shape \[1, 5\], and are float32 of shape \[1, 4\]"),
        ({1: torch.zeros(1, 5).double()}, "scores must be float32 .*and are float64"),
        ({2: torch.zeros(1, 5).int()}, "labels must be int64 .*and are int32"),
        ({3: torch.zeros(2).int()}, r"num_valid must be int32 of shape \[1\], and is int32 of shape \[2\]"),
        ({3: torch.zeros(1).long()}, "num_valid must be int32 .*and is int64"),
        ({5: -1}, "max_detections must be at least 0, and is -1"),
    ],
)
def test_raw_errors(change, text):
    arguments = [torch.zeros(1, 5, 4), torch.zeros(1, 5), torch.zeros(1, 5).long(), None, 0.5, 3]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match="batched_nms_padded: " + text):
        OPS.batched_nms_padded(*arguments)


def test_nms_of_more_than_one_image_is_an_error():
    with pytest.raises(RuntimeError, match=r"nms: boxes must be those of one image, \[1, N, 4\]"):
        OPS.nms(torch.zeros(2, 5, 4), torch.zeros(2, 5), None, 0.5)
