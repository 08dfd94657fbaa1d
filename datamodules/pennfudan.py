"""Penn-Fudan: photos of people in the streets, with masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .dense import read_upright
from .detection import Objects
from .detection_files import AnnotatedImage, DetectionFilesDataModule, Size
from .masks import pairs_by_stem
from .splits import hold_out
from .transforms import boxes_round


@dataclass(eq=False)
class PennFudanImage(AnnotatedImage):
    """An image with a mask of ids: 0 is the ground, each pedestrian has a number."""

    mask_path: Path

    @property
    def labels(self) -> NDArray[np.int64]:
        """The one class, which is in every image."""
        return np.zeros(1, np.int64)

    def objects(self, size: Size, train: bool, masks: bool) -> Objects:
        """The pedestrians, with the boxes round their masks."""
        ids = np.asarray(read_upright(self.mask_path))
        if ids.ndim != 2 or ids.dtype.kind not in "bui":
            raise ValueError(f"mask {self.mask_path} is a picture, not one of ids")
        if ids.shape != size[::-1]:
            raise ValueError(
                f"image {self.path} is {size[0]} x {size[1]} pixels as a viewer shows it, its mask "
                f"{self.mask_path} {ids.shape[1]} x {ids.shape[0]}"
            )
        values = np.unique(ids)
        single = (ids == values[values > 0][:, None, None]).astype(np.uint8)
        count = len(single)
        return Objects(
            boxes_round(torch.from_numpy(single)).numpy(),
            np.zeros(count, np.int64),
            np.zeros(count, np.int64),
            single.sum((1, 2), dtype=np.float32),
            single if masks else None,
        )


class PennFudanDataModule(DetectionFilesDataModule):
    """Penn-Fudan (Wang et al., 2007): pedestrians, of which boxes and masks are known.

    `root` holds `PNGImages/` and `PedMasks/`. There are no official splits: images are held out by
    the seed to validate, and to test if `test_fraction` says so; else the same ones stand in.

    Args:
        root: The data set's own folder.
        masks: Give the masks of the pedestrians, too.
        val_fraction: Share of the images held out to validate, of those that do not test.
        test_fraction: Share of all images held out to test; at 0 there is no test split.
        options: `scale_range` of `DetectionFilesDataModule`, `crop_size` to `predict_root` of
            `DenseFilesDataModule`.
    """

    def __init__(
        self,
        root: str,
        masks: bool = False,
        val_fraction: float = 0.2,
        test_fraction: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(root, val_fraction=val_fraction, **options)
        if not 0 <= test_fraction < 0.5:
            raise ValueError(f"test_fraction={test_fraction} must lie between 0 and 0.5")
        self.masks = masks
        self.test_fraction = test_fraction
        self.class_names = ["pedestrian"]

    def official_splits(self) -> dict[str, Sequence[AnnotatedImage]]:
        """All images as "train", but for those held out to test."""
        pairs = pairs_by_stem(self.root / "PNGImages", self.root / "PedMasks", mask_end="_mask")
        images = [
            PennFudanImage(image, number, mask)  # type: ignore[arg-type]  # each has a mask
            for number, (image, mask) in enumerate(pairs, 1)
        ]
        if not self.test_fraction:
            return {"train": images}
        kept, held = hold_out([0] * len(images), self.test_fraction, self.seed)
        return {"train": [images[i] for i in kept], "test": [images[i] for i in held]}
