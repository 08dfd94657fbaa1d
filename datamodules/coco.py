"""COCO, and your own images with annotations in its format."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from .base import SPLITS
from .coco_json import CocoFile, mask_api
from .detection_files import DetectionFilesDataModule


class CocoFilesDataModule(DetectionFilesDataModule):
    """Images with annotations in COCO's format; a subclass tells where the files are.

    Classes are those of the file, in the order of their ids. Crowds are left out of training, and
    evaluation ignores them.

    Args:
        root: The data set's own folder.
        masks: Give the masks of the objects, too, which needs `pip install 'litflora[dense]'`.
        options: `scale_range` of `DetectionFilesDataModule`, `crop_size` to `predict_root` of
            `DenseFilesDataModule`.
    """

    flawed: ClassVar[frozenset[int]] = frozenset()  # ids of annotations that are left out

    def __init__(self, root: str, masks: bool = False, **options: Any) -> None:
        super().__init__(root, **options)
        self.masks = masks
        if masks:
            mask_api()  # without it, this is the time to know
        categories = self._categories
        self.class_names = list(categories.values())

    @abstractmethod
    def sources(self) -> dict[str, tuple[Path, Path]]:
        """The JSON file and the image folder of each split that there is."""

    @property
    def category_ids(self) -> list[int]:
        """The id of each class in the file."""
        return list(self._categories)

    def official_splits(self) -> dict[str, Sequence[Any]]:
        """The splits that have a file, each read when it is needed."""
        return dict(self._files)

    def _items(self, name: str) -> Sequence[Any]:
        items = super()._items(name)
        if isinstance(items, CocoFile) and items.categories != self._categories:
            unlike = sorted(items.categories.items() ^ self._categories.items())
            raise ValueError(
                f"{items.path} has other categories than {self._smallest.path}; they differ in "
                + ", ".join(f"{number}: {name}" for number, name in unlike[:5])
            )
        return items

    @cached_property
    def _files(self) -> dict[str, CocoFile]:
        return {
            name: CocoFile(path, folder, self.masks, self.flawed)
            for name, (path, folder) in self.sources().items()
        }

    @cached_property
    def _smallest(self) -> CocoFile:
        return min(self._files.values(), key=lambda file: file.path.stat().st_size)

    @cached_property
    def _categories(self) -> dict[int, str]:
        if self.predict_root is not None and not self.root.is_dir():
            return {}
        missing = [str(file.path) for file in self._files.values() if not file.path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{' and '.join(missing)} missing (set data.init_args.root to the data set's own "
                "folder)"
            )
        return self._smallest.categories


class CocoDataModule(CocoFilesDataModule):
    """COCO 2017 (Lin et al., arXiv 1405.0312): 80 classes; validation images also stand for test.

    `root` holds `train2017/`, `val2017/` and `annotations/instances_{train,val}2017.json`.
    """

    flawed = frozenset({918, 2206849})  # the two boxes of train2017 that have no height

    def sources(self) -> dict[str, tuple[Path, Path]]:
        """The splits "train" and "val"."""
        return {
            name: (self.root / f"annotations/instances_{name}2017.json", self.root / f"{name}2017")
            for name in ("train", "val")
        }


class CocoFolderDataModule(CocoFilesDataModule):
    """Your own images with annotations in COCO's JSON format.

    Args:
        root: The data set's folder, which all other paths start from.
        train_json: Annotations of the training images.
        val_json: Those of the validation images; without it some training images are held out.
        test_json: Those of the test images; without it the validation images stand in.
        images: Folder that the file names in the JSON start from, or one for each of `train`,
            `val` and `test`; the folder of the JSON itself if none is given.
        masks: Give the masks of the objects, too, which needs `pip install 'litflora[dense]'`.
        options: `scale_range` of `DetectionFilesDataModule`, `crop_size` to `predict_root` of
            `DenseFilesDataModule`.
    """

    def __init__(
        self,
        root: str,
        train_json: str,
        val_json: str | None = None,
        test_json: str | None = None,
        images: str | dict[str, str] | None = None,
        masks: bool = False,
        **options: Any,
    ) -> None:
        self.listings = dict(zip(SPLITS, (train_json, val_json, test_json), strict=True))
        self.images = images
        super().__init__(root, masks, **options)

    def sources(self) -> dict[str, tuple[Path, Path]]:
        """The splits that have a file."""
        return {
            name: (self.root / listing, self._folder(name, self.root / listing))
            for name, listing in self.listings.items()
            if listing is not None
        }

    def _folder(self, name: str, listing: Path) -> Path:
        if self.images is None:
            return listing.parent
        if isinstance(self.images, str):
            return self.root / self.images
        if name not in self.images:
            raise ValueError(f"images names no folder of {name}: give one, or one for all splits")
        return self.root / self.images[name]
