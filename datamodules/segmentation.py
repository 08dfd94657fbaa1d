"""Semantic segmentation: what all its datamodules share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .dense import DenseDataModule, DenseSample
from .masks import Color, Legend


class SegmentationDataModule(DenseDataModule):
    """Loaders over the `DenseSamples` that a subclass gives for each split.

    Training batches are (images [N, 3, h, w], masks [N, h, w]). Images to validate, test or predict
    keep their own sizes: batches are (list of images [3, H, W], list of masks [H, W]), when
    predicting (list of images, list of names). Images are uint8 and not normalised. Masks are
    int64: 0 to num_classes - 1, and `masks.IGNORE` (255) where no class is known.

    Args:
        batch_size: Samples in a training batch of one process.
        eval_batch_size: Samples in any other batch.
        num_workers: Processes that load; they change the speed and never the batches.
        seed: Decides all that is random in the data.

    Attributes:
        legend: The classes, and what stands for them in masks; a subclass sets it.
        crop_size: Height and width of training images in pixels.
    """

    whole_batches = True  # decoders normalise by the batch, and some cannot by one of one image
    legend: Legend

    def __init__(self, batch_size: int, eval_batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed)
        self.class_names = list(self.legend.names)

    @property
    def palette(self) -> list[Color]:
        """A colour (red, green, blue) of each class to show it in."""
        return list(self.legend.palette)

    def collate(self, name: str) -> Callable[[list[DenseSample]], Any]:
        """Stacks training samples and lists all others."""
        return stacked if name == "train" else super().collate(name)


def stacked(batch: list[DenseSample]) -> tuple[Tensor, Tensor]:
    """Collate samples of one size to (images [N, 3, h, w], masks [N, h, w])."""
    images, masks, _ = zip(*batch, strict=True)
    return torch.stack(images), torch.stack(masks)
