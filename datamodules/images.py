"""Image files: finding, checking, reading and transforming them; the datamodules that hold them."""

import os
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from PIL import Image
from rich.progress import track
from torchvision.transforms import v2

from .base import ClassificationDataModule, Samples, check_at_least
from .splits import hold_out

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder, sorted, hidden ones left out; links are followed."""
    tree = os.walk(folder, followlinks=True)
    files = (Path(here, name) for here, _, names in tree for name in names)
    return sorted(
        path
        for path in files
        if path.suffix.lower() in EXTENSIONS and not _is_hidden(path.relative_to(folder))
    )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def images_to_predict(folder: str) -> list[Path]:
    """All image files below a folder that must hold some."""
    paths = find_images(Path(folder))
    if not paths:
        known = " ".join(sorted(EXTENSIONS))
        raise FileNotFoundError(f"no images below predict_root {folder}; looked for {known}")
    return paths


def check_splitting(val_fraction: float, predict_root: str | None) -> None:
    """Raises if the arguments that make splits make no sense."""
    if not 0 < val_fraction < 0.5:
        raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 0.5")
    if predict_root is not None and not Path(predict_root).is_dir():
        raise FileNotFoundError(f"predict_root {predict_root} is no folder")


def read_image(path: str | Path) -> Image.Image:
    """Read a file as RGB; one that cannot be read is named."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UNREADABLE as reason:
        raise ValueError(
            f"cannot read image {path} ({reason}); replace or remove it "
            "(check_images: true finds all such files before training)"
        ) from reason


def check_images(paths: Sequence[str | Path]) -> None:
    """Read every file once and raise one error that names those which cannot be read."""
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        outcomes = track(pool.map(_is_readable, paths), "Checking images", total=len(paths))
        broken = [str(path) for path, fine in zip(paths, outcomes, strict=True) if not fine]
    if broken:
        shown = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        raise ValueError(f"{len(broken)} unreadable image(s): {shown}; replace or remove them")


def _is_readable(path: str | Path) -> bool:
    try:
        read_image(path)
    except ValueError:
        return False
    return True


class ImageFiles:
    """Paths, read when asked for."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> Image.Image:
        return read_image(self.paths[index])


def from_files(paths: Sequence[str | Path], labels: Sequence[int]) -> Samples:
    """Samples of image files, named by their paths."""
    return Samples(ImageFiles(paths), labels, [str(path) for path in paths])


def train_transform(img_size: int, min_crop: float) -> v2.Compose:
    """A random crop of at least that share of the image, mirrored every other time."""
    if min_crop == 1:
        return v2.Compose([v2.RandomHorizontalFlip(), eval_transform(img_size)])
    crop = v2.RandomResizedCrop(
        img_size, scale=(min_crop, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])


def eval_transform(img_size: int) -> v2.Compose:
    """The largest square in the image's middle."""
    resize = v2.Resize(img_size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(img_size), v2.PILToTensor()])


class ImageDataModule(ClassificationDataModule):
    """Image files in splits; a subclass finds the splits that a data set brings along.

    A missing validation split is held out from the training images. So is a missing test split,
    unless there is a validation split to stand in for it. Both are stratified and follow the seed.
    """

    def __init__(
        self,
        img_size: int,
        batch_size: int,
        num_workers: int,
        seed: int,
        samples_per_class: int | None,
        val_fraction: float,
        augment: bool,
        min_crop: float,
        predict_root: str | None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, samples_per_class)
        check_at_least("img_size", img_size, 1)
        check_splitting(val_fraction, predict_root)
        if not 0 < min_crop <= 1:
            raise ValueError(f"min_crop={min_crop} is a share of the image: it must lie in (0, 1]")
        self.img_size = img_size
        self.val_fraction = val_fraction
        self.augment = augment
        self.min_crop = min_crop
        self.predict_root = predict_root
        self._splits: dict[str, Samples] = {}

    @abstractmethod
    def official_splits(self) -> dict[str, Samples]:
        """The splits that the data set itself defines, "train" at least."""

    def split(self, name: str) -> Samples:
        """The samples of a split with its transform; "predict" falls back to "test"."""
        if name == "predict" and self.predict_root is not None:
            paths = images_to_predict(self.predict_root)
            samples = from_files(paths, [-1] * len(paths))
        else:
            self._splits = self._splits or self._complete(self.official_splits())
            samples = self._splits["test" if name == "predict" else name]
        if name == "train" and self.augment:
            transform = train_transform(self.img_size, self.min_crop)
        else:
            transform = eval_transform(self.img_size)
        return replace(samples, transform=transform, seed=self.seed)

    def _complete(self, splits: dict[str, Samples]) -> dict[str, Samples]:
        """Fill in missing splits; validation images are not taken from the test's share."""
        if "test" not in splits:
            splits |= {"test": splits["val"]} if "val" in splits else self._hold_out(splits, "test")
        if "val" not in splits:
            splits |= self._hold_out(splits, "val")
        return splits

    def _hold_out(self, splits: dict[str, Samples], name: str) -> dict[str, Samples]:
        train = splits["train"]
        kept, held = hold_out(train.labels, self.val_fraction, self.seed)
        return {"train": train.take(kept), name: train.take(held)}
