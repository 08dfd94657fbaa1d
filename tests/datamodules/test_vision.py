"""torchvision's data sets, as tiny copies in their own formats on disk."""

import json
import pickle
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets

from litflora.datamodules import VisionDataModule
from litflora.datamodules.vision import SOURCES

Photo = Callable[..., Path]


def build(dataset: str, root: Path, **changes: Any) -> VisionDataModule:
    return VisionDataModule(dataset, str(root), **{"img_size": 16, "batch_size": 4, **changes})


def sizes(data: VisionDataModule) -> list[int]:
    data.setup()
    return [len(data.datasets[split]) for split in ("train", "val", "test")]


def write_cifar(folder: Path, files: list[str], labels: str, names: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)
    for name in files:
        batch = {"data": pixels, labels: [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    ((meta, contents),) = names.items()
    (folder / meta).write_bytes(pickle.dumps(contents))


def make_cifar10(root: Path, photo: Photo) -> None:
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    meta = {"batches.meta": {"label_names": list("abcdefghij")}}
    write_cifar(root / "cifar-10-batches-py", files, "labels", meta)


def make_cifar100(root: Path, photo: Photo) -> None:
    meta = {"meta": {"fine_label_names": [f"thing {i}" for i in range(100)]}}
    write_cifar(root / "cifar-100-python", ["train", "test"], "fine_labels", meta)


def make_dtd(root: Path, photo: Photo) -> None:
    base = root / "dtd" / "dtd"
    (base / "labels").mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test")):
        lines = [f"{name}/{name}_{number}.jpg" for name in ("banded", "zigzagged")]
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines))
        for line in lines:
            photo(base / "images" / line)


def make_eurosat(root: Path, photo: Photo) -> None:
    for name in ("Forest", "River"):
        for number in range(10):
            photo(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg")


def make_fgvc_aircraft(root: Path, photo: Photo) -> None:
    base = root / "fgvc-aircraft-2013b" / "data"
    for split in ("train", "val", "test"):
        photo(base / "images" / f"{split}.jpg")
        (base / f"images_variant_{split}.txt").write_text(f"{split} A300B4\n")
    (base / "variants.txt").write_text("707-320\nA300B4\n")


def make_food101(root: Path, photo: Photo) -> None:
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, count in {"train": 10, "test": 4}.items():
        files = {name: [f"{name}/{split}{i}" for i in range(count)] for name in ("pho", "cake")}
        (base / "meta" / f"{split}.json").write_text(json.dumps(files))
        for path in chain(*files.values()):
            photo(base / "images" / f"{path}.jpg")


def make_oxford_iiit_pet(root: Path, photo: Photo) -> None:
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, count in {"trainval": 10, "test": 4}.items():
        ids = [(f"{name}_{split}{i}", label) for label, name in PETS for i in range(count)]
        lines = [f"{image} {label} 1 1" for image, label in ids]
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines))
        for image, _ in ids:
            photo(base / "images" / f"{image}.jpg")


PETS = [(1, "Abyssinian"), (2, "american_bulldog")]


def make_imagenet(root: Path, photo: Photo) -> None:
    names = {"n01": ("tench", "Tinca tinca"), "n02": ("goldfish",)}
    for split in ("train", "val"):
        for wnid in names:
            for number in range(3):
                photo(root / split / wnid / f"{number}.JPEG")
    torch.save((names, ["n01"]), root / "meta.bin")


# Class names, and the sizes of train, val and test.
COPIES = {
    "cifar10": (make_cifar10, list("abcdefghij"), [90, 10, 20]),
    "cifar100": (make_cifar100, [f"thing {i}" for i in range(100)], [10, 10, 20]),
    "dtd": (make_dtd, ["banded", "zigzagged"], [2, 2, 2]),
    "eurosat": (make_eurosat, ["Forest", "River"], [16, 2, 2]),
    "fgvc_aircraft": (make_fgvc_aircraft, ["707-320", "A300B4"], [1, 1, 1]),
    "food101": (make_food101, ["cake", "pho"], [18, 2, 8]),
    "imagenet": (make_imagenet, ["tench", "goldfish"], [6, 6, 6]),
    "oxford_iiit_pet": (make_oxford_iiit_pet, ["Abyssinian", "American Bulldog"], [18, 2, 8]),
}


@pytest.fixture(params=COPIES)
def copy(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    photo: Photo,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    # The checksums are those of the real files.
    for module in (torchvision.datasets.cifar, torchvision.datasets.imagenet):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())
    COPIES[request.param][0](tmp_path, photo)
    return request.param


def test_classes_splits_and_batches(copy: str, tmp_path: Path) -> None:
    _, class_names, counts = COPIES[copy]
    data = build(copy, tmp_path)
    assert data.class_names == class_names
    assert data.num_classes == len(class_names)
    assert sizes(data) == counts
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape[1:] == (3, 16, 16)
    assert images.dtype == torch.uint8
    assert 0 <= labels.min() <= labels.max() < data.num_classes
    data.setup("predict")
    _, names = next(iter(data.predict_dataloader()))
    assert names == data.datasets["test"].names[: len(names)]


def test_labels_fit_their_images(tmp_path: Path, photo: Photo) -> None:
    make_oxford_iiit_pet(tmp_path, photo)
    data = build("oxford_iiit_pet", tmp_path)
    data.setup()
    for samples in data.datasets.values():
        for name, label in zip(samples.names, samples.labels, strict=True):
            assert Path(name).name.startswith(PETS[label][1])


@pytest.mark.parametrize("dataset", SOURCES)
def test_the_table_fits_torchvision(dataset: str) -> None:
    source = SOURCES[dataset]
    known = getattr(torchvision.datasets, source.torchvision_class)
    assert "train" in source.splits
    assert len(getattr(known, "classes", range(source.num_classes))) == source.num_classes


@pytest.mark.parametrize("dataset", SOURCES)
def test_missing_data_names_the_remedy(dataset: str, tmp_path: Path) -> None:
    remedy = "set download: true" if SOURCES[dataset].downloadable else "cannot download it"
    needs_scipy = "imagenet needs scipy: pip install scipy"  # to read the copy's own format
    with pytest.raises((FileNotFoundError, ImportError)) as error:
        build(dataset, tmp_path / "nowhere")
    text = str(error.value)
    assert text == needs_scipy or (remedy in text and "nowhere" in text and "\n" not in text)


@pytest.mark.parametrize("dataset", [name for name in SOURCES if SOURCES[name].downloadable])
def test_classes_are_counted_before_the_download(dataset: str, tmp_path: Path) -> None:
    data = build(dataset, tmp_path, download=True)
    assert data.num_classes == SOURCES[dataset].num_classes


def test_download_comes_with_setup_and_brings_the_names(
    tmp_path: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = build("eurosat", tmp_path, download=True)
    assert data.class_names[:2] == ["class 0", "class 1"]
    monkeypatch.setattr(
        torchvision.datasets.EuroSAT, "download", lambda self: make_eurosat(tmp_path, photo)
    )
    data.setup("fit")
    assert data.class_names == ["Forest", "River"]


def test_predicting_needs_no_data_set(tmp_path: Path, photo: Photo) -> None:
    photo(tmp_path / "new" / "x.jpg")
    data = build("cifar10", tmp_path / "gone", predict_root=str(tmp_path / "new"))
    assert data.num_classes == 10
    data.setup("predict")
    ((_, names),) = data.predict_dataloader()
    assert names == [str(tmp_path / "new" / "x.jpg")]


def test_unknown_names_suggest_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown dataset 'CIFAR-10': did you mean 'cifar10'"):
        build("CIFAR-10", tmp_path)
    with pytest.raises(ValueError, match="unknown dataset 'xyz': known are cifar10, cifar100"):
        build("xyz", tmp_path)
