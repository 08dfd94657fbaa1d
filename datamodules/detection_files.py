"""Detection from files: annotated images, their targets and their transforms."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from .dense import read_photo
from .dense_files import DenseFilesDataModule
from .detection import DetectionDataModule, Objects, Target
from .transforms import random_crop, whole

Size = tuple[int, int]  # width and height, as Pillow has them


@dataclass(eq=False)  # an image is a key by itself: those of two splits may share a file
class ImageFile:
    """An image file to predict.

    Args:
        path: The image.
        image_id: The data's own id, or its number from 1.
    """

    path: Path
    image_id: int


class AnnotatedImage(ImageFile, ABC):
    """An image file whose objects are known."""

    @property
    @abstractmethod
    def labels(self) -> NDArray[np.int64]:
        """The classes of the objects to train on, found without reading the image."""

    @abstractmethod
    def objects(self, size: Size, train: bool, masks: bool) -> Objects:
        """The objects in an image that was found to be of a size.

        Args:
            size: Width and height in pixels.
            train: Leave out what evaluation is to ignore.
            masks: Give the masks, too, where there are some.

        Raises:
            ValueError: If image and annotations are of different sizes.
        """


@dataclass(eq=False)
class ListedImage(AnnotatedImage):
    """An image whose boxes are in memory, in pixels of an image of a certain size; no masks."""

    size: Size
    listed: Objects

    @property
    def labels(self) -> NDArray[np.int64]:
        """The classes of all objects that evaluation is not to ignore."""
        return self.listed.labels[self.chosen(train=True)]

    def objects(self, size: Size, train: bool, masks: bool) -> Objects:
        """The objects, if the image is of the size that the annotations are of."""
        check_size(self.path, size, self.size)
        chosen = self.chosen(train)
        return Objects(
            self.listed.boxes[chosen],
            self.listed.labels[chosen],
            self.listed.iscrowd[chosen],
            self.listed.area[chosen],
        )

    def chosen(self, train: bool) -> NDArray[np.intp]:
        """The indices of all objects; of those to train on, with `train`."""
        return np.flatnonzero(self.listed.iscrowd == 0 if train else self.listed.iscrowd >= 0)


def check_size(path: Path, size: Size, annotated: Size) -> None:
    """Raise if an image is not of the size that its annotations are of."""
    if size == annotated:
        return
    with Image.open(path) as image:
        stored = image.size
    remedy = "annotate the image anew, or replace it by the one that was annotated"
    if stored == annotated:
        remedy = (
            "its EXIF orientation turns it, and the annotations are of the file without that: "
            "remove the EXIF tag, or annotate the upright image"
        )
    raise ValueError(
        f"image {path} is {size[0]} x {size[1]} pixels as a viewer shows it, its annotations are "
        f"of {annotated[0]} x {annotated[1]}; {remedy}"
    )


@dataclass
class DetectionFiles:
    """The annotated images of a split, read when asked for."""

    items: Sequence[ImageFile]
    split: str
    masks: bool

    @property
    def paths(self) -> list[Path]:
        """The image files."""
        return [item.path for item in self.items]

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target | None]:
        item = self.items[index]
        photo = read_photo(item.path)
        image = tv_tensors.Image(pil_to_tensor(photo))
        if self.split == "predict":
            return image, None
        assert isinstance(item, AnnotatedImage)
        train = self.split == "train"
        objects = item.objects(photo.size, train, self.masks)
        return image, objects.target(photo.height, photo.width, train)


class DetectionFilesDataModule(DenseFilesDataModule, DetectionDataModule):
    """Image files with annotated objects; a subclass gives the classes and finds the splits.

    Training images are made to fit the crop at scale 1, which makes `scale_range` the large-scale
    jitter of Ghiasi et al. (arXiv 2012.07177); without `augment` they are padded there. Boxes are
    those of what is visible in the crop: round the masks, if there are masks.

    Args:
        root: The data set's own folder.
        scale_range: Scales that augmentation draws from; at 1 an image just fits the crop.
        options: `crop_size` to `predict_root` of `DenseFilesDataModule`.
    """

    masks = False  # whether targets have masks

    def __init__(
        self, root: str, scale_range: tuple[float, float] = (0.1, 2.0), **options: Any
    ) -> None:
        super().__init__(root, scale_range=scale_range, **options)

    @abstractmethod
    def official_splits(self) -> Mapping[str, Sequence[AnnotatedImage]]:
        """The splits that the data set itself defines, "train" at least."""

    @property
    def image_ids(self) -> dict[str, int]:
        """The id of each image to evaluate or predict, by its name."""
        return {
            str(item.path): item.image_id
            for split in ("val", "test", "predict")
            if split in self.datasets
            for item in self.datasets[split].pairs.items
        }

    def files(self, name: str, items: Sequence[ImageFile]) -> DetectionFiles:
        """The files of a split, all of whose images are there."""
        files = DetectionFiles(items, name, self.masks)
        check_present(files.paths)
        return files

    def unlabelled(self, path: Path, number: int) -> ImageFile:
        """An image of which nothing is known."""
        return ImageFile(path, number)

    def transform(self, name: str) -> Callable[[Any], Any]:
        """The training transform, or plain tensors."""
        if name != "train":
            return v2.ToPureTensor()
        return v2.Compose([self._train_transform(), v2.ToPureTensor()])

    def _train_transform(self) -> v2.Compose:
        if not self.augment:
            return whole(self.crop_size)
        return random_crop(
            self.crop_size,
            self.scale_range,
            self.photometric,
            mask_fill=0,
            boxes=True,
            fit=True,
        )

    def classes_present(self) -> NDArray[np.bool_]:
        """Which classes are in which training image: [images, classes]."""
        items = self.datasets["train"].pairs.items
        present: NDArray[np.bool_] = np.zeros((len(items), self.num_classes), bool)
        for index, item in enumerate(items):
            present[index, item.labels] = True
        return present


def flawed_boxes(
    corners: NDArray[np.float64], sizes: NDArray[np.float64]
) -> Iterator[tuple[int, str]]:
    """The boxes of no size, and those beside or more than a pixel out of their image; why each.

    Args:
        corners: x0, y0, x1, y1 in pixels: [n, 4].
        sizes: Width and height of each box's image: [n, 2].
    """
    empty = ~(corners[:, 2:] > corners[:, :2]).all(1)
    near = (corners[:, :2] >= -1) & (corners[:, 2:] <= sizes + 1)
    overlap = (corners[:, :2] < sizes) & (corners[:, 2:] > 0)
    outside = ~(near & overlap).all(1)
    for index in np.flatnonzero(empty | outside).tolist():
        x0, y0, x1, y1 = corners[index].tolist()
        width, height = sizes[index].tolist()
        flaw = f"lies outside of its image of {width:g} x {height:g} pixels"
        if empty[index]:
            flaw = f"has the width {x1 - x0:g} and the height {y1 - y0:g}"
        yield index, f"its box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) {flaw}"


def clipped(corners: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The boxes [n, 4] without what rounding put outside of their images."""
    return np.clip(corners, 0, np.tile(sizes, 2))


def check_present(paths: Sequence[Path]) -> None:
    """Raise if an image file is missing."""
    missing = [str(path) for path in paths if not os.path.isfile(path)]  # no error if too long
    if missing:
        shown = ", ".join([*missing[:5], *(["..."] if len(missing) > 5 else [])])
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} annotated images are missing: {shown} "
            "(set data.init_args.root to the data set's own folder)"
        )
