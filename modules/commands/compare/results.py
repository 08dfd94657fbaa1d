"""What the runs of a compare have come to: a row each, as tables and as a page."""

from __future__ import annotations

import csv
import shlex
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ...adapters.replacing import replacing
from ...adapters.summary import text_table
from ...report import Point, Report, Sweep, page
from ...report.points import averaged
from .choosing import Score, choose
from .kept import FIT, TEST, folder_of, read
from .plan import Cell, Run


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


def chosen_runs(cell: Cell, out: Path, failed: Collection[str]) -> list[Run]:
    """The runs of a cell at the rate that is best by validation; none before all have run.

    Args:
        cell: A tuning at a rank.
        out: The folder of the compare.
        failed: The names of runs that have failed, and are not waited for.
    """
    if any(not read(out, run, FIT) and run.name not in failed for run in cell.all_runs):
        return []
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
        chosen = {run.name for run in chosen_runs(cell, out, failed)}
        found += [
            Row(
                cell,
                run,
                run.name in chosen,
                read(out, run, FIT),
                read(out, run, TEST) if run.name in chosen else {},
                failed.get(run.name, ""),
                folder_of(out, run),
            )
            for run in cell.all_runs
        ]
    return found


def write_tables(rows: list[Row], out: Path, command: str) -> None:
    """Writes ``results.csv`` and ``results.md``.

    Args:
        rows: All runs.
        out: The folder of the compare.
        command: What makes all of it again.
    """
    path = out / "results.csv"
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file).writerows(_csv(rows, out))
    with replacing(out / "results.md") as temporary:
        text = "\n".join(_markdown(_points(rows), command))
        temporary.write_text(f"{text}\n", encoding="utf-8")


def write_page(rows: list[Row], out: Path, command: str) -> None:
    """Writes ``report.html``; what is given is as in `write_tables`."""
    with replacing(out / "report.html") as temporary:
        temporary.write_text(page(_report(rows, command)), encoding="utf-8")


def told(rows: list[Row], out: Path) -> str:
    """The table, and where the page is."""
    head, *body = _table(_points(rows))
    return "\n".join([*text_table(head, body), "", f"report   {out / 'report.html'}"])


def stopped(rows: list[Row], out: Path) -> str:
    """How far a compare has come that was stopped, and where its page is."""
    done = sum(bool(row.fit) for row in rows)
    told = f"stopped  {done} of {len(rows)} runs done; the same command goes on"
    return f"{told}\nreport   {out / 'report.html'}"


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
                tests=[_test_command(row) for row in of_cell],
            )
        )
    return found


def _test_command(row: Row) -> str:
    return shlex.join(["litflora", "test", "--adapter", str(row.folder / "adapter")])


def _sweeps(rows: list[Row]) -> list[Sweep]:
    """The rates of each cell."""
    found = []
    for _, group in groupby(rows, lambda row: id(row.cell)):
        of_cell = list(group)
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


def _table(points: list[Point]) -> list[tuple[str, ...]]:
    val, test = (points[0].val_metric, points[0].test_metric) if points else ("val", "test")
    head = ("tuning", "rank", "lr", val, test, "parameters", "kept for backward", "seconds")
    return [head, *(point.cells() for point in points)]


def _markdown(points: list[Point], command: str) -> Iterable[str]:
    head, *body = _table(points)
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for cells in body:
        yield f"| {' | '.join(cells)} |"
    said = f"{averaged(len(points[0].seeds))}. " if points else ""
    yield f"\n{said}Rates are chosen by validation alone."
    yield ""
    for line in (command, *(each for point in points for each in point.tests)):
        yield f"    {line}"


def _report(rows: list[Row], command: str) -> Report:
    errors = [(row.run.short_name, row.error) for row in rows if row.error]
    undone = sum(not row.fit and not row.error for row in rows)
    first = rows[0].run
    return Report(first.recipe, command, first.budget, _points(rows), _sweeps(rows), errors, undone)
