"""The packages whose functions are patched, for tests: the installed ones, and stand-ins for those that are not.

Stand-ins (tests/standins) have the interface and the conventions of the real packages, in code of their own: what is
compared with them is an adapter's handling of arguments, labels and edge cases. What is installed is taken instead.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import torch

from retinanet_ext import interop, ops

STANDINS = Path(__file__).parent / "standins"


def is_installed(name: str) -> bool:
    """Whether the package itself is there, not what stands in for it."""
    module = sys.modules.get(name)
    spec = module.__spec__ if module is not None else importlib.util.find_spec(name)
    return spec is not None and not str(spec.origin).startswith(str(STANDINS))


@contextlib.contextmanager
def importable(*names: str) -> Iterator[None]:
    """The packages can be imported inside the block; stand-ins, and the adapters to them, are unloaded after it."""
    before = set(sys.modules)
    sys.path.append(str(STANDINS))  # behind what is installed
    importlib.invalidate_caches()
    try:
        if "mmcv" in names and is_installed("mmcv"):
            _complete_mmcv()
        yield
    finally:
        sys.path.remove(str(STANDINS))
        if not all(is_installed(name) for name in names):
            for name in set(sys.modules) - before:
                package, _, attribute = name.rpartition(".")
                if name.partition(".")[0] in names or (package == interop.__name__ and attribute.startswith(names)):
                    del sys.modules[name]
                    vars(interop).pop(attribute if package == interop.__name__ else None, None)


def forget_adapters(monkeypatch, peer: str) -> None:
    """The adapters to a peer are loaded anew in this test."""
    prefix = f"{interop.__name__}."
    for name in [name for name in sys.modules if name.startswith(prefix + peer)]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(interop, name.removeprefix(prefix), None)  # put back afterwards, whatever is loaded
        delattr(interop, name.removeprefix(prefix))


def _complete_mmcv() -> None:
    """mmcv-lite has no compiled operators, and its releases without an mmcv of theirs are newer than mmdet takes."""
    import mmcv

    if importlib.util.find_spec("mmcv._ext") is None:
        spec = importlib.util.spec_from_file_location("mmcv._ext", STANDINS / "mmcv" / "_ext.py")
        sys.modules["mmcv._ext"] = mmcv._ext = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mmcv._ext)
    mmcv.__version__ = "2.1.0"


def attributes(*packages: str) -> dict[tuple[str, str], object]:
    """Every attribute of the packages' loaded modules and of the classes in them, to compare by identity."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in packages or not isinstance(module, ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            found[name, attribute] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {(f"{name}.{attribute}", entry): member for entry, member in vars(value).items()}
    return found


def changes(before: dict, after: dict) -> set[tuple[str, str]]:
    missing = object()
    return {key for key in before | after if before.get(key, missing) is not after.get(key, missing)}


def record_calls(monkeypatch, names: Iterable[str]) -> list[str]:
    """A list that the names of our operators are added to as they are called."""
    seen: list[str] = []

    def recorded(name, function):
        @functools.wraps(function)
        def call(*arguments, **options):
            seen.append(name)
            return function(*arguments, **options)

        return call

    for name in names:
        monkeypatch.setattr(ops, name, recorded(name, getattr(ops, name)))
    return seen


def random_boxes(count: int, side: float = 100.0) -> torch.Tensor:
    corners = torch.rand(count, 2) * side
    return torch.cat([corners, corners + 1 + torch.rand(count, 2) * side], dim=1)


def assert_same(found: object, expected: object) -> None:
    """The same bits, type and all."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def outcome(function: Callable, *arguments, **options):
    """What a call returns, or the type and the words of its error."""
    try:
        return function(*arguments, **options)
    except Exception as error:
        return type(error), str(error)
