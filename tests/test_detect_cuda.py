"""detect on CUDA against the CPU operator: values, worst cases, workspace, graphs, host synchronisation, identical
bits, sizes, sanitizer cases. Each gate has a marker, which tests/gpu_ring.py runs as a stage of its own."""

import pytest
import torch
from cuda_gates import bits, capture, host_must_not_wait
from logit_kinds import LOGIT_KINDS, logits_of_kind

from retinanet_ext import detect, reference
from retinanet_ext.models.anchors import AnchorGenerator

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
OPS = torch.ops.retinanet_ext
A, K = 9, 7
IMAGE = (256, 320)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def grids_of(image):
    return [(-(-image[0] // stride), -(-image[1] // stride)) for stride in (8, 16, 32, 64, 128)]


def make_case(dtype=torch.float32, batch=2, spread=2.0, seed=0, image=IMAGE, classes=K):
    generator = torch.Generator().manual_seed(seed)
    grids = grids_of(image)
    logits = [torch.randn(batch, A * classes, *grid, generator=generator) * spread - 1 for grid in grids]
    deltas = [torch.randn(batch, A * 4, *grid, generator=generator) * 0.3 for grid in grids]
    sizes = [(image[0] - 3.0 * i % 50, image[1] - 7.0 * i % 50) for i in range(batch)]
    anchors = AnchorGenerator()(image, grids)
    return [level.to(dtype) for level in logits], [level.to(dtype) for level in deltas], anchors, sizes


def to_device(value):
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    return [to_device(one) for one in value] if isinstance(value, list) else value


def assert_same(found, expected):
    """What is found is the same; boxes and scores but for the roundings of two exponentials."""
    for name in ("labels", "indices", "counts"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    eps = torch.finfo(expected.boxes.dtype).eps
    torch.testing.assert_close(found.boxes.cpu(), expected.boxes, rtol=0, atol=4 * 512 * eps)
    torch.testing.assert_close(
        found.scores.cpu(), expected.scores, rtol=2 * torch.finfo(expected.scores.dtype).eps, atol=0
    )


def check(logits, deltas, anchors, sizes, **options):
    """The device finds what the host finds."""
    expected = detect(logits, deltas, anchors, sizes, **options)
    assert_same(detect(*to_device([logits, deltas, anchors]), sizes, **options), expected)
    return expected


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_and_layouts(dtype, layout):
    logits, deltas, anchors, sizes = make_case(dtype)
    if layout == "channels_last":
        logits, deltas = ([lv.contiguous(memory_format=torch.channels_last) for lv in v] for v in (logits, deltas))
    if layout == "rows":
        logits = [reference.focal_loss.anchor_rows(level, K) for level in logits]
        deltas = [reference.focal_loss.anchor_rows(level, 4) for level in deltas]
    for options in ({}, {"topk_per_level": 50, "clip_before_nms": False, "max_detections": 100}):
        expected = check(logits, deltas, anchors, sizes, **options)
        assert (expected.counts > 20).all()
    check(logits, deltas, anchors.double(), torch.tensor(sizes))
    check(logits, [level.float() for level in deltas], torch.stack((anchors, anchors + 3)), sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_at_and_beyond_the_limit_of_the_exponent(dtype):
    logits, deltas, anchors, _ = make_case(dtype)
    anchors = 250 + (anchors - anchors[:, :2].repeat(1, 2)) / 100
    growth = torch.tensor([4.135166556742356, 4.0, 4.14, 5.0, 50.0, 1e4, float("inf")])  # the first is the limit
    for level in deltas:
        for channel in (2, 3):
            level[:, channel::4] = growth[torch.randint(len(growth), level[:, channel::4].shape)].to(dtype)
    check(logits, deltas, anchors, [(512.0, 512.0)] * 2, nms_thresh=0.9)


@pytest.mark.parametrize("view", ["columns", "every second image", "odd offset"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(view, dtype):
    """Views made on the device, for a copy of one to it would be compact: some are read in place, by their strides."""
    logits, deltas, anchors, sizes = make_case(dtype)

    def of(level):
        level = level.to(DEVICE)
        if view == "columns":
            return torch.nn.functional.pad(level, (1, 1))[..., 1:-1]
        if view == "every second image":
            return torch.stack((level, level.flip(1)), dim=1).flatten(0, 1)[::2]
        storage = torch.empty(level.numel() + 3, dtype=dtype, device=DEVICE)
        return storage[3:].view(level.shape).copy_(level)

    views = [[of(level) for level in levels] for levels in (logits, deltas)]
    if view == "columns":
        assert not views[0][0].is_contiguous()
    assert_same(detect(*views, anchors.to(DEVICE), sizes), detect(logits, deltas, anchors, sizes))


def test_image_sizes_on_the_device():
    logits, deltas, anchors, sizes = make_case(batch=3)
    expected = detect(logits, deltas, anchors, sizes)
    assert_same(detect(*to_device([logits, deltas, anchors, torch.tensor(sizes)])), expected)


def test_more_images_than_a_launch_holds():
    check(*make_case(batch=150, image=(64, 64)))


@pytest.mark.parametrize("logits_of", LOGIT_KINDS)
@pytest.mark.parametrize("topk", [1, 30, 1000, 3000, 10**9])
def test_more_candidates_than_are_wanted(logits_of, topk):
    logits, deltas, anchors, sizes = make_case()
    logits = logits_of_kind(logits_of, logits)
    check(logits, deltas, anchors, sizes, score_thresh=0.01, topk_per_level=topk, max_detections=400)


@pytest.mark.parametrize("score_thresh", [-1.0, 0.0, 1e-30, 0.05, 0.5, 0.999999, 1.0, 2.0, float("nan")])
def test_thresholds(score_thresh):
    logits, deltas, anchors, sizes = make_case(spread=40.0)
    logits[0][0, 0, 0, :3] = torch.tensor([float("-inf"), -200.0, float("inf")])
    check(logits, deltas, anchors, sizes, score_thresh=score_thresh)


@pytest.mark.parametrize("logits_of", ["equal", "random", "rising"])
def test_every_one_of_16_million_logits_is_a_candidate(logits_of):
    """And the workspace stays what it is for a few."""
    logits, deltas, anchors, sizes = make_case(torch.bfloat16, batch=1, image=(800, 1344), classes=80)
    if logits_of == "equal":
        logits = [torch.full_like(level, 1.0) for level in logits]
    elif logits_of == "rising":
        logits = [torch.linspace(-3, 3, level.numel()).to(torch.bfloat16).view(level.shape) for level in logits]
    else:
        logits = [level.abs() for level in logits]
    expected = detect(logits, deltas, anchors, sizes)
    arguments = (*to_device([logits, deltas, anchors]), sizes)
    detect(*arguments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = detect(*arguments)
    assert torch.cuda.max_memory_allocated() - before < 72 << 20
    assert_same(found, expected)


def test_none_and_few_are_left():
    logits, deltas, anchors, sizes = make_case()
    none = [torch.full_like(level, -20.0) for level in logits]
    assert check(none, deltas, anchors, sizes).counts.tolist() == [0, 0]
    none[-1][1, -1, -1, -1] = 2.0
    assert check(none, deltas, anchors, sizes, max_detections=3).counts.tolist() == [0, 1]


def test_limits_and_empty_inputs():
    logits, deltas, anchors, sizes = make_case()
    for topk, most in ((0, 5), (5, 0), (1, 1), (1000, 5000)):
        check(logits, deltas, anchors, sizes, topk_per_level=topk, max_detections=most)
    none = [torch.zeros(2, A * channels, 0, 5) for channels in (K, 4)]
    check([none[0], *logits], [none[1], *deltas], anchors, sizes)
    check([level[:0] for level in logits], [level[:0] for level in deltas], anchors, [])


def test_levels_beyond_the_limit_are_an_error():
    levels = [torch.zeros(1, 1, K, device=DEVICE)] * 33
    with pytest.raises(RuntimeError, match="detect: at most 32 levels on CUDA, not 33"):
        detect(levels, [torch.zeros(1, 1, 4, device=DEVICE)] * 33, torch.zeros(33, 4, device=DEVICE), [(9, 9)])


def test_torchvision(monkeypatch):
    """torchvision's own chain, which leaves the order of ties open: no two scores of an image are equal. It compares
    labels here, and does not move boxes apart, which costs digits."""
    pytest.importorskip("torchvision", reason="the peer is not installed")
    from types import SimpleNamespace

    from torchvision.models.detection._utils import BoxCoder
    from torchvision.models.detection.retinanet import RetinaNet
    from torchvision.ops import boxes as box_ops

    logits, deltas, anchors, sizes = make_case(batch=3)
    counts = [level[0].numel() for level in logits]
    scores = torch.stack([torch.randperm(sum(counts)) + 0.5 for _ in range(3)]) / sum(counts)
    levels = zip(torch.logit(scores).split(counts, dim=1), logits, strict=True)
    logits, deltas, anchors = to_device([[rows.view(level.shape) for rows, level in levels], deltas, anchors])
    monkeypatch.setattr(box_ops, "batched_nms", box_ops._batched_nms_vanilla)
    model = SimpleNamespace(score_thresh=0.05, topk_candidates=1000, nms_thresh=0.5, detections_per_img=300)
    model.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    rows = [[reference.focal_loss.anchor_rows(level, width) for level in levels]
            for levels, width in ((logits, K), (deltas, 4))]  # fmt: skip
    split = list(anchors.split([level.shape[1] for level in rows[1]]))
    outputs = {"cls_logits": rows[0], "bbox_regression": rows[1]}
    theirs = RetinaNet.postprocess_detections(model, outputs, [split] * 3, sizes)
    found = detect(logits, deltas, anchors, sizes)
    for image, other in enumerate(theirs):
        count = len(other["labels"])
        assert found.counts[image] == count
        assert torch.equal(found.labels[image, :count], other["labels"])
        torch.testing.assert_close(found.boxes[image, :count], other["boxes"], rtol=0, atol=1e-3)


def test_opcheck():
    logits, deltas, anchors, _ = to_device(list(make_case(image=(64, 64))))
    arguments = (logits, deltas, anchors, None, [60.0, 60.0, 64.0, 33.0], K, 0.05, 100, 0.5, 20, True)
    torch.library.opcheck(OPS.detect.default, arguments)


def test_compiles_as_one_graph():
    logits, deltas, anchors, _ = to_device(list(make_case(image=(64, 64))))
    sizes = torch.tensor([[60.0, 60.0], [64.0, 33.0]], device=DEVICE)
    compiled = torch.compile(detect, fullgraph=True, backend="aot_eager")
    for mine, right in zip(
        compiled(logits, deltas, anchors, sizes), detect(logits, deltas, anchors, sizes), strict=True
    ):
        assert torch.equal(bits(mine), bits(right))


@pytest.mark.graph
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_replays_with_other_inputs(dtype, layout):
    """Other logits, of which all, some and none are candidates, other deltas, anchors and image sizes."""
    logits, deltas, anchors, sizes = make_case(dtype)
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    logits, deltas = ([lv.contiguous(memory_format=form).to(DEVICE) for lv in v] for v in (logits, deltas))
    anchors, sizes = anchors.to(DEVICE), torch.tensor(sizes, device=DEVICE)
    graph, results = capture(lambda: detect(logits, deltas, anchors, sizes, topk_per_level=300))
    for seed, shift in enumerate((0.0, 20.0, -40.0, 1.0), start=1):
        case = make_case(dtype, seed=seed)
        for static, value in zip([*logits, *deltas], [*case[0], *case[1]], strict=True):
            static.copy_(value)
        for level in logits:
            level.add_(shift)
        anchors.copy_(case[2] + seed)
        sizes.copy_(torch.tensor([[200.0 - seed, 111.0], [90.0, 250.0]]))
        for result in results:
            result.fill_(-77)
        graph.replay()
        host = [[level.cpu() for level in levels] for levels in (logits, deltas)]
        assert_same(type(results)(*results), detect(*host, anchors.cpu(), sizes.cpu(), topk_per_level=300))


@pytest.mark.sync
@pytest.mark.parametrize("sizes_on_device", [False, True])
def test_no_call_makes_the_host_wait(sizes_on_device):
    logits, deltas, anchors, sizes = make_case(torch.bfloat16, batch=3)
    arguments = to_device([logits, deltas, anchors, torch.tensor(sizes) if sizes_on_device else sizes])
    for _ in range(3):  # kernels are loaded and memory is reserved at the first calls
        detect(*arguments)
    with host_must_not_wait():
        found = detect(*arguments)
    assert (found.counts > 0).all()


@pytest.mark.identity
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_100_runs(dtype):
    """Half of the runs share the device with other work. Buffers are thinned out at other moments then, and must not
    show it."""
    logits, deltas, anchors, sizes = make_case(dtype, batch=3, image=(512, 640))
    logits = [(level * 4).round() / 4 for level in logits]  # many that tie
    arguments = (*to_device([logits, deltas, anchors]), sizes)
    expected = [bits(value) for value in detect(*arguments, score_thresh=0.01, topk_per_level=700)]
    other_work, stream = torch.zeros(32 << 20, device=DEVICE), torch.cuda.Stream()
    for run in range(100):
        if run % 2:
            with torch.cuda.stream(stream):
                other_work.add_(1)
        found = detect(*arguments, score_thresh=0.01, topk_per_level=700)
        assert all(torch.equal(bits(mine), right) for mine, right in zip(found, expected, strict=True))
    torch.cuda.synchronize()


@pytest.mark.large
def test_batch_64_of_264_classes():
    """3.4 G logits, all of them candidates: 64-bit offsets, in a workspace that does not grow with them."""
    batch, classes, image = 64, 264, (800, 1344)
    logits_bytes = 2 * batch * A * classes * sum(height * width for height, width in grids_of(image))
    free, _ = torch.cuda.mem_get_info()
    if free < logits_bytes + 8e9:
        pytest.skip(f"needs {(logits_bytes + 8e9) / 1e9:.0f} GB of free GPU memory, and {free / 1e9:.0f} GB are free")
    grids = grids_of(image)
    logits = [torch.empty(batch, A * classes, *grid, dtype=torch.bfloat16, device=DEVICE) for grid in grids]
    for level in logits:
        level.normal_()
    deltas = [torch.randn(batch, A * 4, *grid, device=DEVICE) * 0.3 for grid in grids]
    anchors, sizes = AnchorGenerator()(image, grids).to(DEVICE), [(800.0, 1344.0)] * batch
    assert sum(level.numel() for level in logits) > 2**31
    detect(logits, deltas, anchors, sizes)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = detect(logits, deltas, anchors, sizes)
    assert torch.cuda.max_memory_allocated() - before < 256 << 20
    for index in (0, 31, 63):
        one = detect(
            *([level[index : index + 1] for level in levels] for levels in (logits, deltas)), anchors, sizes[:1]
        )
        for mine, right in zip(found, one, strict=True):
            assert torch.equal(mine[index], right[0])
    last = [[level[-1:].cpu() for level in levels] for levels in (logits, deltas)]
    expected = detect(*last, anchors.cpu(), sizes[:1])
    assert torch.equal(found.indices[-1:].cpu(), expected.indices)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_calls_of_every_kernel(dtype):
    """For compute-sanitizer: both layouts, buffers that overflow, lists beyond a chunk of the sort, few and none."""
    logits, deltas, anchors, sizes = make_case(dtype, image=(64, 96))
    for options in ({"topk_per_level": 40}, {"score_thresh": -1.0, "topk_per_level": 40}, {"topk_per_level": 2500}):
        check(logits, deltas, anchors, sizes, **options)
    form = torch.channels_last
    last = [[level.contiguous(memory_format=form) for level in levels] for levels in (logits, deltas)]
    check(*last, anchors, torch.tensor(sizes), clip_before_nms=False)
    check([level - 90 for level in logits], deltas, anchors, sizes)
