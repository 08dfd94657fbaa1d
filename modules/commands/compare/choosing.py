"""Which learning rate is the best, by validation data alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ...monitored import lower_is_better

Rate = float | None


class Score(NamedTuple):
    """What a run has reached on the validation data."""

    metric: str
    value: float


def choose(scores: Mapping[Rate, Sequence[Score | None]]) -> list[Rate]:
    """The rate with the best mean over the seeds; of equal ones the first.

    Args:
        scores: By rate, those of all seeds; None for a run that has failed.

    Returns:
        The rate alone; nothing if at every rate a run has failed or come to no finite value.
    """
    best, best_mean = [], -math.inf
    for rate, seeds in scores.items():
        values = [-s.value if lower_is_better(s.metric) else s.value for s in seeds if s]
        whole = len(values) == len(seeds) and all(map(math.isfinite, values))
        if whole and statistics.mean(values) > best_mean:
            best, best_mean = [rate], statistics.mean(values)
    return best
