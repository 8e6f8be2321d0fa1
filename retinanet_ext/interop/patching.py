"""Putting functions in the place of a package's own, and its own back: counted, whatever the order."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

_lock = threading.RLock()
_MISSING = object()


class Replacement(ABC):
    """Something of a peer that can be ours for a while: as long as any patch holds it."""

    holders = 0

    @property
    def held(self) -> bool:
        return self.holders > 0

    def hold(self) -> None:
        with _lock:
            if not self.holders:
                self._install()
            self.holders += 1

    def release(self) -> None:
        with _lock:
            self.holders -= 1
            if not self.holders:
                self._remove()

    @abstractmethod
    def _install(self) -> None: ...

    @abstractmethod
    def _remove(self) -> None: ...


class FunctionReplacement(Replacement):
    """A function, wherever the loaded modules of the packages have it as an attribute.

    `replacement` has the original's signature and calls `original` itself where it is not `held`: code that took
    it from a package in the meantime may keep it. `declared` has the signature where `original`, a compiled function,
    does not tell it.
    """

    def __init__(
        self,
        packages: str | Sequence[str],
        original: Callable,
        replacement: Callable,
        declared: Callable | None = None,
    ):
        self.packages = (packages,) if isinstance(packages, str) else tuple(packages)
        self.original = original
        self.declared = original if declared is None else declared
        self.signature = inspect.signature(replacement)
        # Not what the original carries besides: torch.compile finds a compiled function's source there.
        self.replacement = functools.update_wrapper(replacement, self.declared, updated=())
        self.replacement.__wrapped__ = original
        # What torch.jit.script compiles in its place, also inside other functions.
        functions = [function for function in (original, self.declared) if inspect.isfunction(function)]
        self.replacement.__prepare_scriptable__ = lambda: (functions or [original])[0]
        self.replacement.__retinanet_ext_original__ = original
        self._sites: list[tuple[ModuleType, str]] = []

    def _install(self) -> None:
        _check_signature(self.packages[0], self.replacement.__qualname__, self.declared, self.signature)
        self._sites = self._attributes_that_are(self.original)
        for module, name in self._sites:
            setattr(module, name, self.replacement)

    def _remove(self) -> None:
        # Modules that were loaded in the meantime have imported the replacement; what somebody else has put in its
        # place is not ours to change.
        for module, name in {*self._sites, *self._attributes_that_are(self.replacement)}:
            if vars(module).get(name) is self.replacement:
                setattr(module, name, self.original)
        self._sites = []

    def _attributes_that_are(self, function: Callable) -> list[tuple[ModuleType, str]]:
        return [
            (module, attribute)
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] in self.packages and isinstance(module, ModuleType)
            for attribute, value in list(vars(module).items())
            if value is function
        ]


class MethodsReplacement(Replacement):
    """Methods of a class, for all its instances."""

    def __init__(self, cls: type, methods: Mapping[str, Callable]):
        self.cls = cls
        self.methods = dict(methods)
        self._originals: dict[str, object] = {}

    def _install(self) -> None:
        originals = {name: vars(self.cls).get(name, _MISSING) for name in self.methods}
        for name, original in originals.items():
            if original is not _MISSING:
                package = self.cls.__module__.partition(".")[0]
                signature = inspect.signature(self.methods[name])
                _check_signature(package, f"{self.cls.__qualname__}.{name}", original, signature)
        self._originals = originals
        for name, method in self.methods.items():
            setattr(self.cls, name, method)

    def _remove(self) -> None:
        for name, original in self._originals.items():
            if vars(self.cls).get(name) is not self.methods[name]:
                continue  # somebody else's by now
            if original is _MISSING:
                delattr(self.cls, name)
            else:
                setattr(self.cls, name, original)
        self._originals = {}


class Group(Replacement):
    """Several that come and go under one name."""

    def __init__(self, *parts: Replacement):
        self.parts = parts

    def _install(self) -> None:
        installed: list[Replacement] = []
        try:
            for part in self.parts:
                part.hold()
                installed.append(part)
        except BaseException:
            for part in reversed(installed):
                part.release()
            raise

    def _remove(self) -> None:
        for part in reversed(self.parts):
            part.release()


def original_of(function: object) -> object:
    """The function that a replacement stands in for; any other object is its own."""
    return getattr(function, "__retinanet_ext_original__", function)


def _check_signature(package: str, name: str, original: Callable, expected: inspect.Signature) -> None:
    signature = inspect.signature(original)
    if _parameters(signature) != _parameters(expected):
        raise RuntimeError(
            f"patch: {name}: expected {expected}, as in the releases of {package} that this one was made for; "
            f"the installed one has {signature}"
        )


def _parameters(signature: inspect.Signature) -> list[tuple[str, object, object]]:
    """Without annotations, which one module writes as types and another as text."""
    return [(parameter.name, parameter.kind, parameter.default) for parameter in signature.parameters.values()]


class Patch:
    """What `retinanet_ext.patch` returns: in force from its making until `undo`.

    As a context manager it is undone at the end of the block, also by an exception. It serves once: to patch
    again, call `retinanet_ext.patch` again.

    Attributes:
        peer: the package.
        functions: the names that it holds.
        active: False once undone.
    """

    def __init__(self, peer: str, replacements: Mapping[str, Replacement]):
        self.peer = peer
        self.functions = tuple(replacements)
        self._held: list[Replacement] = []
        self._entered = False
        with _lock:
            try:
                for replacement in replacements.values():
                    replacement.hold()
                    self._held.append(replacement)
            except BaseException:
                self.undo()
                raise

    @property
    def active(self) -> bool:
        return bool(self._held)

    def undo(self) -> None:
        """Lets go of the functions: the peer has its own back, unless another patch holds them. Again: nothing."""
        with _lock:
            held, self._held = self._held, []
            for replacement in reversed(held):
                replacement.release()

    def __enter__(self) -> Patch:
        if self._entered or not self.active:
            state = "has been entered" if self._entered else "has been undone"
            raise RuntimeError(f"this patch of {self.peer} {state} already: call retinanet_ext.patch for a new one")
        self._entered = True
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        return f"<retinanet_ext patch of {self.peer}: {', '.join(self.functions)} ({state})>"
