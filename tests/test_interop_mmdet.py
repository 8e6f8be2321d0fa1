"""mmdet's focal loss under the patch, compared with mmdet's own."""

import inspect

import pytest
import torch
from peer_modules import assert_same, attributes, changes, importable, is_installed, outcome, record_calls

import retinanet_ext

PACKAGES = ("mmcv", "mmdet")
NUM_CLASSES = 5


@pytest.fixture(scope="module", autouse=True)
def peers():
    with importable(*PACKAGES):
        import mmdet.models.losses
        import mmdet.models.task_modules.assigners  # noqa: F401

        yield


@pytest.fixture
def losses(peers):
    import mmdet.models.losses.focal_loss

    return mmdet.models.losses.focal_loss


@pytest.fixture
def calls(monkeypatch):
    return record_calls(monkeypatch, ["sigmoid_focal_loss", "match_anchors"])


def with_gradient(compute, logits):
    """What a loss is, and its gradient; or its error."""
    logits = logits.detach().requires_grad_()

    def both():
        loss = compute(logits)
        return loss.detach(), torch.autograd.grad(loss.square().sum(), logits)[0]

    return outcome(both)


def assert_same_loss(compute, logits):
    """Under the patch as without it. Returns the loss."""
    expected = with_gradient(compute, logits)
    with retinanet_ext.patch("mmdet"):
        found = with_gradient(compute, logits)
    if isinstance(expected[0], type):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=5e-5, atol=1e-6)
    return found[0]


def draw(rows=40):
    return 1.5 * torch.randn(rows, NUM_CLASSES), torch.randint(NUM_CLASSES + 1, (rows,))


WEIGHTS = {
    "none": lambda rows: None,
    "rows left out": lambda rows: (torch.rand(rows) < 0.7).float(),
    "rows": torch.rand,
    "rows, two dimensions": lambda rows: torch.rand(rows, 1),
    "elements": lambda rows: torch.rand(rows, NUM_CLASSES),
    "elements, flattened": lambda rows: torch.rand(rows * NUM_CLASSES),
}


def test_a_patch_leaves_nothing_behind():
    before = attributes(*PACKAGES)
    with retinanet_ext.patch("mmdet") as patch:
        names = ("nms", "batched_nms", "sigmoid_focal_loss", "py_sigmoid_focal_loss", "FocalLoss", "MaxIoUAssigner")
        assert patch.functions == names
        assert changes(before, attributes(*PACKAGES)) >= {
            ("mmcv.ops", "batched_nms"),
            ("mmcv.ops", "sigmoid_focal_loss"),
            ("mmdet.models.losses.focal_loss", "sigmoid_focal_loss"),
            ("mmdet.models.losses.focal_loss", "_sigmoid_focal_loss"),
            ("mmdet.models.losses", "sigmoid_focal_loss"),
            ("mmdet.models.losses.focal_loss", "py_sigmoid_focal_loss"),
            ("mmdet.models.losses.focal_loss.FocalLoss", "forward"),
            ("mmdet.models.task_modules.assigners.max_iou_assigner.MaxIoUAssigner", "assign"),
        }
        with retinanet_ext.patch("mmcv", "nms"):
            pass
        assert ("mmcv.ops", "nms") in changes(before, attributes(*PACKAGES))
    assert changes(before, attributes(*PACKAGES)) == set()


def test_one_loss_alone(losses):
    before = attributes(*PACKAGES)
    with retinanet_ext.patch("mmdet", "FocalLoss"):
        assert changes(before, attributes(*PACKAGES)) == {("mmdet.models.losses.focal_loss.FocalLoss", "forward")}
    with retinanet_ext.patch("mmdet", "sigmoid_focal_loss"):
        assert {name for _, name in changes(before, attributes(*PACKAGES))} >= {
            "sigmoid_focal_loss",
            "_sigmoid_focal_loss",
        }
    assert changes(before, attributes(*PACKAGES)) == set()


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction_override": "sum"},
        {"reduction_override": "none"},
        {"avg_factor": 7},
        {"avg_factor": torch.tensor(3.5)},
        {"avg_factor": 0.0},
        {"avg_factor": 4.0, "reduction_override": "none"},
    ],
    ids=["mean", "sum", "none", "averaged", "averaged by a tensor", "averaged by 0", "none and averaged"],
)
def test_focal_loss_module(losses, calls, weight, options):
    logits, target = draw()
    weight = WEIGHTS[weight](len(logits))
    module = losses.FocalLoss(gamma=1.5, alpha=0.3, loss_weight=2.5)
    assert_same_loss(lambda logits: module(logits, target, weight, **options), logits)
    assert calls == ["sigmoid_focal_loss"]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", ["py_sigmoid_focal_loss", "sigmoid_focal_loss"])
def test_functions(losses, calls, name, weight, reduction):
    logits, target = draw()
    if name == "py_sigmoid_focal_loss":
        target = torch.rand_like(logits)
    weight = WEIGHTS[weight](len(logits))
    assert_same_loss(lambda logits: getattr(losses, name)(logits, target, weight, reduction=reduction), logits)
    assert calls == ["sigmoid_focal_loss"]


def test_one_hot_targets_are_numbers(losses, calls):
    logits, target = draw()
    one_hot = torch.nn.functional.one_hot(target, NUM_CLASSES + 1)[:, :NUM_CLASSES]
    module = losses.FocalLoss()
    for kind in (torch.int64, torch.float32, torch.bool):
        assert_same_loss(lambda logits, kind=kind: module(logits, one_hot.to(kind), avg_factor=3), logits)
    assert calls == ["sigmoid_focal_loss"] * 3


def test_rows_left_out_make_nothing_of_the_size_of_the_logits(losses, monkeypatch):
    """Weights of 0 and 1, as mmdet's heads have them: the sum is computed at once."""
    kinds = []
    compute = retinanet_ext.ops.sigmoid_focal_loss
    monkeypatch.setattr(
        retinanet_ext.ops,
        "sigmoid_focal_loss",
        lambda *arguments, **options: kinds.append(arguments[4]) or compute(*arguments, **options),
    )
    (logits, target), module = draw(), losses.FocalLoss()
    with retinanet_ext.patch("mmdet"):
        for weight in ("rows left out", "rows, two dimensions"):
            module(logits, target, WEIGHTS[weight](len(logits)), avg_factor=2)
    assert kinds == ["sum", "none"]


def test_what_a_row_that_is_left_out_predicts_is_not_read(losses):
    logits, target = draw()
    weight = torch.ones(len(logits))
    weight[3], logits[3] = 0, float("nan")
    with retinanet_ext.patch("mmdet"):
        found, gradient = with_gradient(lambda logits: losses.FocalLoss()(logits, target, weight), logits)
    rest = losses.FocalLoss(reduction="sum")(logits[weight > 0], target[weight > 0]) / logits.numel()
    torch.testing.assert_close(found, rest, rtol=1e-5, atol=0)
    assert_same(gradient[3], torch.zeros(NUM_CLASSES))


def test_weights_that_are_learned(losses):
    (logits, target), weight = draw(), torch.ones(40, requires_grad=True)
    module, gradients = losses.FocalLoss(), []
    gradients.append(torch.autograd.grad(module(logits, target, weight), weight)[0])
    with retinanet_ext.patch("mmdet"):
        gradients.append(torch.autograd.grad(module(logits, target, weight), weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight_type", [None, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_types_of_results(losses, calls, dtype, weight_type, autocast):
    (logits, target), module = draw(), losses.FocalLoss()
    weight = None if weight_type is None else torch.rand(40).to(weight_type)
    logits = logits.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = module(logits, target, weight)
        with retinanet_ext.patch("mmdet"):
            found = module(logits, target, weight)
    if dtype != torch.float64 or not autocast:  # (autocast narrows mmdet's float64 in places)
        assert found.dtype == expected.dtype
    assert found.item() == pytest.approx(expected.item(), rel=3e-2)
    assert calls == ["sigmoid_focal_loss"]


def test_no_rows(losses):
    logits, target = draw(0)
    module = losses.FocalLoss()
    for options in ({}, {"avg_factor": 2}, {"reduction_override": "sum"}, {"weight": torch.ones(0)}):
        expected = module(logits, target, **options)
        with retinanet_ext.patch("mmdet"):
            torch.testing.assert_close(module(logits, target, **options), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"activated": True}, {}),
        ({"alpha": -1.0}, {}),
        ({"gamma": -0.5}, {}),
        ({}, {"target": torch.full((40,), NUM_CLASSES + 1)}),
        ({}, {"target": torch.full((40,), -1)}),
        ({}, {"avg_factor": 3.0, "reduction_override": "sum"}),
        ({}, {"reduction_override": "median"}),
        ({}, {"weight": torch.ones(39)}),
        ({}, {"weight": torch.ones(40, 2)}),
    ],
    ids=[
        "probabilities",
        "alpha",
        "gamma",
        "label above",
        "label below",
        "averaged sum",
        "reduction",
        "weights",
        "weights 2d",
    ],
)
def test_what_only_mmdet_defines_goes_to_mmdet(losses, calls, settings, arguments):
    logits, target = draw()
    module = losses.FocalLoss(**settings)
    arguments = {"target": target, **arguments}
    assert_same_loss(lambda logits: module(logits.sigmoid() if module.activated else logits, **arguments), logits)
    assert calls == []


def test_functions_that_somebody_has_replaced_are_theirs(losses, monkeypatch, calls):
    original = losses.py_sigmoid_focal_loss
    monkeypatch.setattr(
        losses, "py_sigmoid_focal_loss", lambda *arguments, **options: 3 * original(*arguments, **options)
    )
    logits, target = draw()
    module = losses.FocalLoss()
    loss = assert_same_loss(lambda logits: module(logits, target), logits)
    assert loss.item() == pytest.approx(3 * original(logits, torch.eye(NUM_CLASSES + 1)[target, :-1]).item(), rel=1e-4)


def test_overridden_forward_of_a_subclass_stays(losses, calls):
    class Half(losses.FocalLoss):
        def forward(self, pred, target, **options):
            return 0.5 * super().forward(pred, target, **options)

    logits, target = draw()
    assert_same_loss(lambda logits: Half()(logits, target), logits)
    assert calls == ["sigmoid_focal_loss"]


def test_mmdet_itself_was_what_was_compared_with(losses):
    if not is_installed("mmdet"):
        pytest.skip("mmdet is not installed: what stands in for it was compared with")
    assert "standins" not in inspect.getsourcefile(losses)
