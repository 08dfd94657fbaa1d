"""The classification data sets of torchvision behind one name."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torchvision.datasets
from torch.utils.data import Dataset

from .base import Samples
from .images import ImageDataModule, from_files

Splits = Mapping[str, Mapping[str, Any]]

_FLAG: Splits = {"train": {"train": True}, "test": {"train": False}}
_TWO: Splits = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: Splits = {**_TWO, "val": {"split": "val"}}


@dataclass(frozen=True)
class Source:
    """A data set's class in torchvision, and the arguments that select its official splits."""

    torchvision_class: str
    num_classes: int
    splits: Splits
    downloadable: bool = True


SOURCES: dict[str, Source] = {
    "cifar10": Source("CIFAR10", 10, _FLAG),
    "cifar100": Source("CIFAR100", 100, _FLAG),
    "dtd": Source("DTD", 47, _THREE),
    "eurosat": Source("EuroSAT", 10, {"train": {}}),
    "fgvc_aircraft": Source("FGVCAircraft", 100, _THREE),
    "flowers102": Source("Flowers102", 102, _THREE),
    "food101": Source("Food101", 101, _TWO),
    # The labels of ImageNet's test images are not public.
    "imagenet": Source(
        "ImageNet",
        1000,
        {"train": {"split": "train"}, "val": {"split": "val"}},
        downloadable=False,
    ),
    "oxford_iiit_pet": Source(
        "OxfordIIITPet", 37, {"train": {"split": "trainval"}, "test": {"split": "test"}}
    ),
    "stanford_cars": Source("StanfordCars", 196, _TWO, downloadable=False),
}


class VisionDataModule(ImageDataModule):
    """A torchvision data set, with its official splits where it has them.

    A missing validation split is held out from the training images. So is EuroSAT's test split;
    ImageNet's validation images serve as its test split too.

    Args:
        dataset: cifar10, cifar100, dtd, eurosat, fgvc_aircraft, flowers102, food101, imagenet,
            oxford_iiit_pet or stanford_cars.
        root: The folder that torchvision reads the data set from or downloads it to.
        download: Fetch the data set before the first use. Until then the classes have numbers for
            names, except where torchvision knows them.
        img_size: Side of the images that come out, in pixels.
        batch_size: Samples in a batch of one process.
        num_workers: Processes that load; they change the speed and never the batches.
        seed: Decides held out splits, subset, order and augmentation.
        val_fraction: Share of each class held out where a split is missing.
        samples_per_class: Train on that many images of each class only.
        augment: Crop and mirror training images at random.
        min_crop: Smallest share of an image that a random crop keeps; 1 mirrors alone.
        predict_root: Folder of images to predict, with any folders inside; else the test split.
            With it, `root` may be missing.
    """

    def __init__(
        self,
        dataset: str,
        root: str,
        download: bool = False,
        img_size: int = 224,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        samples_per_class: int | None = None,
        augment: bool = True,
        min_crop: float = 0.5,
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
        self.dataset = dataset
        self.source = _source(dataset)
        self.root = Path(root)
        self.download = download
        self._opened: dict[str, Any] = {}
        self.class_names = self._find_classes()

    def official_splits(self) -> dict[str, Samples]:
        """The splits that torchvision knows; the class names are certain from here on."""
        download = self.download and self.source.downloadable
        opened = {name: self._open(name, download) for name in self.source.splits}
        self.class_names = _class_names(opened["train"])
        return {name: _samples(dataset, name) for name, dataset in opened.items()}

    def _find_classes(self) -> list[str]:
        smallest = list(self.source.splits)[-1]
        try:
            return _class_names(self._open(smallest))
        except FileNotFoundError:
            later = self.download and self.source.downloadable
            if not later and self.predict_root is None:
                raise
        known = getattr(torchvision.datasets, self.source.torchvision_class)
        numbers = [f"class {number}" for number in range(self.source.num_classes)]
        return list(getattr(known, "classes", numbers))

    def _open(self, name: str, download: bool = False) -> Any:
        if name not in self._opened:
            maker = getattr(torchvision.datasets, self.source.torchvision_class)
            options = {**self.source.splits[name], **({"download": True} if download else {})}
            try:
                self._opened[name] = maker(self.root, **options)
            except ModuleNotFoundError as missing:
                raise ImportError(
                    f"{self.dataset} needs {missing.name}: pip install {missing.name}"
                ) from missing
            except (RuntimeError, OSError) as reason:
                raise FileNotFoundError(self._missing(reason)) from reason
        return self._opened[name]

    def _missing(self, reason: Exception) -> str:
        remedy = (
            "set download: true, or root to the folder that holds it"
            if self.source.downloadable
            else "torchvision cannot download it; set root to a folder with your copy"
        )
        return f"cannot read {self.dataset} from {self.root}: {remedy} ({reason})"


class Pictures:
    """The images of a torchvision data set that keeps no files."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index][0]


def _source(dataset: str) -> Source:
    if dataset in SOURCES:
        return SOURCES[dataset]
    near = get_close_matches(dataset.lower(), SOURCES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(SOURCES)}"
    raise ValueError(f"unknown dataset {dataset!r}: {hint}")


def _class_names(dataset: Any) -> list[str]:
    # ImageNet gives every class a tuple of synonyms.
    return [name if isinstance(name, str) else name[0] for name in dataset.classes]


def _samples(dataset: Any, split: str) -> Samples:
    """Labels and files of a torchvision data set, which keeps them under one of four names."""
    if isinstance(dataset, torchvision.datasets.CIFAR10):
        names = [f"{split}/{index:05d}" for index in range(len(dataset))]
        return Samples(Pictures(dataset), dataset.targets, names)
    pairs = getattr(dataset, "samples", None) or getattr(dataset, "_samples", None)
    if pairs is not None:
        paths, labels = zip(*pairs, strict=True)
        return from_files(paths, labels)
    paths = getattr(dataset, "_image_files", None) or dataset._images
    return from_files(paths, dataset._labels)
