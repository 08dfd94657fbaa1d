"""What dense tasks share: images with targets of any kind, transformed together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps
from torch import Tensor

from .base import SeededDataset, TuningDataModule, check_at_least
from .images import UNREADABLE

DenseSample = tuple[Tensor, Any, str]


class Pairs(Protocol):
    """Anything that gives (image, target) for an index, in tv_tensors."""

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


@dataclass
class DenseSamples(SeededDataset):
    """Images with their targets and names, drawn as (image, target, name).

    The transform gets the pair (image, target).
    """

    pairs: Pairs
    names: Sequence[str]
    transform: Callable[[Any], Any] | None = None
    seed: int = 0

    def __getitem__(self, key: int) -> DenseSample:
        index = key % len(self)
        image, target = self._transformed(self.pairs[index], key)
        return image, target, self.names[index]


class DenseDataModule(TuningDataModule):
    """Loaders over the `DenseSamples` that a subclass gives for each split.

    Args:
        batch_size: Samples in a training batch of one process.
        eval_batch_size: Samples in any other batch.
        num_workers: Processes that load; they change the speed and never the batches.
        seed: Decides all that is random in the data.

    Attributes:
        crop_size: Height and width of training images in pixels.
    """

    crop_size: tuple[int, int]

    def __init__(self, batch_size: int, eval_batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__(batch_size, num_workers, seed)
        check_at_least("eval_batch_size", eval_batch_size, 1)
        self.eval_batch_size = eval_batch_size

    def collate(self, name: str) -> Callable[[list[DenseSample]], Any]:
        """Lists samples of any sizes; a subclass makes the training batches."""
        return listed_names if name == "predict" else listed

    @property
    def _eval_batch_size(self) -> int:
        return self.eval_batch_size


def listed(batch: list[DenseSample]) -> tuple[list[Tensor], list[Any]]:
    """Collate samples of any sizes to (list of images, list of targets)."""
    images, targets, _ = zip(*batch, strict=True)
    return list(images), list(targets)


def listed_names(batch: list[DenseSample]) -> tuple[list[Tensor], list[str]]:
    """Collate samples of any sizes to (list of images, list of names), for prediction."""
    images, _, names = zip(*batch, strict=True)
    return list(images), list(names)


def read_upright(path: Path) -> Image.Image:
    """Read a file in its own mode, turned as a viewer shows it; an unreadable one is named."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except UNREADABLE as reason:
        raise ValueError(f"cannot read {path} ({reason}); replace or remove it") from reason


def read_photo(path: Path) -> Image.Image:
    """Read a file as RGB, turned as a viewer shows it."""
    image = read_upright(path)
    if image.mode[0] in "IF":  # Pillow would cut their values off at 255
        raise ValueError(f"image {path} has mode {image.mode}; convert it to 8 bits a channel")
    return image.convert("RGB")
