"""What all datamodules share: samples that depend on the seed alone, and their loaders."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from .samplers import EpochSampler, KeySampler, ResumableLoader
from .splits import few_shot

Sample = tuple[Any, int, str]
SPLITS = ("train", "val", "test")
_SPLITS_OF_STAGE = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: SPLITS,
}


class Images(Protocol):
    """Anything that gives an image for an index."""

    def __getitem__(self, index: int, /) -> Any: ...


class SeededDataset(Dataset[Any]):
    """Named samples, transformed at random.

    What a random transform does to a sample follows from the seed, the epoch and the sample, never
    from the worker that loads it. Epoch and sample come as one key, `epoch * len(self) + index`,
    because only the key reaches a worker that outlives the epoch.
    """

    names: Sequence[str]
    transform: Callable[[Any], Any] | None
    seed: int

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Any]:
        """The samples of the first epoch: no key is out of range, so a plain loop would not end."""
        return (self[index] for index in range(len(self)))

    def _transformed(self, sample: Any, key: int) -> Any:
        if self.transform is None:
            return sample
        (seed,) = np.random.SeedSequence((self.seed, key)).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            return self.transform(sample)


@dataclass
class Samples(SeededDataset):
    """Images with their labels and names, drawn as (image, label, name)."""

    images: Images
    labels: Sequence[int]
    names: Sequence[str]
    transform: Callable[[Any], Tensor] | None = None
    seed: int = 0

    def __getitem__(self, key: int) -> Sample:
        index = key % len(self)
        return self._transformed(self.images[index], key), self.labels[index], self.names[index]

    def take(self, indices: Sequence[int]) -> "Samples":
        """These samples only, in this order."""
        return replace(
            self,
            images=Subset(self.images, indices),  # type: ignore[arg-type]  # needs no Dataset
            labels=[self.labels[i] for i in indices],
            names=[self.names[i] for i in indices],
        )


def check_at_least(name: str, value: int, least: int) -> None:
    """Raises if a number is too small to make sense."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def labelled(batch: list[Sample]) -> tuple[Tensor, Tensor]:
    """Collate samples to (images, labels)."""
    images, labels, _ = zip(*batch, strict=True)
    return torch.stack(images), torch.tensor(labels)


def named(batch: list[Sample]) -> tuple[Tensor, list[str]]:
    """Collate samples to (images, names), for prediction."""
    images, _, names = zip(*batch, strict=True)
    return torch.stack(images), list(names)


class TuningDataModule(LightningDataModule):
    """Loaders over the datasets that a subclass gives for each split.

    Args:
        batch_size: Samples in a batch of one process.
        num_workers: Processes that load; they change the speed and never the batches.
        seed: Decides all that is random in the data.
    """

    class_names: list[str]
    whole_batches: ClassVar[bool] = False  # whether a smaller last batch of training is left out

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        at_least = {
            "num_workers": (num_workers, 0),
            "seed": (seed, 0),
        }
        for name, (value, least) in at_least.items():
            check_at_least(name, value, least)
        self.save_hyperparameters(logger=False)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.datasets: dict[str, Any] = {}

    @property
    def batch_size(self) -> int:
        """Samples in a batch of one process; loaders made afterwards follow it."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        check_at_least("batch_size", value, 1)
        self._batch_size = value

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    def split(self, name: str) -> SeededDataset:
        """All samples of the split "train", "val", "test" or "predict"."""
        raise NotImplementedError

    def collate(self, name: str) -> Callable[[list[Any]], Any]:
        """What makes a batch of a split's samples."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Set up once before the trainer writes its first file, so that mistakes show early."""
        if self.trainer is not None:
            self.setup(self.trainer.state.fn)

    def setup(self, stage: str | None = None) -> None:
        """Make the splits that a stage needs, once."""
        for name in _SPLITS_OF_STAGE[stage]:
            if name not in self.datasets:
                self.datasets[name] = self._dataset(name)
            self._check_shares(name)

    def _dataset(self, name: str) -> SeededDataset:
        return self.split(name)

    def contents(self) -> str:
        """The sizes of the splits that are set up, and the classes, for a person to read."""
        sizes = ", ".join(f"{len(samples):,} {name}" for name, samples in self.datasets.items())
        if not self.class_names:
            return f"{sizes} images"
        shown = ", ".join([*self.class_names[:5], "..."][: self.num_classes])
        return f"{sizes} images of {self.num_classes} classes: {shown}"

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order drawn anew each epoch."""
        options = {**self._ranks, "seed": self.seed}
        return self._loader("train", self.batch_size, self._sampler(options))

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches in the split's own order."""
        return self._loader("val", self._eval_batch_size, self._share("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches in the split's own order."""
        return self._loader("test", self._eval_batch_size, self._share("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches with names in place of what is to be predicted, in the split's own order."""
        return self._loader("predict", self._eval_batch_size, self._share("predict"))

    @property
    def _eval_batch_size(self) -> int:
        return self.batch_size

    @property
    def _ranks(self) -> dict[str, Any]:
        """How many processes share the data, and which of them this is."""
        ranks = self.trainer and self.trainer.distributed_sampler_kwargs
        return ranks or {"num_replicas": 1, "rank": 0}

    def _share(self, name: str) -> DistributedSampler[int]:
        """This process's samples of a split, each of which one process has.

        Lightning's default repeats some until all processes have as many.
        """
        return UnrepeatedDistributedSampler(self.datasets[name], shuffle=False, **self._ranks)

    def _check_shares(self, name: str) -> None:
        """Raises if a process would have nothing to evaluate, and the others wait for it."""
        count, processes = len(self.datasets[name]), self._ranks["num_replicas"]
        if name != "train" and 0 < count < processes:
            raise ValueError(
                f"the {name} split has {count} samples, and each of {processes} processes needs "
                f"one: set trainer.devices to {count} or less"
            )

    def _sampler(self, options: dict[str, Any]) -> KeySampler:
        return EpochSampler(self.datasets["train"], **options)

    def _loader(
        self, name: str, batch_size: int, sampler: DistributedSampler[int]
    ) -> DataLoader[Any]:
        workers = min(self.num_workers, os.cpu_count() or 1)  # more would only wait for each other
        kind = ResumableLoader if isinstance(sampler, KeySampler) else DataLoader
        return kind(
            self.datasets[name],
            batch_size=batch_size,
            sampler=sampler,
            drop_last=self.whole_batches and name == "train" and len(sampler) >= batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate(name),
            # Its own generator: loading draws nothing from the stream that dropout or mixup use.
            generator=torch.Generator().manual_seed(self.seed),
        )


class ClassificationDataModule(TuningDataModule):
    """Loaders over the `Samples` that a subclass gives for each split.

    Batches are (images, labels), when predicting (images, names). Images are uint8, NCHW and not
    normalised: the backbone knows its own mean and deviation.

    Args:
        batch_size: Samples in a batch of one process.
        num_workers: Processes that load; they change the speed and never the batches.
        seed: Decides splits, subsets, order and augmentation.
        samples_per_class: Train on that many samples of each class only.
    """

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        samples_per_class: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.samples_per_class = samples_per_class

    def split(self, name: str) -> Samples:
        """All samples of the split "train", "val", "test" or "predict"."""
        raise NotImplementedError

    def collate(self, name: str) -> Callable[[list[Sample]], Any]:
        """(images, names) when predicting, else (images, labels)."""
        return named if name == "predict" else labelled

    def _dataset(self, name: str) -> Samples:
        samples = self.split(name)
        if name != "train" or self.samples_per_class is None:
            return samples
        chosen = few_shot(samples.labels, self.samples_per_class, self.seed, self.class_names)
        return samples.take(chosen)
