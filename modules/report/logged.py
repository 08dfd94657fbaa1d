"""What a run has logged, as Lightning's ``CSVLogger`` leaves it."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

# Of a `SourceMonitor`: accuracy on the data that the base came from, and what was lost of it.
SOURCE, FORGOTTEN = "source/acc", "source/forgotten"
# What reading a file raises that is not what it should be: it is then as if it were not there.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, csv.Error)


def logged(folder: Path, metric: str) -> dict[int, float]:
    """What a run has logged of a metric, by step; what is no number is left out."""
    try:
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get(metric)]
        found = {int(row["step"]): float(row[metric]) for row in rows}
    except UNREADABLE:
        return {}
    return {step: value for step, value in found.items() if math.isfinite(value)}


def last(folder: Path, metric: str) -> float | None:
    """The last value that a run has logged of a metric."""
    return next(reversed(logged(folder, metric).values()), None)


def band(folders: Sequence[Path], metric: str) -> dict[int, list[float]]:
    """The values of all seeds at each step that all of them have logged."""
    runs = [logged(folder, metric) for folder in folders]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return {step: [run[step] for run in runs] for step in steps}
