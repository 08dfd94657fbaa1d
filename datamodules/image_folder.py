"""Your own photos, in folders named after their classes."""

from pathlib import Path

from .base import SPLITS, Samples
from .images import ImageDataModule, check_images, find_images, from_files


class ImageFolderDataModule(ImageDataModule):
    """Images in `root/<split>/<class>/`, or in `root/<class>/` with splits made by the seed.

    Split folders are `train`, `val` and `test`. A missing `val` is held out from the training
    images; a missing `test` too, unless there is a `val` to stand in for it.

    Args:
        root: The data set's folder.
        img_size: Side of the images that come out, in pixels.
        batch_size: Samples in a batch of one process.
        num_workers: Processes that load; they change the speed and never the batches.
        seed: Decides splits, subset, order and augmentation.
        val_fraction: Share of each class held out for validation, and again for testing.
        samples_per_class: Train on that many images of each class only.
        augment: Crop and mirror training images at random.
        min_crop: Smallest share of an image that a random crop keeps; 1 mirrors alone.
        check_images: Read every image once before training and name those that cannot be read.
        predict_root: Folder of images to predict, with any folders inside; else the test split.
            With it, `root` may be missing: `class_names` is then empty.
    """

    def __init__(
        self,
        root: str,
        img_size: int = 224,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        samples_per_class: int | None = None,
        augment: bool = True,
        min_crop: float = 0.5,
        check_images: bool = False,
        predict_root: str | None = None,
    ) -> None:
        super().__init__(
            img_size=img_size,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            samples_per_class=samples_per_class,
            val_fraction=val_fraction,
            augment=augment,
            min_crop=min_crop,
            predict_root=predict_root,
        )
        self.root = Path(root)
        self.check_images = check_images
        predict_only = predict_root is not None and not self.root.is_dir()
        self.class_names = [] if predict_only else self._find_classes()

    def prepare_data(self) -> None:
        """Also read every image of the coming stage once, if `check_images` asks for it."""
        super().prepare_data()
        if self.check_images and self.datasets:
            check_images(sorted({n for samples in self.datasets.values() for n in samples.names}))

    def official_splits(self) -> dict[str, Samples]:
        """The splits that have a folder; all images are "train" if none has."""
        return {name: self._scan(folder) for name, folder in self._split_folders().items()}

    def _split_folders(self) -> dict[str, Path]:
        # A split folder holds class folders: "train" may also be a class among car and bus.
        folders = {name: self.root / name for name in SPLITS if _subfolders(self.root / name)}
        return folders if "train" in folders else {"train": self.root}

    def _find_classes(self) -> list[str]:
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"data root {self.root} is no folder; expected {self.root}/train/<class>/*.jpg or "
                f"{self.root}/<class>/*.jpg (set data.init_args.root)"
            )
        classes = {name: _subfolders(folder) for name, folder in self._split_folders().items()}
        train = classes.pop("train")
        if not train:
            raise FileNotFoundError(
                f"data root {self.root} holds no class folders; expected "
                f"{self.root}/train/<class>/*.jpg or {self.root}/<class>/*.jpg"
            )
        for name, others in classes.items():
            if others != train:
                raise ValueError(
                    f"{self.root}: the classes of train and {name} differ: "
                    f"only in train {_listed(train, others)}, only in {name} "
                    f"{_listed(others, train)}"
                )
        return train

    def _scan(self, folder: Path) -> Samples:
        paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            found = find_images(folder / name)
            if not found:
                raise FileNotFoundError(f"class folder {folder / name} holds no images")
            paths += found
            labels += [label] * len(found)
        return from_files(paths, labels)


def _subfolders(folder: Path) -> list[str]:
    folders = folder.iterdir() if folder.is_dir() else ()
    return sorted(path.name for path in folders if path.is_dir() and path.name[0] != ".")


def _listed(names: list[str], others: list[str]) -> str:
    return ", ".join(sorted(set(names) - set(others))) or "none"
