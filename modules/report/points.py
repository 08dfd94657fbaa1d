"""What the page is made of."""

from __future__ import annotations

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
        sweep: Mean validation metric of each rate; nan where a run has failed.
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
    sweep: dict[float | None, float]

    @property
    def label(self) -> str:
        """Tuning and rank, for people."""
        return self.tuning if self.rank is None else f"{self.tuning} r={self.rank}"

    def cells(self) -> tuple[str, ...]:
        """The point as a row of a table."""
        return (
            self.tuning,
            "" if self.rank is None else str(self.rank),
            rate_text(self.rate),
            spread(self.val),
            spread(self.test),
            f"{self.parameters:,}",
            f"{self.saved_bytes / 2**20:.3g} MiB",
            f"{self.seconds:.3g}",
        )


@dataclass(frozen=True)
class Report:
    """A compare.

    Attributes:
        recipe: What was tuned.
        budget: What every run had, as name and value.
        points: One for each tuning and rank.
        errors: The runs that have failed, and why.
        undone: How many runs are still to be done.
    """

    recipe: str
    budget: list[tuple[str, str]]
    points: list[Point]
    errors: list[tuple[str, str]]
    undone: int


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation if there are several."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def deviation(values: Sequence[float]) -> float:
    """The standard deviation; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def rate_text(rate: float | None) -> str:
    """A learning rate as people write it."""
    return "own" if rate is None else f"{rate:g}"
