"""PASCAL VOC: photos of twenty kinds of things."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .dense_files import raise_mistakes
from .detection import Objects
from .detection_files import DetectionFilesDataModule, ListedImage, clipped, flawed_boxes
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
        root = _home(self.root)
        lists, masks = root / "ImageSets" / "Segmentation", root / "SegmentationClass"
        return {
            name: pairs_in_list(lists / f"{name}.txt", root / "JPEGImages", masks)
            for name in ("train", "val")
        }


class VOCDetectionDataModule(DetectionFilesDataModule):
    """PASCAL VOC (Everingham et al., 2010), boxes of 20 classes; validation also stands for test.

    `root` is a folder such as `VOC2012`, or one that holds `VOCdevkit/VOC2012`. Objects marked as
    difficult are left out of training, and evaluation ignores them.

    Args:
        root: The data set's own folder.
        options: `scale_range` of `DetectionFilesDataModule`, `crop_size` to `predict_root` of
            `DenseFilesDataModule`.
    """

    def __init__(self, root: str, **options: Any) -> None:
        super().__init__(root, **options)
        self.class_names = list(_NAMES[1:])

    def official_splits(self) -> dict[str, Sequence[ListedImage]]:
        """The splits "train" and "val"."""
        root = _home(self.root)
        return {
            name: _annotated(
                pairs_in_list(
                    root / "ImageSets" / "Main" / f"{name}.txt",
                    root / "JPEGImages",
                    root / "Annotations",
                    ".xml",
                )
            )
            for name in ("train", "val")
        }


def _home(root: Path) -> Path:
    inner = root / "VOCdevkit" / "VOC2012"
    return inner if inner.is_dir() else root


def _annotated(pairs: Sequence[Pair]) -> list[ListedImage]:
    images, mistakes = [], []
    for number, (image, listing) in enumerate(pairs, 1):
        assert listing is not None
        try:
            images.append(ListedImage(image, number, *_read(listing)))
        except (ValueError, OverflowError) as reason:  # the second of an infinite size
            mistakes.append(f"{listing}: {reason}")
    raise_mistakes(mistakes, f"of {len(pairs)} annotations have mistakes")
    return images


def _read(listing: Path) -> tuple[tuple[int, int], Objects]:
    """The size of an image, and its objects."""
    try:
        tree = ElementTree.parse(listing).getroot()
    except ElementTree.ParseError as reason:
        raise ValueError(f"is no XML ({reason})") from reason
    things = tree.findall("object")
    width, height = _numbers(tree, "size", ("width", "height"))
    corners = np.array(
        [_numbers(thing, "bndbox", ("xmin", "ymin", "xmax", "ymax")) for thing in things]
    ).reshape(-1, 4)
    corners[:, :2] -= 1  # of VOC's pixels, which count from 1, the last ones belong to the box
    sizes = np.full((len(things), 2), (width, height))
    flaws = [f"object {index + 1}: {flaw}" for index, flaw in flawed_boxes(corners, sizes)]
    names = [thing.findtext("name", "").strip() for thing in things]
    flaws += [f"{name!r} is no class of VOC" for name in names if name not in _NAMES[1:]]
    if flaws:
        raise ValueError("; ".join(flaws))
    boxes = clipped(corners, sizes).astype(np.float32)
    return (int(width), int(height)), Objects(
        boxes,
        np.array([_NAMES.index(name) - 1 for name in names], np.int64),
        np.array([int(thing.findtext("difficult") or 0) for thing in things], np.int64),
        (boxes[:, 2:] - boxes[:, :2]).prod(1),
    )


def _numbers(tree: ElementTree.Element, part: str, keys: Sequence[str]) -> list[float]:
    try:
        return [float(tree.findtext(f"{part}/{key}", "")) for key in keys]
    except ValueError as reason:
        raise ValueError(f"<{tree.tag}> has no {part} of numbers {', '.join(keys)}") from reason
