"""What the runs of a compare have come to: a row each, as tables and as a page."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapters.replacing import replacing, write_csv
from ...adapters.summary import text_table
from ...report import markdown, page
from ...report.logged import FORGOTTEN, SOURCE, last
from ...report.points import table_of
from . import gathered
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

    def last(self, metric: str) -> float | None:
        """What the fit has logged last of a metric; None if it has diverged before its end."""
        ended = math.isfinite(self.fit.get("val", math.nan))
        return last(self.folder, metric) if ended else None


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
    write_csv(out / "results.csv", _csv(rows, out))
    with replacing(out / "results.md") as temporary:
        temporary.write_text(markdown(gathered.report(rows, command)), encoding="utf-8")


def write_page(rows: list[Row], out: Path, command: str) -> None:
    """Writes ``report.html``; what is given is as in `write_tables`."""
    with replacing(out / "report.html") as temporary:
        temporary.write_text(page(gathered.report(rows, command)), encoding="utf-8")


def told(rows: list[Row], out: Path) -> str:
    """The table, and where the page is."""
    head, body = table_of(gathered.points(rows))
    table = text_table(tuple(head), [tuple(cells) for cells in body])
    return "\n".join([*table, "", f"report   {out / 'report.html'}"])


def stopped(rows: list[Row], out: Path) -> str:
    """How far a compare has come that was stopped, and where its page is."""
    done = sum(bool(row.fit) for row in rows)
    told = f"stopped  {done} of {len(rows)} runs done; the same command goes on"
    return f"{told}\nreport   {out / 'report.html'}"


def _csv(rows: list[Row], out: Path) -> Iterable[tuple[Any, ...]]:
    source = [
        name for name in (SOURCE, FORGOTTEN) if any(row.last(name) is not None for row in rows)
    ]
    yield (
        *("tuning", "rank", "lr", "seed", "chosen", *gathered.metrics(rows), *source),
        *("parameters", "saved_bytes", "seconds", "folder", "command", "failed"),
    )
    for row in rows:
        run, fit = row.run, row.fit
        seconds = f"{fit['seconds']:.2f}" if fit else ""
        yield (
            *(run.tuning, run.rank, run.rate, run.seed, int(row.chosen)),
            *(fit.get("val"), row.test.get("test"), *map(row.last, source)),
            *(fit.get("parameters"), fit.get("saved_bytes"), seconds),
            *(row.folder.relative_to(out).as_posix(), run.command, row.error),
        )
