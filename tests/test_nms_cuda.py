"""nms, batched_nms and batched_nms_padded on CUDA against the CPU operators: values, graphs, host synchronisation,
identical bits, sizes, sanitizer cases. Each gate has a marker, which tests/gpu_ring.py runs as a stage of its own."""

import pytest
import torch
from cuda_gates import capture, host_must_not_wait

from retinanet_ext import batched_nms, batched_nms_padded, nms

pytestmark = pytest.mark.cuda

DEVICE = torch.device("cuda")
OPS = torch.ops.retinanet_ext
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def clustered(count, clusters=40, seed=0, dtype=torch.float32, batch=()):
    """Boxes that overlap a lot, with scores that tie now and then, of 80 classes of which some are frequent."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(clusters, (*batch, count), generator=generator)
    center = (torch.rand(clusters, 2, generator=generator) * 400)[picked]
    center = center + torch.randn(*batch, count, 2, generator=generator) * 6
    size = torch.rand(*batch, count, 2, generator=generator) * 40 + 20
    scores = (torch.rand(*batch, count, generator=generator) * 2000).round() / 2000
    labels = (torch.rand(*batch, count, generator=generator) ** 3 * 80).long()
    return torch.cat((center - size / 2, center + size / 2), dim=-1).to(dtype), scores.to(dtype), labels


def check(function, *arguments, **options):
    """The device keeps what the host keeps."""
    expected = function(*arguments, **options)
    on_device = [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in arguments]
    options = {name: value.to(DEVICE) for name, value in options.items()}
    found = function(*on_device, **options)
    pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
    for mine, right in pairs:
        assert mine.is_cuda
        assert torch.equal(mine.cpu(), right)
    return expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 2047, 2048, 2049, 5000, 8192, 8193, 20000])
def test_any_number_of_boxes(count, dtype):
    boxes, scores, labels = clustered(count, dtype=dtype)
    for threshold in (0.3, 0.7):
        check(nms, boxes, scores, threshold)
        check(batched_nms, boxes, scores, labels, threshold)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 64, 1000, 5000, 20000])
@pytest.mark.parametrize("most", [0, 1, 100, 300, 6000])
def test_padded(most, count, dtype):
    boxes, scores, labels = clustered(count, dtype=dtype, batch=(3,))
    num_valid = torch.tensor([count, count // 3, 0])
    check(batched_nms_padded, boxes, scores, labels, 0.5, most)
    check(batched_nms_padded, boxes, scores, labels, 0.5, most, num_valid=num_valid)


def test_everything_nothing_and_every_second_box_is_kept():
    same = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(30_000, 1)
    scores = torch.rand(30_000)
    assert len(check(nms, same, scores, 0.5)) == 1
    apart = same + torch.arange(30_000)[:, None] * torch.tensor([20.0, 0.0, 20.0, 0.0])
    assert len(check(nms, apart, scores, 0.5)) == 30_000
    chain = same + torch.arange(30_000)[:, None] * torch.tensor([3.0, 0.0, 3.0, 0.0])
    falling = 1 - torch.arange(30_000) / 30_000
    assert len(check(nms, chain, falling, 0.5)) == 15_000


def test_scores_and_boxes_of_all_kinds():
    boxes, scores, labels = clustered(3000)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), float("-inf"), -1.0, 1e-45])
    scores[: 7 * 40] = special.repeat(40)
    boxes[5], boxes[6] = torch.tensor([10.0, 10.0, 5.0, 5.0]), 20.0
    boxes[7], boxes[8] = float("nan"), torch.tensor([0.0, 0.0, float("inf"), 9.0])
    for threshold in (-0.5, 0.0, 0.5, 1.0, 2.0, float("nan"), float("inf")):
        check(nms, boxes, scores, threshold)
        check(batched_nms, boxes, scores, labels, threshold)
        check(batched_nms_padded, boxes[None], scores[None], labels[None], threshold, 300)
    for scale in (1e-23, 1e-20, 1e17, 1e19):
        check(nms, boxes * scale, scores, 0.5)


@pytest.mark.parametrize("labels_of", ["float with NaN", "bool", "uint8", "negative and huge"])
def test_labels_of_all_kinds(labels_of):
    boxes, scores, labels = clustered(3000)
    labels = {
        "float with NaN": torch.where(labels < 3, float("nan"), labels.float()),
        "bool": labels > 10,
        "uint8": labels.to(torch.uint8),
        "negative and huge": (labels % 5 - 2) * (1 << 61),
    }[labels_of]
    check(batched_nms, boxes, scores, labels, 0.4)


def test_views_that_are_not_aligned():
    storage = torch.empty(4 * 901)
    for offset in range(4):
        boxes = storage[offset : offset + 3600].view(900, 4).copy_(clustered(900)[0])
        scores = torch.rand(900)
        moved = storage.to(DEVICE)[offset : offset + 3600].view(900, 4)
        assert torch.equal(nms(moved, scores.to(DEVICE), 0.5).cpu(), nms(boxes, scores, 0.5))
    boxes, scores, _ = clustered(900)
    strided = boxes.to(DEVICE).repeat_interleave(2, dim=1)[:, ::2]
    assert not strided.is_contiguous()
    kept = nms(boxes, scores, 0.5)
    assert len(kept) < 900
    assert torch.equal(nms(strided, scores.to(DEVICE), 0.5).cpu(), kept)


def test_torchvision():
    ops = pytest.importorskip("torchvision.ops", reason="the peer is not installed")
    boxes = clustered(4000)[0].to(DEVICE)
    scores = torch.randperm(4000, device=DEVICE) / 4000  # torchvision leaves the order of ties open
    for threshold in (0.0, 0.2, 0.5, 0.8):
        assert torch.equal(nms(boxes, scores, threshold), ops.nms(boxes, scores, threshold))


def test_other_streams():
    boxes, scores, _ = (value.to(DEVICE) for value in clustered(9000))
    expected = nms(boxes, scores, 0.5)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(nms(boxes, scores, 0.5), expected)


def test_opcheck():
    boxes, scores, labels = (value.to(DEVICE) for value in clustered(50))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OPS.nms.default, (boxes[None], scores[None], labels[None], 0.5), test_utils=tests)
    arguments = (boxes[None], scores[None], labels[None], torch.tensor([20], dtype=torch.int32, device=DEVICE), 0.5, 10)
    torch.library.opcheck(OPS.batched_nms_padded.default, arguments)


def test_400_000_boxes():
    """More than torchvision's 32-bit index takes."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(400_000, 2, generator=generator) * 4000
    boxes = torch.cat((corner, corner + torch.rand(400_000, 2, generator=generator) * 100 + 5), dim=1)
    kept = check(nms, boxes, torch.rand(400_000, generator=generator), 0.1)
    assert len(kept) > 8192


@pytest.mark.graph
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_graph_replays_with_other_boxes_and_another_number_of_them(dtype):
    static = [value.to(DEVICE) for value in clustered(3000, dtype=dtype, batch=(3,))]
    num_valid = torch.tensor([3000, 10, 0], device=DEVICE)
    graph, results = capture(lambda: batched_nms_padded(*static, 0.5, 200, num_valid))
    for seed, counts in enumerate(([3000, 10, 0], [0, 0, 0], [1, 2999, 3000]), start=1):
        case = clustered(3000, seed=seed, dtype=dtype, batch=(3,))
        for target, value in zip(static, case, strict=True):
            target.copy_(value)
        num_valid.copy_(torch.tensor(counts))
        for result in results:
            result.fill_(-77)
        graph.replay()
        for mine, right in zip(results, batched_nms_padded(*case, 0.5, 200, torch.tensor(counts)), strict=True):
            assert torch.equal(mine.cpu(), right)


@pytest.mark.sync
def test_no_call_of_the_padded_operator_makes_the_host_wait():
    boxes, scores, labels = (value.to(DEVICE) for value in clustered(3000, dtype=torch.bfloat16, batch=(3,)))
    num_valid = torch.tensor([3000, 10, 0], device=DEVICE)
    for _ in range(3):  # kernels are loaded and memory is reserved at the first calls
        batched_nms_padded(boxes, scores, labels, 0.5, 200, num_valid)
    with host_must_not_wait():
        result = batched_nms_padded(boxes, scores, labels, 0.5, 200, num_valid)
    assert result.counts[0] > 0


@pytest.mark.identity
def test_same_rows_in_100_runs():
    """Half of the runs share the device with other work, which moves the blocks about."""
    boxes, scores, labels = (value.to(DEVICE) for value in clustered(20_000))
    scores = (scores * 50).round() / 50
    images = boxes.view(4, 5000, 4), scores.view(4, 5000), labels.view(4, 5000)

    def results():
        return nms(boxes, scores, 0.5), batched_nms(boxes, scores, labels, 0.5), *batched_nms_padded(*images, 0.5, 300)

    expected = results()
    other_work, stream = torch.zeros(32 << 20, device=DEVICE), torch.cuda.Stream()
    for run in range(100):
        if run % 2:
            with torch.cuda.stream(stream):
                other_work.add_(1)
        assert all(torch.equal(mine, right) for mine, right in zip(results(), expected, strict=True))
    torch.cuda.synchronize()


@pytest.mark.sync
@pytest.mark.parametrize("count", [5000, 20_000])
def test_nms_waits_once(count):
    """For the number of rows that it returns, by one copy; torch's debug mode does not see waits of a library."""
    boxes, scores, labels = (value.to(DEVICE) for value in clustered(count))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for call in (lambda: nms(boxes, scores, 0.5), lambda: batched_nms(boxes, scores, labels, 0.5)):
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            call()
        names = [event.name for event in profiler.events()]
        assert sum("Memcpy DtoH" in name for name in names) == 1
        assert names.count("cudaStreamSynchronize") == 1


@pytest.mark.large
def test_more_than_2_31_coordinates():
    """Images times boxes times 4 beyond 2^31: offsets in 64 bits."""
    batch, count = 2100, 262_144
    free, _ = torch.cuda.mem_get_info()
    if free < 60e9:
        pytest.skip(f"needs 60 GB of free GPU memory, and {free / 1e9:.0f} GB are free")
    boxes, scores, labels = (value.to(DEVICE) for value in clustered(count, clusters=2000))
    batched = [value.expand(batch, *value.shape).contiguous() for value in (boxes, scores, labels)]
    assert batched[0].numel() > 2**31
    result = batched_nms_padded(*batched, 0.5, 50)
    expected = batched_nms_padded(boxes[None], scores[None], labels[None], 0.5, 50)
    assert torch.equal(result.indices, expected.indices.expand(batch, -1))


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_calls_of_every_kernel(dtype):
    """For compute-sanitizer: partial tiles, chunks, words and bands; several bands; ragged images."""
    boxes, scores, labels = clustered(8300, clusters=900, dtype=dtype)
    check(batched_nms, boxes, scores, labels, 0.5)
    check(nms, boxes[:101], scores[:101], 0.5)
    batch = [value[:4400].view(2, 2200, *value.shape[1:]) for value in (boxes, scores, labels)]
    check(batched_nms_padded, *batch, 0.5, 70, num_valid=torch.tensor([2199, 65]))
