"""Segmentation from files: images with masks, and their transforms."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from .dense import read_photo
from .dense_files import DenseFilesDataModule, each
from .masks import Legend, Pair, read_mask, read_pair
from .segmentation import SegmentationDataModule
from .transforms import middle, random_crop, to_tensors


@dataclass
class MaskFiles:
    """Files of images and masks, read when asked for."""

    items: Sequence[Pair]
    legend: Legend

    @property
    def paths(self) -> list[Path]:
        """The image files."""
        return [image for image, _ in self.items]

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask | None]:
        image_path, mask_path = self.items[index]
        if mask_path is None:
            return tv_tensors.Image(pil_to_tensor(read_photo(image_path))), None
        image, mask = read_pair(image_path, mask_path, self.legend)
        return tv_tensors.Image(pil_to_tensor(image)), tv_tensors.Mask(mask)


class MaskFilesDataModule(DenseFilesDataModule, SegmentationDataModule):
    """Image files with mask files; a subclass gives the legend and finds the splits.

    Without `augment`, training takes the middle of each image. The options are those of
    `DenseFilesDataModule`.
    """

    @abstractmethod
    def official_splits(self) -> dict[str, list[Pair]]:
        """The splits that the data set itself defines, "train" at least."""

    def files(self, name: str, items: Sequence[Pair]) -> MaskFiles:
        """The files of a split, without the masks when predicting."""
        return MaskFiles(
            [(image, None) for image, _ in items] if name == "predict" else items, self.legend
        )

    def unlabelled(self, path: Path, number: int) -> Pair:
        """An image with no mask."""
        return path, None

    def transform(self, name: str) -> Callable[[Any], Any]:
        """The training transform, or plain tensors."""
        if name != "train":
            return to_tensors()
        if not self.augment:
            return v2.Compose([middle(self.crop_size), to_tensors()])
        crop = random_crop(self.crop_size, self.scale_range, self.photometric)
        return v2.Compose([crop, to_tensors()])

    def classes_present(self) -> NDArray[np.bool_]:
        """Which classes are in which training mask, all of which are read: [images, classes]."""
        paths = [mask for _, mask in self.datasets["train"].pairs.items]
        return np.stack(each(partial(_classes_in, self.legend), paths, "Counting classes"))


def _classes_in(legend: Legend, path: Path) -> NDArray[np.bool_]:
    counts = np.bincount(read_mask(path, legend).ravel(), minlength=256)
    return counts[: len(legend.names)] > 0
