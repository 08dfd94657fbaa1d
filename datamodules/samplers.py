"""Samplers of training, which can begin in the middle of an epoch, and the loader that uses it."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, DistributedSampler


class KeySampler(DistributedSampler[int]):
    """Hands out the keys of an epoch, by seed and epoch alone.

    Lightning leaves a DistributedSampler as it is and tells it the epoch, also after a resume. A
    training loop of your own does so with `loader.sampler.set_epoch(epoch)`.

    Attributes:
        start: How many keys the next pass, and that one alone, leaves out.
    """

    start = 0

    def __iter__(self) -> Iterator[int]:
        start, self.start = self.start, 0
        return islice(self.keys(), start, None)

    def keys(self) -> Iterable[int]:
        """This process's keys of the epoch, in order."""
        raise NotImplementedError

    def positions(self) -> Iterator[int]:
        """This process's share of the epoch's positions, shuffled."""
        return super().__iter__()


class EpochSampler(KeySampler):
    """Shuffles by seed and epoch and hands out the keys of a `SeededDataset`."""

    def keys(self) -> Iterable[int]:
        """Each sample once."""
        start = self.epoch * len(self.dataset)  # type: ignore[arg-type]  # ours have a length
        return (start + index for index in self.positions())


class ResumableLoader(DataLoader[Any]):
    """A loader over a `KeySampler` that goes on in the middle of an epoch.

    Lightning keeps its state in checkpoints. What has been given out before is not loaded again.
    """

    _given = 0
    _loaded = (0, 0)

    def __iter__(self) -> Iterator[Any]:
        # A generator begins at the first batch that is asked for. Lightning asks for the iterator
        # of a resumed run before it tells the sampler the epoch, and workers would load at once.
        (epoch, batches), self._loaded = self._loaded, (0, 0)
        self._given = batches if epoch == self._epoch else 0
        self.sampler.start = self._given * self.batch_size
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, how many of its batches have been given out, and what a batch was."""
        return {"epoch": self._epoch, "batches": self._given, **self._shares()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next pass begin where the state was taken, if it is one through that epoch.

        Raises:
            ValueError: Batches had another size then, or were shared among more or fewer processes:
                the place in the epoch is one of those.
        """
        then = {key: state.get(key, now) for key, now in self._shares().items()}
        if state["batches"] and then != self._shares():
            told, asked = (
                f"batches of {each['batch_size']} in {each['processes']} process(es)"
                for each in (then, self._shares())
            )
            raise ValueError(
                f"the checkpoint is of the middle of an epoch of {told}, and cannot go on with "
                f"{asked}: give it as many, or start from a checkpoint of an epoch's end"
            )
        self._loaded = (state["epoch"], state["batches"])

    def _shares(self) -> dict[str, int]:
        processes = getattr(self.sampler, "num_replicas", 1)
        return {"batch_size": self.batch_size or 1, "processes": processes}

    @property
    def _epoch(self) -> int:
        # Lightning's overfit_batches puts a sampler without epochs in the place of ours.
        return getattr(self.sampler, "epoch", 0)


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


class RepeatFactorSampler(KeySampler):
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

    def keys(self) -> Iterable[int]:
        """As many as an epoch has, of the samples that are drawn for it."""
        drawn = self._drawn()
        return (drawn[position] for position in self.positions())

    def _drawn(self) -> list[int]:
        """This epoch's samples in order, by systematic resampling."""
        count = len(self.dataset)  # type: ignore[arg-type]  # it is a range
        ends = self.factors.cumsum()
        offset = np.random.default_rng((self.seed, self.epoch)).random()
        points = (np.arange(count) + offset) * (ends[-1] / count)
        samples = np.minimum(np.searchsorted(ends, points, side="right"), len(ends) - 1)
        repeat = np.arange(count) - np.searchsorted(samples, samples)
        most = int(np.ceil(self.factors.max())) + 1
        return ((self.epoch * most + repeat) * len(ends) + samples).tolist()
