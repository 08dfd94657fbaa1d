"""PASCAL VOC: photos of twenty kinds of things."""

from .mask_files import MaskFilesDataModule
from .masks import Legend, Pair, pairs_in_list

_NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair"),
    *("cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


class VOCSegmentationDataModule(MaskFilesDataModule):
    """PASCAL VOC 2012 (Everingham et al., 2010): 20 classes and background, outlines ignored.

    `root` is the folder `VOC2012`, or one that holds `VOCdevkit/VOC2012`. The masks of the test
    images are not public: validation images stand in.
    """

    legend = Legend(_NAMES, ignored=(255,))  # the generated palette is VOC's own

    def official_splits(self) -> dict[str, list[Pair]]:
        """The splits "train" and "val"."""
        inner = self.root / "VOCdevkit" / "VOC2012"
        root = inner if inner.is_dir() else self.root
        lists, masks = root / "ImageSets" / "Segmentation", root / "SegmentationClass"
        return {
            name: pairs_in_list(lists / f"{name}.txt", root / "JPEGImages", masks)
            for name in ("train", "val")
        }
