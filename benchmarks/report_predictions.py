"""The blocks of report.py that predict a GPU's times, from the files in benchmarks/predictions.

A file has the ``rates`` of a GPU, and ``tables``, each with its ``columns`` by key, ``decimals`` by key where a figure
is rounded, ``rows``, and a ``note`` under it. What a row does not say is computed: at those rates, the picoseconds of
its ``bytes`` (the microseconds of its ``megabytes``), ``special_functions`` and issue ``slots``, which are
``memory_time``, ``special_functions_time`` and ``issue_time``; the longest of them, ``predicted``; and which that is,
``bound``. A list holds variants of a kernel.
"""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

from .report_tables import ReportError, number, read, table

PREDICTIONS = Path(__file__).resolve().parent / "predictions"
# What a row asks of a resource.
AMOUNTS = {"memory": ("bytes", "megabytes"), "special_functions": ("special_functions",), "issue": ("slots",)}


def per_picosecond(rate: dict[str, Any]) -> float:
    if "per_picosecond" in rate:
        return rate["per_picosecond"]
    return rate["multiprocessors"] * rate["a_clock"] * rate["gigahertz"] / 1000


def rates(what: str, folder: Path) -> str:
    rows = []
    for resource, rate in read(what.strip(), PREDICTIONS)["rates"].items():
        source = rate["from"]
        if "a_clock" in rate:
            each = f"{rate['a_clock']} a clock × {rate['gigahertz']} GHz"
            source = f"{rate['multiprocessors']} multiprocessors × {each}: {source}"
        rows.append([resource.replace("_", " "), f"{number(per_picosecond(rate))} {rate['unit']}", source])
    return table(["assumed", "a picosecond", "from"], rows)


def predictions(what: str, folder: Path) -> str:
    name, _, title = (part.strip() for part in what.partition(":"))
    content = read(name, PREDICTIONS)
    if title not in content["tables"]:
        raise ReportError(f"{name}: expected one of {', '.join(content['tables'])}, got {title!r}")
    shown = content["tables"][title]
    rows = [derived(row, content["rates"]) for row in shown["rows"]]
    columns, decimals = shown["columns"], shown.get("decimals", {})
    cells = [[cell(row.get(key, ""), decimals.get(key)) for key in columns] for row in rows]
    note = f"\n{shown['note']}\n" if "note" in shown else ""
    return f"Predicted for {content['gpu']}, not measured:\n\n{table(list(columns.values()), cells)}{note}"


def derived(row: dict[str, Any], rates: dict[str, Any]) -> dict[str, Any]:
    """The row with what it does not say."""
    times = {}
    for resource, amounts in AMOUNTS.items():
        for amount in amounts:
            if amount in row and f"{resource}_time" not in row:
                times[resource] = [asked / per_picosecond(rates[resource]) for asked in variants(row[amount])]
    row = {**row, **{f"{resource}_time": values for resource, values in times.items()}}
    if "predicted" not in row and times:
        bound = max(times, key=lambda resource: max(times[resource]))
        row.update(predicted=max(times[bound]), bound=bound.replace("_", " "))
    return row


def variants(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def cell(value: Any, decimals: int | None) -> str:
    return " / ".join(figure(each, decimals) for each in variants(value))


def figure(value: str | float, decimals: int | None) -> str:
    if isinstance(value, str):
        return value
    if decimals is None:
        return f"{value:,}"
    return str(Decimal(str(value)).quantize(Decimal(10) ** -decimals, ROUND_HALF_UP))
