"""What the page is made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """One tuning at one rank, at its chosen rate, or with the reason that there is none.

    Attributes:
        tuning: As it was asked for.
        rank: None for what has none.
        rate: The chosen learning rate; None is the recipe's own.
        val_metric: What the rate was chosen by.
        test_metric: The same on the test data.
        val: Of all seeds, at the chosen rate.
        test: Of all seeds that were tested.
        source: Accuracy on the source data at the end, of the seeds that have logged it.
        forgotten: What was lost of the base's accuracy there, of the same.
        seeds: The seeds.
        parameters: How many train; None if that is not known, as of what has failed.
        saved_bytes: What autograd keeps for the backward of one batch.
        seconds: Mean length of a training, with its validations.
        folders: The runs.
        commands: What makes the same runs again.
        tests: What tests their adapters again.
        lost: Why no rate could be chosen; empty if one was.
    """

    tuning: str
    rank: int | None
    rate: float | None
    val_metric: str
    test_metric: str
    val: list[float]
    test: list[float]
    source: list[float]
    forgotten: list[float]
    seeds: list[int]
    parameters: int | None
    saved_bytes: int
    seconds: float
    folders: list[Path]
    commands: list[str]
    tests: list[str]
    lost: str = ""

    @property
    def label(self) -> str:
        """Tuning and rank, for people."""
        return self.tuning if self.rank is None else f"{self.tuning} r={self.rank}"

    @property
    def whole(self) -> bool:
        """Whether all seeds were tested, and came to numbers: only then means can be compared."""
        return len(self.test) == len(self.seeds) and all(map(math.isfinite, self.test))

    def mean_of(self, values: Sequence[float]) -> str:
        """Mean and spread, and of how many seeds if those are not all."""
        some = 0 < len(values) < len(self.seeds)
        return spread(values) + (f" ({len(values)} of {len(self.seeds)} seeds)" if some else "")

    def cells(self, forgetting: bool) -> list[str]:
        """The point as a row of a table.

        Args:
            forgetting: Whether there is a column for what was forgotten.
        """
        figures = [spread(self.val), *([self.mean_of(self.forgotten)] if forgetting else [])]
        rate = self.lost or rate_text(self.rate)
        row = [self.label, self.mean_of(self.test), *figures, rate]
        if self.parameters is None:
            return [*row, "", "", ""]
        mebibytes = f"{self.saved_bytes / 2**20:.3g} MiB"
        return [*row, f"{self.parameters:,}", mebibytes, f"{self.seconds:.3g}"]


@dataclass(frozen=True)
class Sweep:
    """The rates of one tuning at one rank.

    Attributes:
        label: Tuning and rank, for people.
        chosen: The chosen rate; nothing before all have run, or if none has come to a number.
        values: Mean validation metric of each rate, or why there is none.
    """

    label: str
    chosen: list[float | None]
    values: dict[float | None, float | str]


@dataclass(frozen=True)
class Report:
    """A compare.

    Attributes:
        recipe: What was tuned.
        command: What makes all of it again.
        budget: What every run had, as name and value.
        tunings: All that were asked for, and how many rates each was given.
        changing: Of the tunings whose costs change during training, the callbacks that do it.
        points: One for each tuning and rank whose runs are done.
        sweeps: One for each tuning and rank.
        errors: The runs that have failed, and why.
        progress: How far an unfinished compare has come; empty of a finished one.
    """

    recipe: str
    command: str
    budget: list[tuple[str, str]]
    tunings: dict[str, int]
    changing: dict[str, str]
    points: list[Point]
    sweeps: list[Sweep]
    errors: list[tuple[str, str]]
    progress: str


def table_of(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """The heads and rows of the table of results, what matters most first."""
    val, test = (points[0].val_metric, points[0].test_metric) if points else ("val", "test")
    forgetting = any(point.forgotten for point in points)
    figures = [test, val, *(["forgotten"] if forgetting else [])]
    head = ["tuning", *figures, "lr", "parameters", "kept for backward", "seconds"]
    return head, [point.cells(forgetting) for point in points]


def shown(value: float) -> str:
    """A metric as tables show it."""
    return f"{value:.4f}"


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several; nan if one of them is no number."""
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "nan"
    mean = shown(statistics.mean(values))
    return f"{mean} ± {shown(statistics.stdev(values))}" if len(values) > 1 else mean


def deviation(values: Sequence[float]) -> float:
    """The standard deviation; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def over(seeds: int) -> str:
    """How many runs a figure is of, for people."""
    return "of one seed" if seeds == 1 else f"over {seeds} seeds"


def averaged(seeds: int) -> str:
    """What the figures of a table are."""
    return "Figures are of one seed" if seeds == 1 else f"Mean ± standard deviation {over(seeds)}"


def rate_text(rate: float | None) -> str:
    """A learning rate as people write it."""
    return "own" if rate is None else f"{rate:g}"
