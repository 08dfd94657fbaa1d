"""Samplers that show some images more often than others."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler


def repeat_factors(present: NDArray[np.bool_], threshold: float) -> NDArray[np.float64]:
    """How often each image is to be shown in an epoch (Gupta et al., LVIS, arXiv 1908.03195).

    A class in a share f of the images asks for max(1, sqrt(threshold / f)), an image takes the
    most that its classes ask for.

    Args:
        present: Which classes are in which image: [images, classes].
        threshold: Classes in a smaller share of the images are repeated.

    Returns:
        The factors, at least 1: [images].
    """
    share = np.maximum(present.mean(0), 1 / len(present))  # of an absent class nobody asks
    wanted = np.maximum(1, np.sqrt(threshold / share))
    return np.where(present, wanted, 1).max(1)


class RepeatFactorSampler(DistributedSampler[int]):
    """Draws each sample about as often as its factor says, and hands out keys of the epoch.

    An epoch has round(sum of factors) samples, always. A sample of factor 2.3 comes two or three
    times, on average 2.3 times, each time under a key and so an augmentation of its own.

    Args:
        factors: One of each sample, at least 1.
        options: `num_replicas`, `rank` and `seed` of DistributedSampler.
    """

    def __init__(self, factors: NDArray[np.float64], **options: Any) -> None:
        super().__init__(range(round(factors.sum())), **options)  # type: ignore[arg-type]
        self.factors = factors

    def __iter__(self) -> Iterator[int]:
        keys = self._keys()
        return (keys[position] for position in super().__iter__())

    def _keys(self) -> list[int]:
        """This epoch's samples in order, by systematic resampling."""
        count = len(self.dataset)  # type: ignore[arg-type]  # it is a range
        ends = self.factors.cumsum()
        offset = np.random.default_rng((self.seed, self.epoch)).random()
        points = (np.arange(count) + offset) * (ends[-1] / count)
        samples = np.minimum(np.searchsorted(ends, points, side="right"), len(ends) - 1)
        repeat = np.arange(count) - np.searchsorted(samples, samples)
        most = int(np.ceil(self.factors.max())) + 1
        return ((self.epoch * most + repeat) * len(ends) + samples).tolist()
