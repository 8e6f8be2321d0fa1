"""Other people's code on the operators of this library: `patch` a package, `accelerate` a model.

Nothing here imports another library before it is asked for.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from .._load import CUDA_MISSING
from .accelerated import restore as restore_class
from .patching import Patch

Model = TypeVar("Model", bound=nn.Module)

PEERS = ("torchvision", "detectron2", "mmcv", "mmdet")  # each with a module of its name beside this one
# The models that `accelerate` takes: where their class is, and the module beside this one that has our methods.
_RETINANETS = (
    ("torchvision.models.detection.retinanet", "torchvision_retinanet"),
    ("detectron2.modeling.meta_arch.retinanet", "detectron2_retinanet"),
)


def patch(peer: str, functions: str | Iterable[str] | None = None) -> Patch:
    """Puts this library's functions in the place of another package's, until `Patch.undo` or the end of a ``with``.

    ::

        retinanet_ext.patch("torchvision")  # from here on

        with retinanet_ext.patch("torchvision", functions=["nms", "batched_nms"]):
            ...

    A function is replaced wherever the peer's loaded modules name it; it keeps its signature, and what ours cannot
    compute as the original does goes to the original. ``docs/interop.md`` says what is equal and what differs.
    Names that other code imported from the peer before the patch keep the original; those imported while a patch
    holds follow it, and are the original's again afterwards.

    Where there is a GPU and this library was built without CUDA, a RuntimeWarning says that CUDA tensors stay with the
    originals.

    A patch holds for the whole process, all threads of it. Patches may overlap and be undone in any order: a
    function is ours while any patch that names it holds.

    Args:
        peer: the package: "torchvision", "detectron2", "mmcv" or "mmdet".
        functions: which of its functions; all if None.
            torchvision: "nms", "batched_nms", "sigmoid_focal_loss", "box_iou", and "retinanet", the losses and the
            post-processing of every torchvision RetinaNet.
            detectron2: "batched_nms", "pairwise_iou", "sigmoid_focal_loss" (fvcore's, also the scripted one), and
            "retinanet", the matching, the losses and the inference of every detectron2 RetinaNet.
            mmcv: "nms", "batched_nms", "sigmoid_focal_loss".
            mmdet: those of mmcv, its own "sigmoid_focal_loss" with it, "py_sigmoid_focal_loss", and the classes
            "FocalLoss" and "MaxIoUAssigner".

    Returns:
        A `Patch`, in force already: a context manager, with ``undo()``.

    Raises:
        ValueError: an unknown peer, or a function that is not known of it; the message names those that are.
        ImportError: the peer is not installed.
        RuntimeError: the installed release of the peer has a function of another signature.
    """
    if peer not in PEERS:
        raise ValueError(f"patch: peer: expected one of {PEERS}, got {peer!r}")
    known = _replacements(peer)
    if functions is None:
        names = tuple(known)
    else:
        names = (functions,) if isinstance(functions, str) else tuple(functions)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"patch: functions: expected some of {tuple(known)}, got {unknown or names!r}")
    held = Patch(peer, {name: known[name] for name in names})
    _say_if_a_gpu_is_left_out("patch")
    return held


def accelerate(model: Model) -> Model:
    """Gives a torchvision or detectron2 RetinaNet this library's losses and post-processing, in place.

    ::

        model = retinanet_ext.accelerate(torchvision.models.detection.retinanet_resnet50_fpn_v2())

    The same losses, gradients and detections (docs/interop.md has the small print), the same parameters, buffers,
    attributes and state dict; the model's class becomes a subclass of what it was. Its settings are read at every
    call: thresholds and limits of the detections, those of the matcher, the box coder and the losses. Where a
    matcher, coder or head is not the peer's own, that part runs as it is. An accelerated model is returned as it is.
    `restore` undoes it.

    Args:
        model: a ``torchvision.models.detection.RetinaNet``, or a
            ``detectron2.modeling.meta_arch.retinanet.RetinaNet`` of release 0.6 or newer; built in whatever way, or of
            a subclass.

    Returns:
        ``model``.

    Raises:
        TypeError: anything else.
        ValueError: a subclass that overrides all the methods that ours would stand in for, which leaves nothing to
            accelerate.
        RuntimeError: a RetinaNet of an older detectron2.
    """
    for where, ours in _RETINANETS:
        module = sys.modules.get(where)
        if module is not None and isinstance(model, module.RetinaNet):
            accelerated = importlib.import_module(f"{__package__}.{ours}").ACCELERATION.accelerate(model)
            _say_if_a_gpu_is_left_out("accelerate")
            return accelerated
    expected = " or a ".join(f"{where}.RetinaNet" for where, _ in _RETINANETS)
    raise TypeError(f"accelerate: model: expected a {expected}, got {_type_name(model)}")


def restore(model: Model) -> Model:
    """Gives a model that `accelerate` changed its own class back, in place; any other model is left as it is.

    Raises:
        TypeError: the model's class has been changed again since (as FSDP's ``fully_shard`` does).
    """
    return restore_class(model)


def _say_if_a_gpu_is_left_out(caller: str) -> None:
    """Our operators themselves are an error there; what stands in for a peer's leaves the work to it."""
    if CUDA_MISSING is not None and torch.cuda.is_available():
        message = f"{caller}: {CUDA_MISSING}: CUDA tensors stay with the functions of the package itself"
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _replacements(peer: str):
    try:
        importlib.import_module(peer)
    except ModuleNotFoundError as error:
        if error.name != peer:
            raise
        raise ImportError(f"patch: {peer} is not installed here, so there is nothing to patch", name=peer) from None
    return importlib.import_module(f"{__package__}.{peer}").REPLACEMENTS
