"""The rows of a compare, gathered by tuning and rank for its tables and its page."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from ...report import Point, Report, Sweep
from ...report.logged import FORGOTTEN, SOURCE

if TYPE_CHECKING:
    from .results import Row

# Callbacks that change during training what is trained, and so what it costs.
_CHANGING = ("LISA", "RankBudget")


def report(rows: list[Row], command: str) -> Report:
    """All that tables and page are made of.

    Args:
        rows: All runs.
        command: What makes all of it again.
    """
    first = rows[0].run
    return Report(
        recipe=first.recipe,
        command=command,
        budget=first.budget,
        tunings={row.run.tuning: len(row.cell.runs) for row in rows},
        changing={row.run.tuning: by for row in rows if (by := _changing(row))},
        points=points(rows),
        sweeps=_sweeps(rows),
        errors=[(row.run.short_name, row.error) for row in rows if row.error],
        progress=_progress(rows),
    )


def points(rows: list[Row]) -> list[Point]:
    """A point for each cell that has a chosen rate, or will have none."""
    found = []
    for of_cell in _by_cell(rows):
        chosen = [row for row in of_cell if row.chosen]
        if chosen or all(row.fit or row.error for row in of_cell):
            found.append(_point(of_cell, chosen, *metrics(rows)))
    return found


def metrics(rows: list[Row]) -> tuple[str, str]:
    """What rates are chosen by, and the same on the test data."""
    val = next((row.fit["metric"] for row in rows if row.fit), "val")
    return val, val.replace("val", "test", 1)


def _point(of_cell: list[Row], chosen: list[Row], val: str, test: str) -> Point:
    cell, fits = of_cell[0].cell, [row.fit for row in chosen or of_cell if row.fit]
    return Point(
        tuning=cell.tuning,
        rank=cell.rank,
        rate=chosen[0].run.rate if chosen else None,
        val_metric=val,
        test_metric=test,
        val=[row.fit["val"] for row in chosen] or [math.nan],
        test=[row.test["test"] for row in chosen if row.test] if chosen else [math.nan],
        source=_logged(chosen, SOURCE),
        forgotten=_logged(chosen, FORGOTTEN),
        seeds=list(dict.fromkeys(row.run.seed for row in of_cell)),
        parameters=fits[0]["parameters"] if fits else None,
        saved_bytes=fits[0]["saved_bytes"] if fits else 0,
        seconds=statistics.mean(fit["seconds"] for fit in fits) if fits else 0.0,
        folders=[row.folder for row in chosen],
        commands=[row.run.command for row in chosen or of_cell],
        tests=[_test_command(row) for row in chosen],
        lost="" if chosen else _lost(of_cell),
    )


def _logged(rows: list[Row], metric: str) -> list[float]:
    return [value for row in rows if (value := row.last(metric)) is not None]


def _lost(rows: list[Row]) -> str:
    """Why none of the rates of a cell could be chosen."""
    failed = ["failed"] if any(not row.fit for row in rows) else []
    diverged = any(row.fit and not math.isfinite(row.fit["val"]) for row in rows)
    return f"{' or '.join([*(['diverged'] if diverged else []), *failed])} at every rate"


def _test_command(row: Row) -> str:
    return shlex.join(["litflora", "test", "--adapter", str(row.folder / "adapter")])


def _by_cell(rows: list[Row]) -> Iterator[list[Row]]:
    return (list(group) for _, group in groupby(rows, lambda row: id(row.cell)))


def _sweeps(rows: list[Row]) -> list[Sweep]:
    """The rates of each cell."""
    found = []
    for of_cell in _by_cell(rows):
        by_rate: dict[float | None, list[Row]] = {}
        for row in of_cell:
            by_rate.setdefault(row.run.rate, []).append(row)
        chosen = list(dict.fromkeys(row.run.rate for row in of_cell if row.chosen))
        values = {rate: _swept(of_rate) for rate, of_rate in by_rate.items()}
        found.append(Sweep(of_cell[0].run.label, chosen, values))
    return found


def _swept(rows: list[Row]) -> float | str:
    """The mean validation metric of the runs of a rate, or why there is none."""
    if any(not row.fit and not row.error for row in rows):
        return "not done"
    if any(row.error and not row.fit for row in rows):
        return "failed"
    return statistics.mean(row.fit["val"] for row in rows)


def _changing(row: Row) -> str:
    """The callbacks of a run that change what it costs while it trains."""
    callbacks = row.run.settings["trainer"].get("callbacks") or []
    names = [callback["class_path"].rpartition(".")[2] for callback in callbacks]
    return ", ".join(name for name in names if name in _CHANGING)


def _progress(rows: list[Row]) -> str:
    """How far a compare has come; nothing of a finished one."""
    fits, chosen = sum(bool(row.fit) for row in rows), [row for row in rows if row.chosen]
    tests, failed = sum(bool(row.test) for row in chosen), sum(bool(row.error) for row in rows)
    if fits == len(rows) and tests == len(chosen):
        return ""
    told = [f"{fits} of {len(rows)} runs done"]
    told += [f"{tests} of {len(chosen)} tests done"] if fits == len(rows) else []
    told += [f"{failed} failed"] if failed else []
    return f"Unfinished: {', '.join(told)}."
