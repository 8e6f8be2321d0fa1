"""Budgets of the compiled CUDA kernels: registers, spills, access widths, special-function instructions an element.

    python tests/sass.py [LIBRARY] [--write-budget]

prints, for each kernel, registers, stack, loads and stores by width and special-function instructions (MUFU), then what
an element costs on the fast path (sass_code.py says what that is). LIBRARY is the _C_cuda.so of the installed package
unless given. NVIDIA's ``cuobjdump`` and ``nvdisasm`` do the disassembly.

Each csrc/*/*_sass.json has

``limits``    written by hand, in design terms. ``kernel`` is a pattern (fnmatch) over names like
              ``focal_index_kernel<BFloat16, kSum, kTwo, false>``; every entry whose pattern matches applies, and the
              last that sets a key decides. ``registers``: at most so many a thread. ``stack``: bytes, 0 unless given;
              spills go there. ``fast_path``: as many ``loops`` (1 unless given) evaluate ``vectors`` of ``width``
              elements a thread with exactly these ``loads`` and ``stores`` by bits, at most so many ``mufu`` of each
              kind an element, and neither calls nor local memory. ``why`` is for the reader.
``recorded``  written by ``--write-budget``: what one compiler made of each kernel, whole (with its loads and stores by
              bits) and an element of the fast path. A count that differs by more than ``RECORDED_TOLERANCE``, up or
              down, is to be looked at and recorded anew.

All of it holds for sm_90; the table shows every architecture of the library.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import sass_code as code
from sass_code import Instruction, Kernel

RECORDED_TOLERANCE = 0.05
KEYS = {"kernel", "registers", "stack", "fast_path", "why"}
FAST_PATH_KEYS = {"vectors", "width", "loads", "stores", "mufu"}
# Instructions a clock and multiprocessor of sm_90, and the H200's multiprocessors and clock in GHz, for the table.
RATES = {"issue": 128, "fma": 128, "alu": 64, "mufu": 16}
MULTIPROCESSORS, GIGAHERTZ = 132, 1.98


@dataclass
class Budget:
    path: Path
    limits: list[dict]
    recorded: dict

    def covers(self, kernel: Kernel) -> bool:
        return any(fnmatchcase(kernel.name, entry["kernel"]) for entry in self.limits)


def read_budgets(root: Path = code.ROOT) -> list[Budget]:
    """Every csrc/*/*_sass.json. A misspelt key would check nothing, so it is an error."""
    budgets = []
    for path in sorted(root.glob("csrc/*/*_sass.json")):
        content = json.loads(path.read_text())
        for entry in content["limits"]:
            fast_path = entry.get("fast_path", dict.fromkeys(FAST_PATH_KEYS)).keys()
            if not entry.keys() <= KEYS or fast_path - {"loops"} != FAST_PATH_KEYS:
                raise ValueError(f"{path}: keys of {entry}")
            if "fast_path" in entry and not can_be_found(entry["fast_path"]):
                raise ValueError(f"{path}: a fast path is found by its MUFU or 128-bit accesses, {entry} has none")
        budgets.append(Budget(path, content["limits"], content.get("recorded", {})))
    return budgets


def known_by(mufu: dict[str, float]) -> str | None:
    """The special function by which a fast path is found: EX2, or the first of which each element takes a whole one."""
    return next((kind for kind in ("EX2", *mufu) if mufu.get(kind, 0) >= 1), None)


def can_be_found(fast_path: dict) -> bool:
    return known_by(fast_path["mufu"]) is not None or "128" in {**fast_path["loads"], **fast_path["stores"]}


def limits_of(kernel: Kernel, budgets: list[Budget]) -> dict:
    """All entries for a kernel in one."""
    merged: dict = {}
    for budget in budgets:
        for entry in budget.limits:
            if fnmatchcase(kernel.name, entry["kernel"]):
                merged.update(entry)
    return merged


def paths_of(kernel: Kernel, limits: dict) -> tuple[list[list[Instruction]], list[Instruction], int]:
    """The fast paths with the loads that a kernel's limits name, or else all; once around; elements of each path."""
    if "fast_path" not in limits:
        return [], [], 0
    budget = limits["fast_path"]
    vectors, width, special = budget["vectors"], budget["width"], known_by(budget["mufu"])
    count = int(budget["mufu"][special]) if special else 0
    wide_loads, wide_stores = budget["loads"].get("128", 0), budget["stores"].get("128", 0)
    found = code.fast_paths(kernel.instructions, vectors, width, special, count, wide_loads, wide_stores)
    chosen = [path for path in found.loops if code.loads(path) == budget["loads"]] or found.loops
    return chosen, found.around, vectors * width


# Checks: each returns what is wrong, in sentences.


def coverage_failures(kernels: list[Kernel], budgets: list[Budget]) -> list[str]:
    """Kernels without a limit of registers, entries without a kernel, records of kernels that are gone."""
    names = sorted({kernel.name for kernel in kernels})
    limited = {kernel.name for kernel in kernels if "registers" in limits_of(kernel, budgets)}
    failures = [f"{name}: no entry of csrc/*/*_sass.json limits its registers" for name in names if name not in limited]
    for budget in budgets:
        for pattern in (entry["kernel"] for entry in budget.limits):
            if not any(fnmatchcase(name, pattern) for name in names):
                failures.append(f"{budget.path.name}: no kernel matches {pattern}")
        for name in budget.recorded.get("kernels", {}):
            if name not in names:
                failures.append(f"{budget.path.name}: records {name}, which is no kernel of the library")
    return failures


def resource_failures(kernel: Kernel, limits: dict) -> list[str]:
    """Registers, stack, local memory."""
    who = f"{kernel.name}, {kernel.architecture}"
    registers, stack = limits.get("registers", 0), limits.get("stack", 0)
    failures = []
    if kernel.registers > registers:
        failures.append(f"{who}: {kernel.registers} registers, budget {registers}")
    if kernel.stack > stack or kernel.local:
        failures.append(f"{who}: {kernel.stack} bytes of stack, {kernel.local} of local memory, budget {stack}")
    if stack == 0 and (count := code.spills(kernel.instructions)):
        failures.append(f"{who}: {count} accesses to local memory (LDL, STL), budget 0")
    return failures


def fast_path_failures(kernel: Kernel, limits: dict) -> list[str]:
    """Access widths, special functions and calls on the fast paths."""
    paths, _, elements = paths_of(kernel, limits)
    if elements == 0:
        return []
    budget = limits["fast_path"]
    expected = budget.get("loops", 1)
    if len(paths) != expected:
        what = f"{budget['vectors']} vectors of {budget['width']} in straight-line code"
        return [f"{kernel.name}: {len(paths)} loops evaluate {what} with loads {budget['loads']}, budget {expected}"]
    failures = []
    for path in paths:
        who = f"{kernel.name}, loop at {path[0].address:#x}"
        for what, found in (("loads", code.loads(path)), ("stores", code.stores(path))):
            if found != budget[what]:
                failures.append(f"{who}: {what} by bits {found}, budget {budget[what]}")
        for kind, count in code.special_functions(path).items():
            limit = budget["mufu"].get(kind, 0)
            if count > limit * elements:
                failures.append(f"{who}: {count / elements:.4g} MUFU.{kind} an element, budget {limit}")
        if wrong := [one.opcode for one in path if one.base in ("CALL", "RET", "BRX", "JMX", "LDL", "STL")]:
            failures.append(f"{who}: {', '.join(wrong)}, budget none")
    return failures


def record(kernel: Kernel, limits: dict) -> dict[str, float | list[float] | dict[str, int]]:
    """Instructions, MUFU, loads and stores by bits of the whole kernel; an element's instructions and float operations
    on each fast path, and its instructions once around the outermost loop, which is a tile with all its overhead."""
    body = [one for one in kernel.instructions if one.base != "NOP"]
    numbers = {
        "instructions": len(body),
        "mufu": sum(code.special_functions(body).values()),
        "loads": code.loads(body),
        "stores": code.stores(body),
    }
    paths, around, elements = paths_of(kernel, limits)
    if paths:
        numbers["issue"] = [round(len(path) / elements, 2) for path in paths]
        numbers["float"] = [round(code.float_operations(path) / elements, 2) for path in paths]
        numbers["tile"] = round(len(around) / elements, 2)
    return numbers


def record_failures(kernel: Kernel, limits: dict, recorded: dict | None) -> list[str]:
    found = record(kernel, limits)

    def close(now: float, then: float) -> bool:
        return abs(now - then) <= RECORDED_TOLERANCE * then

    def same(now: float | list[float] | dict[str, int], then: float | list[float] | dict[str, int]) -> bool:
        if isinstance(now, dict):
            return isinstance(then, dict) and now.keys() == then.keys() and all(close(now[k], then[k]) for k in now)
        if isinstance(now, list):
            return isinstance(then, list) and len(now) == len(then) and all(map(close, now, then))
        return close(now, then)

    if recorded is None or recorded.keys() != found.keys():
        return [f"{kernel.name}: recorded {recorded}, now {found}"]
    return [
        f"{kernel.name}: {name} {found[name]}, recorded {recorded[name]}"
        for name in found
        if not same(found[name], recorded[name])
    ]


def write_budget(budget: Budget, kernels: list[Kernel], budgets: list[Budget]) -> None:
    """Records what this library has and leaves the limits as they are; a line an entry, for readable differences."""
    covered = [kernel for kernel in kernels if kernel.architecture == code.ARCHITECTURE and budget.covers(kernel)]
    compiler = covered[0].compiler if covered else "unknown"
    records = {kernel.name: record(kernel, limits_of(kernel, budgets)) for kernel in covered}
    limits = ",\n".join(f"    {json.dumps(entry)}" for entry in budget.limits)
    lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in records.items())
    budget.path.write_text(
        f'{{\n  "limits": [\n{limits}\n  ],\n'
        f'  "recorded": {{\n    "compiler": "{compiler}",\n    "kernels": {{\n{lines}\n    }}\n  }}\n}}\n'
    )


# The table.


def bound(path: list[Instruction], elements: int) -> str:
    """Picoseconds an element that the busiest unit needs, and that unit."""
    work = Counter({"issue": len(path), **Counter(map(code.pipe, path))})
    unit = max(RATES, key=lambda name: work[name] / RATES[name])
    return f"{work[unit] / RATES[unit] / elements / MULTIPROCESSORS / GIGAHERTZ * 1e3:.2f} {unit}"


def listed(counts: dict[str, float]) -> str:
    return " ".join(f"{name}:{count:.4g}" for name, count in counts.items()) or "-"


def kernel_row(kernel: Kernel) -> dict[str, object]:
    body = kernel.instructions
    return {
        "kernel": kernel.name,
        "arch": kernel.architecture,
        "registers": kernel.registers,
        "stack": kernel.stack,
        "local": kernel.local,
        "shared": kernel.shared,
        "LDL+STL": code.spills(body),
        "loads": listed(code.loads(body)),
        "stores": listed(code.stores(body)),
        "MUFU": listed(code.special_functions(body)),
    }


def fast_path_rows(kernel: Kernel, limits: dict) -> list[dict[str, object]]:
    paths, around, elements = paths_of(kernel, limits)
    rows = []
    for path in paths:
        units = Counter(map(code.pipe, path))
        counts = {
            "issue": len(path),
            "float": code.float_operations(path),
            "fma": units["fma"],
            "alu": units["alu"],
            "tile": len(around),
        }
        rows.append(
            {
                "fast path, per element": kernel.name,
                "loop": f"{path[0].address:#x}",
                "elements": elements,
                **{name: f"{count / elements:.2f}" for name, count in counts.items()},
                "MUFU": listed({kind: count / elements for kind, count in code.special_functions(path).items()}),
                "loads": listed(code.loads(path)),
                "stores": listed(code.stores(path)),
                "LDL+STL": code.spills(path),
                "ps >=": bound(path, elements),
            }
        )
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    lines = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()


def default_library() -> Path | None:
    """_C_cuda.so of the retinanet_ext that Python would import."""
    spec = importlib.util.find_spec("retinanet_ext")
    libraries = [Path(folder) / "_C_cuda.so" for folder in (spec.submodule_search_locations or [] if spec else [])]
    return next((library for library in libraries if library.is_file()), None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, spills, load widths and special functions of the kernels.")
    parser.add_argument("library", nargs="?", type=Path, help="_C_cuda.so; that of the installed package if absent")
    parser.add_argument("--write-budget", action="store_true", help="record the counts in csrc/*/*_sass.json")
    arguments = parser.parse_args()
    library = arguments.library or default_library()
    if library is None or not library.is_file():
        sys.exit(f"no CUDA library at {library or 'retinanet_ext/_C_cuda.so'}: build with RETINANET_EXT_CUDA=1")
    try:
        kernels = code.read_library(library)
    except code.ToolMissing as missing:
        sys.exit(str(missing))
    budgets = read_budgets()
    if not kernels:
        sys.exit(f"{library} holds no kernel")
    print_table([kernel_row(kernel) for kernel in kernels])
    rows = [
        row for kernel in kernels if kernel.instructions for row in fast_path_rows(kernel, limits_of(kernel, budgets))
    ]
    if rows:
        print_table(rows)
    if arguments.write_budget:
        for budget in budgets:
            write_budget(budget, kernels, budgets)


if __name__ == "__main__":
    main()
