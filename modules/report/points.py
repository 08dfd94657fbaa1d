"""What the page is made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """One tuning at one rank, at its chosen rate.

    Attributes:
        tuning: As it was asked for.
        rank: None for what has none.
        rate: The chosen learning rate; None is the recipe's own.
        val_metric: What the rate was chosen by.
        test_metric: The same on the test data.
        val: Of all seeds, at the chosen rate.
        test: Of all seeds that were tested.
        seeds: The seeds.
        parameters: How many train.
        saved_bytes: What autograd keeps for the backward of one batch.
        seconds: Mean length of a training, with its validations.
        folders: The runs.
        commands: What makes the same runs again.
        tests: What tests their adapters again.
    """

    tuning: str
    rank: int | None
    rate: float | None
    val_metric: str
    test_metric: str
    val: list[float]
    test: list[float]
    seeds: list[int]
    parameters: int
    saved_bytes: int
    seconds: float
    folders: list[Path]
    commands: list[str]
    tests: list[str]

    @property
    def label(self) -> str:
        """Tuning and rank, for people."""
        return self.tuning if self.rank is None else f"{self.tuning} r={self.rank}"

    @property
    def whole(self) -> bool:
        """Whether all seeds were tested, and came to numbers: only then means can be compared."""
        return len(self.test) == len(self.seeds) and all(map(math.isfinite, self.test))

    def tested(self) -> str:
        """The test metric, and of how many seeds if those are not all."""
        some = 0 < len(self.test) < len(self.seeds)
        of = f" ({len(self.test)} of {len(self.seeds)} seeds)" if some else ""
        return spread(self.test) + of

    def cells(self) -> tuple[str, ...]:
        """The point as a row of a table."""
        return (
            self.tuning,
            "" if self.rank is None else str(self.rank),
            rate_text(self.rate),
            spread(self.val),
            self.tested(),
            f"{self.parameters:,}",
            f"{self.saved_bytes / 2**20:.3g} MiB",
            f"{self.seconds:.3g}",
        )


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
        points: One for each tuning and rank that has a chosen rate.
        sweeps: One for each tuning and rank.
        errors: The runs that have failed, and why.
        undone: How many runs are still to be done.
    """

    recipe: str
    command: str
    budget: list[tuple[str, str]]
    points: list[Point]
    sweeps: list[Sweep]
    errors: list[tuple[str, str]]
    undone: int


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several; nan if one of them is no number."""
    if not values:
        return ""
    if not all(map(math.isfinite, values)):
        return "nan"
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


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
