"""A torchvision RetinaNet that becomes an instance of a subclass of its class, with our methods; and back."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn
from torchvision.models.detection import retinanet as tv_retinanet

from .torchvision_retinanet import OURS, THEIRS, RetinaNet
from .torchvision_stock import is_of


def prepare_scriptable(self: RetinaNet) -> RetinaNet:
    """For ``torch.jit.script``: the same model and parameters, with torchvision's methods where it has ours."""
    cls = type(self)
    ours = [name for name, method in OURS.items() if getattr(cls, name) is method]
    plain = copy.copy(self)
    plain.__class__ = type(cls.__name__, (cls,), {name: THEIRS[name] for name in ours})
    return plain


RETINANET_METHODS = {**OURS, "__prepare_scriptable__": prepare_scriptable}


class Accelerated:
    """Marks the classes that `accelerate` makes; the class that the model had is `accelerated_from`."""

    accelerated_from: type[RetinaNet]

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # The class is made when it is needed, so it cannot be found by its name.
        state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)
        return _empty_model, (self.accelerated_from,), state


def accelerate(model: RetinaNet) -> RetinaNet:
    if not isinstance(model, Accelerated):
        model.__class__ = _accelerated_class(type(model))
    return model


def restore(model: nn.Module) -> nn.Module:
    if isinstance(model, Accelerated):
        model.__class__ = model.accelerated_from
    return model


@functools.cache
def _accelerated_class(cls: type[RetinaNet]) -> type[RetinaNet]:
    """Methods that a subclass overrides stay as they are."""
    methods = {
        name: method
        for name, method in OURS.items()
        if getattr(cls, name) in (THEIRS[name], method) and is_of(THEIRS[name], tv_retinanet)
    }
    if not methods:
        raise ValueError(
            f"accelerate: model: {cls.__module__}.{cls.__qualname__} has {', '.join(OURS)} of its own, "
            "and nothing is left to accelerate"
        )
    namespace = {
        **methods,
        "__prepare_scriptable__": prepare_scriptable,
        "__module__": __name__,
        "__doc__": cls.__doc__,
        "accelerated_from": cls,
    }
    return type(f"Accelerated{cls.__name__}", (Accelerated, cls), namespace)


def _empty_model(cls: type[RetinaNet]) -> RetinaNet:
    """For copy and pickle, which set its state."""
    accelerated = _accelerated_class(cls)
    return accelerated.__new__(accelerated)
