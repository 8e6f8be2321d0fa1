"""What the blocks of report.py are made of: a results file read, a number and a table written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class ReportError(ValueError):
    """A block that cannot be written, with the reason."""


def read(name: str, folder: Path) -> dict[str, Any]:
    path = folder / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ReportError(f"{path}: there is no such results file") from None
    except ValueError as error:
        raise ReportError(f"{path}: no results file: {error}") from None


def number(value: float) -> str:
    """Three digits, never in powers of ten."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def link(name: str) -> str:
    return f"[results](../benchmarks/results/{name}.json)"
