"""What the runs of a compare have come to: a row each, as tables and as a page."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ...adapters.replacing import replacing
from ...adapters.summary import text_table
from ...report import Point, Report, page
from .choosing import Score, choose
from .plan import Cell, Run

FIT, TEST = "fit.json", "test.json"


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        cell: Its tuning and rank.
        run: What it was told.
        chosen: Whether its rate is the best of its cell by validation.
        fit: What the fit has left; empty if it has failed, or was not done.
        test: What the test has left.
        error: Why it has failed.
        folder: Where its files are.
    """

    cell: Cell
    run: Run
    chosen: bool
    fit: dict[str, Any]
    test: dict[str, Any]
    error: str
    folder: Path


def read(out: Path, run: Run, name: str) -> dict[str, Any]:
    """A result file of a run; nothing if it is not there."""
    path = out / "runs" / run.name / name
    return json.loads(path.read_text()) if path.is_file() else {}


def chosen_runs(cell: Cell, out: Path) -> list[Run]:
    """The runs of a cell at the rate that is best by validation."""
    fits = {rate: [read(out, run, FIT) for run in runs] for rate, runs in cell.runs.items()}
    scores = {
        rate: [Score(fit["metric"], fit["val"]) if fit else None for fit in of_rate]
        for rate, of_rate in fits.items()
    }
    return [run for rate in choose(scores) for run in cell.runs[rate]]


def rows(cells: Iterable[Cell], out: Path, failed: dict[str, str]) -> list[Row]:
    """A row for each run, done or not.

    Args:
        cells: The cells of the compare.
        out: Its folder.
        failed: Why runs have failed, by name.
    """
    found = []
    for cell in cells:
        chosen = {run.name for run in chosen_runs(cell, out)}
        found += [
            Row(
                cell,
                run,
                run.name in chosen,
                read(out, run, FIT),
                read(out, run, TEST) if run.name in chosen else {},
                failed.get(run.name, ""),
                out / "runs" / run.name,
            )
            for run in cell.all_runs
        ]
    return found


def write(rows: list[Row], out: Path) -> None:
    """Writes ``results.csv``, ``results.md`` and ``report.html``."""
    points = _points(rows)
    with replacing(out / "results.csv") as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows(_csv(rows, out))
    with replacing(out / "results.md") as temporary:
        temporary.write_text("\n".join(_markdown(points)) + "\n", encoding="utf-8")
    with replacing(out / "report.html") as temporary:
        temporary.write_text(page(_report(rows, points)), encoding="utf-8")


def told(rows: list[Row], out: Path) -> str:
    """The table, and where the page is."""
    head, *body = _table(_points(rows))
    return "\n".join([*text_table(head, body), "", f"report   {out / 'report.html'}"])


def _metrics(rows: list[Row]) -> tuple[str, str]:
    val = next((row.fit["metric"] for row in rows if row.fit), "val")
    return val, val.replace("val", "test", 1)


def _csv(rows: list[Row], out: Path) -> Iterable[tuple[Any, ...]]:
    yield (
        *("tuning", "rank", "lr", "seed", "chosen", *_metrics(rows)),
        *("parameters", "saved_bytes", "seconds", "folder", "command", "failed"),
    )
    for row in rows:
        run, fit = row.run, row.fit
        seconds = f"{fit['seconds']:.2f}" if fit else ""
        yield (
            *(run.tuning, run.rank, run.rate, run.seed, int(row.chosen)),
            *(fit.get("val"), row.test.get("test"), fit.get("parameters"), fit.get("saved_bytes")),
            *(seconds, row.folder.relative_to(out).as_posix(), run.command, row.error),
        )


def _points(rows: list[Row]) -> list[Point]:
    """A point for each cell that has a chosen rate."""
    val, test = _metrics(rows)
    chosen = (row for row in rows if row.chosen)
    found = []
    for _, group in groupby(chosen, lambda row: id(row.cell)):
        of_cell = list(group)
        fits, cell = [row.fit for row in of_cell], of_cell[0].cell
        found.append(
            Point(
                tuning=cell.tuning,
                rank=cell.rank,
                rate=of_cell[0].run.rate,
                val_metric=val,
                test_metric=test,
                val=[fit["val"] for fit in fits],
                test=[row.test["test"] for row in of_cell if row.test],
                seeds=[row.run.seed for row in of_cell],
                parameters=fits[0]["parameters"],
                saved_bytes=fits[0]["saved_bytes"],
                seconds=statistics.mean(fit["seconds"] for fit in fits),
                folders=[row.folder for row in of_cell],
                commands=[row.run.command for row in of_cell],
                sweep=_sweep(rows, cell),
            )
        )
    return found


def _sweep(rows: list[Row], cell: Cell) -> dict[float | None, float]:
    """The mean validation metric at each rate; nan where a run has failed."""
    found = {}
    for rate in cell.runs:
        values = [r.fit.get("val", math.nan) for r in rows if r.cell is cell and r.run.rate == rate]
        found[rate] = statistics.mean(values)
    return found


def _table(points: list[Point]) -> list[tuple[str, ...]]:
    val, test = (points[0].val_metric, points[0].test_metric) if points else ("val", "test")
    head = ("tuning", "rank", "lr", val, test, "parameters", "kept for backward", "seconds")
    return [head, *(point.cells() for point in points)]


def _markdown(points: list[Point]) -> Iterable[str]:
    head, *body = _table(points)
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for cells in body:
        yield f"| {' | '.join(cells)} |"
    seeds = len(points[0].seeds) if points else 0
    yield f"\nMean and standard deviation over {seeds} seeds. Rates are chosen by validation alone."


def _report(rows: list[Row], points: list[Point]) -> Report:
    errors = [(row.run.short_name, row.error) for row in rows if row.error]
    undone = sum(not row.fit and not row.error for row in rows)
    return Report(rows[0].run.recipe, rows[0].run.budget, points, errors, undone)
