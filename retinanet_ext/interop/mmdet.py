"""mmdet's focal loss and anchor assignment on our operators, and mmcv's operators under both.

Functions and methods with the originals' signatures (of mmdet 3.x). They compute with ours exactly what ours and
mmdet's both define and hand everything else to mmdet's own, errors among it. docs/interop.md lists what differs.
"""

from __future__ import annotations

from mmdet.models.losses import focal_loss as mmdet_focal_loss
from mmdet.models.losses.focal_loss import FocalLoss
from torch import Tensor

from . import mmcv as mmcv_adapter
from .mmcv import is_focal_loss, is_mmcv_focal_loss, is_row_labels
from .mmdet_assigner import ASSIGNER_METHODS, MaxIoUAssigner
from .mmdet_loss import reduced_focal_loss
from .ordinary import are_ordinary
from .originals import is_of
from .patching import FunctionReplacement, Group, MethodsReplacement, Replacement

_FORWARD = vars(FocalLoss)["forward"]
_REDUCTIONS = ("none", "mean", "sum")


def _is_focal_loss(pred: object, gamma: object, alpha: object, reduction: object, avg_factor: object) -> bool:
    return (
        are_ordinary(pred)
        and pred.dim() == 2
        and is_focal_loss(gamma, alpha)
        and reduction in _REDUCTIONS
        and (avg_factor is None or reduction != "sum")  # which mmdet refuses
    )


def _py_sigmoid_focal_loss(pred, target, weight=None, gamma=2.0, alpha=0.25, reduction="mean", avg_factor=None):
    """``target``: numbers in [0, 1] of the shape of ``pred`` [N, K]."""
    if (
        _PY_SIGMOID_FOCAL_LOSS.held
        and _is_focal_loss(pred, gamma, alpha, reduction, avg_factor)
        and type(target) is Tensor
        and target.shape == pred.shape
        and target.device == pred.device
        and not target.is_complex()
    ):
        loss = reduced_focal_loss(pred, target.type_as(pred), weight, gamma, alpha, reduction, avg_factor)
        if loss is not None:
            return loss
    return _PY_SIGMOID_FOCAL_LOSS.original(pred, target, weight, gamma, alpha, reduction, avg_factor)


def _sigmoid_focal_loss(pred, target, weight=None, gamma=2.0, alpha=0.25, reduction="mean", avg_factor=None):
    """``target``: the class of each row of ``pred`` [N, K]; anything but [0, K) is background."""
    if (
        _SIGMOID_FOCAL_LOSS.held
        and _is_focal_loss(pred, gamma, alpha, reduction, avg_factor)
        and is_row_labels(target, pred)
    ):
        loss = reduced_focal_loss(pred, target, weight, gamma, alpha, reduction, avg_factor)
        if loss is not None:
            return loss
    return _SIGMOID_FOCAL_LOSS.original(pred, target, weight, gamma, alpha, reduction, avg_factor)


def _forward(self, pred, target, weight=None, avg_factor=None, reduction_override=None):
    """Of classes of rows: without the one-hot matrix that mmdet makes of them on the CPU."""
    reduction = reduction_override or self.reduction
    if (
        self.use_sigmoid
        and not self.activated
        and reduction_override in (None, *_REDUCTIONS)
        and _functions_are_mmdets()
        and _is_focal_loss(pred, self.gamma, self.alpha, reduction, avg_factor)
        and is_row_labels(target, pred)
        and _are_known_on_cpu(target, pred)
    ):
        loss = reduced_focal_loss(pred, target, weight, self.gamma, self.alpha, reduction, avg_factor)
        if loss is not None:
            return self.loss_weight * loss
    return _FORWARD(self, pred, target, weight, avg_factor, reduction_override)


def _functions_are_mmdets() -> bool:
    return (
        is_of(mmdet_focal_loss.py_sigmoid_focal_loss, mmdet_focal_loss)
        and is_of(mmdet_focal_loss.sigmoid_focal_loss, mmdet_focal_loss)
        and is_mmcv_focal_loss(mmdet_focal_loss._sigmoid_focal_loss)
    )


def _are_known_on_cpu(target: Tensor, pred: Tensor) -> bool:
    """On the CPU mmdet refuses what is neither a class nor the background, K; on CUDA it is background."""
    return pred.is_cuda or bool(((target >= 0) & (target <= pred.shape[1])).all())


_PY_SIGMOID_FOCAL_LOSS = FunctionReplacement("mmdet", mmdet_focal_loss.py_sigmoid_focal_loss, _py_sigmoid_focal_loss)
_SIGMOID_FOCAL_LOSS = FunctionReplacement("mmdet", mmdet_focal_loss.sigmoid_focal_loss, _sigmoid_focal_loss)

REPLACEMENTS: dict[str, Replacement] = {
    **mmcv_adapter.REPLACEMENTS,
    "sigmoid_focal_loss": Group(mmcv_adapter.REPLACEMENTS["sigmoid_focal_loss"], _SIGMOID_FOCAL_LOSS),
    "py_sigmoid_focal_loss": _PY_SIGMOID_FOCAL_LOSS,
    "FocalLoss": MethodsReplacement(FocalLoss, {"forward": _forward}),
    "MaxIoUAssigner": MethodsReplacement(MaxIoUAssigner, ASSIGNER_METHODS),
}
