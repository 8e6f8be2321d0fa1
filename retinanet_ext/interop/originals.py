"""Whether something of a peer is what the peer wrote: not overridden, replaced, hooked or compiled by somebody else."""

from __future__ import annotations

import sys
from types import ModuleType

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils import _contextlib

from .patching import original_of

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def has_own(instance: object, cls: type, *methods: str) -> bool:
    """Whether the instance runs these methods of ``cls``, and they are those of the module that defines it."""
    return isinstance(instance, cls) and all(
        name in vars(cls)
        and getattr(type(instance), name, None) is vars(cls)[name]
        and name not in vars(instance)
        and is_of(vars(cls)[name], sys.modules[cls.__module__])
        for name in methods
    )


def is_of(function: object, module: ModuleType) -> bool:
    """Whether a function was defined in this module, or is our stand-in for one that was."""
    function = original_of(function)
    while getattr(function, "__globals__", None) is vars(_contextlib):  # torch.no_grad() and its kind as decorators
        function = function.__wrapped__
    return getattr(function, "__globals__", None) is vars(module)


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module is calling its ``forward`` and nothing else: no hooks, not compiled by itself."""
    return (
        not any(getattr(module, hooks) for hooks in _HOOKS)
        and not any(getattr(torch_module, hooks) for hooks in _GLOBAL_HOOKS)
        and getattr(module, "_compiled_call_impl", None) is None
    )
