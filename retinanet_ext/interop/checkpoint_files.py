"""Reading checkpoint files of any origin without running code that may be in them."""

from __future__ import annotations

import io
import pickle
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.config import CHECKPOINT_FORMAT

# What files of weights are made of. Everything else becomes an `Unread`: nothing of it is imported or called.
_SAFE = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("numpy.core.multiarray", "numpy._core.multiarray")
      for name in ("_reconstruct", "scalar")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}  # fmt: skip
_STORAGES = {
    f"{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
}
# Where people keep the weights inside what they save, in this order.
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")


class Unread:
    """Stands for an object whose class is not one that weights are made of: it takes whatever it is given."""

    def __init__(self, *_args: Any, **_kwargs: Any):
        pass

    def __setstate__(self, _state: Any) -> None:
        pass

    def __call__(self, *_args: Any, **_kwargs: Any) -> Unread:
        return self

    def append(self, _item: Any) -> None:
        pass

    def extend(self, _items: Any) -> None:
        pass

    def __setitem__(self, _key: Any, _value: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _SAFE or (module == "torch" and (name in _STORAGES or _is_dtype(name))):
            return super().find_class(module, name)
        return Unread


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def _load(stream: Any, **options: Any) -> Any:
    return _Unpickler(stream, **options).load()


# What torch.load takes as a pickle module.
_restricted = types.ModuleType("retinanet_ext_restricted_pickle")
_restricted.Unpickler = _Unpickler
_restricted.load = _load
_restricted.loads = lambda data, **options: _load(io.BytesIO(data), **options)
_restricted.UnpicklingError = pickle.UnpicklingError


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint file.

    Args:
        path: what ``torch.save`` wrote (``.pt``, ``.pth``; zip or the older format), or a pickle of NumPy arrays, as
            detectron2's model zoo has it (``.pkl``). The weights are the file itself, or its entry ``model``,
            ``state_dict``, ``model_state_dict`` or ``module``; a prefix ``module.`` of every name, as data parallel
            training leaves it, is dropped.

    Returns:
        Name to tensor, on the CPU. Objects that are no tensors are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is cut short, is no checkpoint, holds no tensors, or is a TorchScript archive, whose
            code would run.

    No code in the file is run: only tensors, arrays, numbers, texts and containers are made; objects of any other
    class (an optimizer's, a config's, a logger's) are passed over.
    """
    return read_weights_and_order(path)[0]


def read_weights_and_order(path: str | Path) -> tuple[dict[str, Tensor], str | None]:
    """What `read_weights` returns, and how the saved model orders the anchors of a cell ("ratio" or "size", see
    `models.AnchorGenerator`): a checkpoint of this library says so; None for any other file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = _read(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, OSError, TypeError,
            AttributeError, ImportError, UnicodeDecodeError, MemoryError) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cannot be read as a checkpoint: {reason}") from error
    order = _anchor_order(content)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    weights = _tensors(content) if isinstance(content, Mapping) else {}
    if not weights:
        raise ValueError(f"{path}: holds no weights: expected names and tensors, found {_what_is_held(content)}")
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights, order


def _anchor_order(content: Any) -> str | None:
    if not isinstance(content, Mapping) or content.get("format") != CHECKPOINT_FORMAT:
        return None
    return content["model_config"].get("anchor_order", "ratio")


def _what_is_held(content: Any) -> str:
    if isinstance(content, Mapping):
        return ", ".join(map(str, list(content)[:5])) or "nothing"
    if isinstance(content, Unread):
        return "an object that is not read: save its state_dict()"
    return type(content).__name__


def _read(path: Path) -> Any:
    _reject_compiled(path)
    if zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_restricted)
    with open(path, "rb") as stream:
        if path.suffix == ".pkl":
            return _load(stream, encoding="latin1")  # Python 2 wrote many of them
        return torch.load(stream, map_location="cpu", weights_only=False, pickle_module=_restricted)


def _reject_compiled(path: Path) -> None:
    """`torch.load` hands a TorchScript archive to `torch.jit.load`, which runs code of its.

    How to tell one is `torch.load`'s own way: another reader might see another file.
    """
    with open(path, "rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            return
    if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise ValueError("it is a TorchScript archive, which has code to run: save the model's state_dict() instead")


def _tensors(content: Mapping) -> dict[str, Tensor]:
    weights = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.array(value))
        if isinstance(name, str) and isinstance(value, Tensor):
            weights[name] = value.detach()
    return weights
