"""A peer's model that becomes an instance of a subclass of its class, with our methods; and back."""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .originals import is_of


class Accelerated:
    """Marks the classes that `Acceleration` makes; the class that the model had is `accelerated_from`."""

    accelerated_from: type[nn.Module]
    acceleration: Acceleration

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # The class is made when it is needed, so it cannot be found by its name.
        state = self.__getstate__() if hasattr(self, "__getstate__") else vars(self)
        return _empty_model, (self.acceleration.name, self.accelerated_from), state


class Acceleration:
    """The methods of a peer's class that we have our own of.

    Attributes:
        base: the class.
        ours, theirs: the methods, by name.
        methods: what `patching.MethodsReplacement` puts into the class.
        name: the module of this package whose ``ACCELERATION`` this is.
    """

    def __init__(self, name: str, base: type[nn.Module], ours: Mapping[str, Callable], theirs: Mapping[str, Callable]):
        self.name = name
        self.base = base
        self.ours = dict(ours)
        self.theirs = dict(theirs)
        self.methods = {**self.ours, "__prepare_scriptable__": self._prepare_scriptable_method()}
        self._class_of = functools.cache(self._make_class)

    def accelerate(self, model: nn.Module) -> nn.Module:
        if not isinstance(model, Accelerated):
            model.__class__ = self._class_of(type(model))
        return model

    def empty(self, cls: type[nn.Module]) -> nn.Module:
        """For copy and pickle, which set its state."""
        accelerated = self._class_of(cls)
        return accelerated.__new__(accelerated)

    def _prepare_scriptable_method(self) -> Callable:
        def prepare_scriptable(model: nn.Module) -> nn.Module:
            """For ``torch.jit.script``: the same model and parameters, with the peer's methods where it has ours."""
            cls = type(model)
            ours = [name for name, method in self.ours.items() if getattr(cls, name) is method]
            plain = copy.copy(model)
            plain.__class__ = type(cls.__name__, (cls,), {name: self.theirs[name] for name in ours})
            return plain

        return prepare_scriptable

    def _make_class(self, cls: type[nn.Module]) -> type[nn.Module]:
        """Methods that a subclass overrides stay as they are."""
        module = sys.modules[self.base.__module__]
        methods = {
            name: method
            for name, method in self.ours.items()
            if getattr(cls, name) in (self.theirs[name], method) and is_of(self.theirs[name], module)
        }
        if not methods:
            raise ValueError(
                f"accelerate: model: {cls.__module__}.{cls.__qualname__} has {', '.join(self.ours)} of its own, "
                "and nothing is left to accelerate"
            )
        namespace = {
            **methods,
            "__prepare_scriptable__": self.methods["__prepare_scriptable__"],
            "__module__": __name__,
            "__doc__": cls.__doc__,
            "accelerated_from": cls,
            "acceleration": self,
        }
        return type(f"Accelerated{cls.__name__}", (Accelerated, cls), namespace)


def restore(model: nn.Module) -> nn.Module:
    """Gives an accelerated model its own class back; any other model is left as it is."""
    if not isinstance(model, Accelerated):
        return model
    cls = type(model)
    if "accelerated_from" not in vars(cls):  # as FSDP's fully_shard puts a class of its own on a model
        raise TypeError(
            "restore: model: expected the class that accelerate gave it, got a later one that would be lost with it: "
            f"{cls.__module__}.{cls.__qualname__}"
        )
    model.__class__ = cls.accelerated_from
    return model


def _empty_model(name: str, cls: type[nn.Module]) -> nn.Module:
    return importlib.import_module(f"{__package__}.{name}").ACCELERATION.empty(cls)
