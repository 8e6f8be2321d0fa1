"""Writes all mutants of a source text into it, each behind its number: one build then serves for every mutant.

What chooses among them while the program runs is tests/emulator/mutants.h.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from kernel_mutants import SHIFTS, Mutant

HEADER = "tests/emulator/mutants.h"
NONE = -1  # the number of no mutant


def write_switches(source: str, numbers: Mapping[Mutant, int]) -> str:
    """The source with the mutants of `numbers` behind their numbers. Lines keep their places."""
    places: dict[tuple[str, int, int], dict[str, int]] = {}
    for mutant, number in numbers.items():
        places.setdefault((mutant.kind, mutant.start, mutant.end), {})[mutant.text] = number
    insertions: list[tuple[int, str]] = []
    for (kind, start, end), by_text in places.items():
        insertions += _insertions(source, kind, start, end, by_text)
    for position, text in sorted(insertions, reverse=True):
        source = source[:position] + text + source[position:]
    return source


def _insertions(source: str, kind: str, start: int, end: int, by_text: dict[str, int]) -> list[tuple[int, str]]:
    text = source[start:end]
    if kind == "comparison":
        first, second = (by_text.get(shifted, NONE) for shifted in SHIFTS[text])
        return [(end, f" mutants::at({first}, {second}) {text}")]
    if kind == "barrier":
        ((becomes, number),) = by_text.items()
        kept = f"{' '.join(becomes.split())} : " if becomes else "(void)0 : (void)"
        return [(start, f"(mutants::is({number}) ? {kept}"), (end, ")")]
    if kind in ("start", "size"):
        return [(end, f" {_shift(by_text, ' 1 +', ' -1 +')}")]
    if kind == "literal":
        suffix = re.match(r"\w*", source[end:])[0]
        value = int(text)
        return [(start, f"({_shift(by_text, str(value + 1), str(value - 1))} "), (end + len(suffix), ")")]
    assert kind == "minmax", kind
    return [(start, f"({_shift(by_text, f'(1 + {text})', f'(-1 + {text})')} "), (end, ")")]


def _shift(by_text: dict[str, int], up: str, down: str) -> str:
    numbers = by_text.get(up, NONE), by_text.get(down, NONE)
    assert len(by_text) == sum(number != NONE for number in numbers), by_text
    return f"mutants::shift({numbers[0]}, {numbers[1]}) +"
