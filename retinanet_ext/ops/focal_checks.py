"""Argument checks that the focal losses share; every message names the operator, the argument, and what came."""

from __future__ import annotations

from numbers import Integral, Real

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
INTEGERS = (Integral, torch.SymInt)
NUMBERS = (Real, torch.SymFloat, torch.SymInt)


def check_dense(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, and is {type(value).__name__}")
    if value.is_nested or value.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, and is {'nested' if value.is_nested else value.layout}")


def check_real(op: str, name: str, values: Tensor) -> None:
    """A dense tensor of numbers whose values count as real ones, whatever their type."""
    check_dense(op, name, values)
    if values.is_complex():
        raise ValueError(f"{op}: {name} must be a tensor of real numbers, and is {values.dtype}")


def check_number(op: str, name: str, value: object) -> None:
    if not isinstance(value, NUMBERS):
        raise TypeError(f"{op}: {name} must be a number, and is {type(value).__name__}")


def check_alpha(op: str, alpha: object) -> None:
    check_number(op, "alpha", alpha)
    if not (0 <= alpha <= 1 or alpha == -1):
        raise ValueError(f"{op}: alpha must be in [0, 1], or -1 for no balancing, and is {alpha}")


def check_gamma(op: str, gamma: object) -> None:
    check_number(op, "gamma", gamma)
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"{op}: gamma must be finite and >= 0, and is {gamma}")
