"""Detection and instance segmentation: what all datamodules share, and targets in one form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors

from .dense import DenseDataModule, DenseSample
from .masks import Color, color_map

Target = dict[str, Tensor]


class DetectionDataModule(DenseDataModule):
    """Loaders over the `DenseSamples` that a subclass gives for each split.

    Training batches are (images [N, 3, h, w], list of N targets). Images to validate, test or
    predict keep their own sizes: batches are (list of images [3, H, W], list of targets), when
    predicting (list of images, list of names). Images are uint8 and not normalised.

    A target describes the n objects of an image, of which there may be none:

    - `boxes`: corners x0, y0, x1, y1 in pixels, float32 [n, 4]
    - `labels`: 0 to num_classes - 1, int64 [n]
    - `masks`: 1 where the object is, uint8 [n, H, W]; only where the data has them
    - `iscrowd`: 1 for what evaluation is to ignore, as groups, int64 [n]; not in training, whose
      targets leave such objects out
    - `area`: of the object in pixels, as its annotation has it, float32 [n]; not in training

    Args:
        batch_size: Samples in a training batch of one process.
        eval_batch_size: Samples in any other batch.
        num_workers: Processes that load; they change the speed and never the batches.
        seed: Decides all that is random in the data.

    Attributes:
        crop_size: Height and width of training images in pixels.
    """

    @property
    def category_ids(self) -> list[int]:
        """The data's own id of each class; 1, 2, 3 ... where it has none."""
        return list(range(1, self.num_classes + 1))

    @property
    def image_ids(self) -> dict[str, int]:
        """The id of each image to evaluate or predict, by its name; 1, 2, 3 ... in each split."""
        return {
            image: number
            for split in ("val", "test", "predict")
            if split in self.datasets
            for number, image in enumerate(self.datasets[split].names, 1)
        }

    @property
    def palette(self) -> list[Color]:
        """A colour (red, green, blue) of each class to show it in."""
        return color_map(1 + self.num_classes)[1:]

    def collate(self, name: str) -> Callable[[list[DenseSample]], Any]:
        """Stacks training images and lists all others."""
        return stacked_images if name == "train" else super().collate(name)


def stacked_images(batch: list[DenseSample]) -> tuple[Tensor, list[Target]]:
    """Collate samples of one size to (images [N, 3, h, w], list of targets)."""
    images, targets, _ = zip(*batch, strict=True)
    return torch.stack(images), list(targets)


@dataclass(frozen=True)
class Objects:
    """The annotated objects of an image, as arrays with an entry for each.

    Args:
        boxes: Corners x0, y0, x1, y1 in pixels: float32 [n, 4].
        labels: The classes: int64 [n].
        iscrowd: 1 for what evaluation is to ignore: int64 [n].
        area: In pixels: float32 [n].
        masks: 1 where the object is: uint8 [n, height, width].
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    iscrowd: NDArray[np.int64]
    area: NDArray[np.float32]
    masks: NDArray[np.uint8] | None = None

    def target(self, height: int, width: int, train: bool) -> Target:
        """The target of an image, in tv_tensors; with `train`, that of a training image."""
        boxes = torch.from_numpy(self.boxes)
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.from_numpy(self.labels),
        }
        if self.masks is not None:
            target["masks"] = tv_tensors.Mask(self.masks)
        if not train:
            target["iscrowd"] = torch.from_numpy(self.iscrowd)
            target["area"] = torch.from_numpy(self.area)
        return target
