"""Datamodules of images with masks: layouts, batches, repeatability, mistakes in the data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor

from litflora.datamodules import (
    ADE20KDataModule,
    CamVidDataModule,
    CityscapesDataModule,
    MaskFolderDataModule,
    OxfordPetTrimapsDataModule,
    ShapesSegmentationDataModule,
    VOCSegmentationDataModule,
)
from litflora.datamodules.masks import IGNORE
from litflora.datamodules.scenes import KINDS
from litflora.datamodules.segmentation import SegmentationDataModule

SHADE = 20


def pair(image: Path, mask: Path, ids: list[int], size: tuple[int, int] = (20, 16)) -> None:
    """Writes a mask with a column for each id, and an image in which column k is k * SHADE."""
    columns = np.arange(size[0]) * len(ids) // size[0]
    shades = np.broadcast_to(columns * SHADE, size[::-1]).astype(np.uint8)
    for path, pixels in (
        (image, np.repeat(shades[..., None], 3, 2)),
        (mask, np.broadcast_to(np.array(ids, np.uint8)[columns], size[::-1]).copy()),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        # PNG under any name: the columns are compared to the bit, whatever the layout's suffix.
        Image.fromarray(pixels).save(path, format="PNG")


def camvid(root: Path) -> None:
    for name, count in {"train": 4, "val": 2, "test": 3}.items():
        for i in range(count):
            pair(root / name / f"{i}.png", root / f"{name}annot" / f"{i}.png", [0, 10, 11])


def voc(root: Path) -> None:
    home = root / "VOCdevkit" / "VOC2012"
    for name, count in {"train": 4, "val": 2}.items():
        names = [f"{name}_{i}" for i in range(count)]
        for each in names:
            pair(
                home / f"JPEGImages/{each}.jpg",
                home / f"SegmentationClass/{each}.png",
                [0, 20, 255],
            )
        listing = home / "ImageSets" / "Segmentation" / f"{name}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(names) + "\n")
    pair(home / "JPEGImages/unlisted.jpg", home / "SegmentationClass/unlisted.png", [99])


def ade(root: Path) -> None:
    for name, count in {"training": 4, "validation": 2}.items():
        for i in range(count):
            images, masks = root / "images" / name, root / "annotations" / name
            pair(images / f"ADE_{i}.jpg", masks / f"ADE_{i}.png", [1, 150, 0])


def cityscapes(root: Path) -> None:
    for name, count in {"train": 4, "val": 2}.items():
        for i in range(count):
            stem = f"{name}/ulm/ulm_{i:06d}_000019"
            mask = root / f"gtFine/{stem}_gtFine_labelIds.png"
            pair(root / f"leftImg8bit/{stem}_leftImg8bit.png", mask, [7, 33, 4])
            Image.new("RGB", (20, 16)).save(root / f"gtFine/{stem}_gtFine_color.png")


def pets(root: Path) -> None:
    home = root / "oxford-iiit-pet"
    for name, count in {"trainval": 10, "test": 3}.items():
        for i in range(count):
            stem = f"{name}_pug_{i}"
            pair(home / f"images/{stem}.jpg", home / f"annotations/trimaps/{stem}.png", [1, 2, 3])
        lines = [f"{name}_pug_{i} 1 2 3" for i in range(count)]
        (home / "annotations" / f"{name}.txt").write_text("\n".join(lines))


def folder(root: Path) -> None:
    for name, count in {"train": 4, "val": 2, "test": 3}.items():
        for i in range(count):
            at = root / name
            pair(at / f"images/{i}.jpg", at / f"masks/{i}.png", [0, 1, 255])


Case = tuple[Callable[..., Any], Callable[[Path], None], list[int], list[int], dict[str, Any]]
# Class, writer, the classes of a mask's three columns, the sizes of the splits, its own arguments.
LAYOUTS: dict[str, Case] = {
    "camvid": (CamVidDataModule, camvid, [0, 10, IGNORE], [4, 2, 3], {}),
    "voc": (VOCSegmentationDataModule, voc, [0, 20, IGNORE], [4, 2, 2], {}),
    "ade20k": (ADE20KDataModule, ade, [0, 149, IGNORE], [4, 2, 2], {}),
    "cityscapes": (CityscapesDataModule, cityscapes, [0, 18, IGNORE], [4, 2, 2], {}),
    "pets": (OxfordPetTrimapsDataModule, pets, [0, 1, 2], [9, 1, 3], {}),
    "folder": (
        MaskFolderDataModule,
        folder,
        [0, 1, IGNORE],
        [4, 2, 3],
        {"class_names": ["ground", "tree"]},
    ),
}
COUNTS = {"camvid": 11, "voc": 21, "ade20k": 150, "cityscapes": 19, "pets": 3, "folder": 2}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any]:
    kind, write, _, _, options = LAYOUTS[request.param]
    write(tmp_path)
    return request.param, kind(str(tmp_path), crop_size=(12, 18), batch_size=4, **options)


def test_every_layout_is_read(layout: tuple[str, SegmentationDataModule]) -> None:
    name, data = layout
    _, _, classes, sizes, _ = LAYOUTS[name]
    assert data.num_classes == len(data.palette) == len(set(data.palette)) == COUNTS[name]
    assert len(set(data.class_names)) == data.num_classes
    data.setup()
    data.setup("predict")
    assert [len(data.datasets[split]) for split in ("train", "val", "test")] == sizes
    for images, masks in [*data.val_dataloader(), *data.test_dataloader()]:
        (image,), (mask,) = images, masks
        assert (image.dtype, mask.dtype) == (torch.uint8, torch.int64)
        assert (image.shape, mask.shape) == ((3, 16, 20), (16, 20))
        expected = torch.tensor(classes)[image[0].long() // SHADE]
        assert torch.equal(mask, expected)
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, masks.shape) == ((4, 3, 12, 18), (4, 12, 18))
    assert (images.dtype, masks.dtype) == (torch.uint8, torch.int64)
    assert set(masks.unique().tolist()) <= {*classes, IGNORE}
    assert masks.unique().numel() > 1
    assert f"{sizes[0]} train" in data.contents()


def test_prediction_takes_the_test_split(layout: tuple[str, SegmentationDataModule]) -> None:
    _, data = layout
    data.setup("test")
    data.setup("predict")
    batches = list(data.predict_dataloader())
    names = [name for _, names in batches for name in names]
    assert names == list(data.datasets["test"].names)
    assert batches[0][0][0].shape == (3, 16, 20)


def test_prediction_of_a_folder_needs_no_data_set(tmp_path: Path) -> None:
    pair(tmp_path / "new" / "a" / "x.jpg", tmp_path / "gone.png", [1])
    data = CamVidDataModule(str(tmp_path / "none"), predict_root=str(tmp_path / "new"))
    data.setup("predict")
    ((images, names),) = data.predict_dataloader()
    assert images[0].shape == (3, 16, 20)
    assert names == [str(tmp_path / "new" / "a" / "x.jpg")]


def test_folders_without_splits_are_split_by_the_seed(tmp_path: Path) -> None:
    for i in range(10):
        pair(tmp_path / f"images/{i}.jpg", tmp_path / f"masks/{i}.png", [0])
    splits = []
    for seed in (0, 0, 1):
        data = MaskFolderDataModule(str(tmp_path), ["all"], val_fraction=0.3, seed=seed)
        data.setup()
        train, val, test = (set(data.datasets[name].names) for name in ("train", "val", "test"))
        assert len(train) == 7
        assert len(train | val) == 10
        assert test == val
        splits.append(val)
    assert splits[0] == splits[1] != splits[2]


def test_masks_may_be_drawn_in_colours(tmp_path: Path) -> None:
    shown = np.array([[[255, 0, 0], [0, 0, 255]], [[9, 9, 9], [0, 0, 0]]], np.uint8)
    for split in ("train", "val", "test"):
        for part in ("images", "masks"):
            at = tmp_path / split / part
            at.mkdir(parents=True)
            Image.fromarray(shown).save(at / "x.png")
    colors = {"car": (0, 0, 255), "bus": (255, 0, 0)}
    data = MaskFolderDataModule(str(tmp_path), colors=colors, ignore=[(9, 9, 9), (0, 0, 0)])
    assert data.class_names == ["car", "bus"]
    assert data.palette == [(0, 0, 255), (255, 0, 0)]
    data.setup("test")
    assert data.datasets["test"][0][1].tolist() == [[1, 0], [255, 255]]


def test_white_may_be_a_class(tmp_path: Path) -> None:
    for i in range(2):
        pair(tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", [0, 255], (2, 1))
    data = MaskFolderDataModule(str(tmp_path), ["ground", "thing"], ids=[0, 255])
    data.setup("fit")
    assert data.datasets["val"][0][1].tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "either class_names"),
        ({"class_names": ["a"], "colors": {"a": (0, 0, 0)}}, "either class_names"),
        ({"colors": {"a": (0, 0, 0)}, "ids": [0]}, "leave ids out"),
        ({"colors": {"a": (0, 300, 0)}}, r"\(0, 300, 0\) is no colour: give \[red, green, blue\]"),
        ({"colors": {"a": (0, 0)}}, r"\(0, 0\) is no colour"),
        ({"colors": {"a": "red"}}, "'red' is no colour"),
        ({"colors": {"a": [1, [2], 3]}}, "is no colour"),
        ({"colors": {"a": (0, 0, 0)}, "ignore": [5]}, "5 is no colour"),
        ({"class_names": ["a"], "ignore": [(1, 2, 3)]}, "must be ids"),
        ({"class_names": ["a"], "scale_range": (1.0, float("inf"))}, "least first"),
        ({"class_names": ["a"], "ids": [1, 2]}, "2 values for 1 classes"),
        ({"class_names": ["a"], "scale_range": (2.0, 1.0)}, "least first"),
        ({"class_names": ["a"], "crop_size": (8, 0)}, "crop_size must be at least 1"),
        ({"class_names": ["a"], "eval_batch_size": 0}, "eval_batch_size must be at least 1"),
        ({"class_names": ["a"], "balance_threshold": 0.0}, r"lies in \(0, 1\]"),
        ({"class_names": ["a"], "val_fraction": 0.5}, "between 0 and 0.5"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MaskFolderDataModule(str(tmp_path), **options)


def test_an_unknown_colour_is_named_with_the_known(tmp_path: Path) -> None:
    for i in range(2):
        pair(tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", [7, 7])
    data = MaskFolderDataModule(str(tmp_path), colors={"car": (0, 0, 255)})
    data.setup("fit")
    said = r"holds colour \[7, 7, 7\], which is no class; known are \[0, 0, 255\]"
    with pytest.raises(ValueError, match=said):
        data.datasets["val"][0]


def test_without_images_to_train_on(tmp_path: Path) -> None:
    pair(tmp_path / "val/images/1.png", tmp_path / "val/masks/1.png", [0])
    with pytest.raises(FileNotFoundError, match=r"no training images below .*, only val"):
        MaskFolderDataModule(str(tmp_path), ["a"]).setup("fit")


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        CamVidDataModule(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_empty_root(name: str, tmp_path: Path) -> None:
    kind, _, _, _, options = LAYOUTS[name]
    with pytest.raises(FileNotFoundError, match=r"set data\.init_args\.root"):
        kind(str(tmp_path), **options).setup("fit")


# Repeatability ---------------------------------------------------------------------------------


def build(root: Path, **changes: Any) -> CamVidDataModule:
    if not root.exists():
        camvid(root)
    return CamVidDataModule(str(root), **{"crop_size": 24, "batch_size": 2, **changes})


def epochs(data: Any) -> list[Tensor]:
    data.setup("fit")
    loader = data.train_dataloader()
    parts = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        parts += [part for batch in loader for part in batch]
    return parts


def same(ours: list[Tensor], others: list[Tensor]) -> bool:
    return len(ours) == len(others) and all(map(torch.equal, ours, others))


@pytest.mark.parametrize("balanced", [False, True])
def test_batches_follow_seed_and_epoch_not_workers(tmp_path: Path, balanced: bool) -> None:
    root, options = tmp_path / "camvid", {"class_balanced": balanced, "balance_threshold": 1.0}
    alone = epochs(build(root, **options))
    torch.manual_seed(99)
    assert same(alone, epochs(build(root, num_workers=2, **options)))
    assert not same(alone, epochs(build(root, seed=1, **options)))
    half = len(alone) // 2
    assert not same(alone[:half], alone[half:])


@pytest.mark.parametrize("augment", [False, True])
def test_only_augmentation_changes_a_sample(tmp_path: Path, augment: bool) -> None:
    data = build(tmp_path / "camvid", augment=augment)
    data.setup()
    for split in ("train", "val", "test"):
        samples = data.datasets[split]
        first, later = samples[0], samples[3 * len(samples)]
        assert first[2] == later[2]
        assert torch.equal(first[0], later[0]) is not (augment and split == "train")


def test_augmentation_follows_the_seed(tmp_path: Path) -> None:
    one, other = (build(tmp_path / "camvid", seed=seed) for seed in (0, 1))
    one.setup("fit")
    other.setup("fit")
    first, second = (data.datasets["train"][0] for data in (one, other))
    assert first[2] == second[2]
    assert not torch.equal(first[0], second[0])


def test_rare_classes_come_more_often(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "camvid"
    for i in range(16):
        ids = [0, 5] if i == 3 else [0, 11]
        pair(root / f"train/{i:02d}.png", root / f"trainannot/{i:02d}.png", ids)
    options = {"val_fraction": 0.01, "balance_threshold": 0.6, "class_balanced": True, "seed": 2}
    data = build(root, **options)
    data.setup("fit")
    (rare,) = [i for i, name in enumerate(data.datasets["train"].names) if "03.png" in name]
    keys = list(data.train_dataloader().sampler)
    assert len(keys) == 17  # 14 + sqrt(0.6 * 15) = 3
    assert sum(key % 15 == rare for key in keys) in (2, 3, 4)
    assert "Counting classes" in capsys.readouterr().out


class Recorder(LightningModule):
    """Keeps the batches that a fit gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_batches: list[Tensor] = []
        self.val_sizes: list[list[int]] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.train_batches += batch
        return self.weight * 0

    def validation_step(self, batch: Any, index: int) -> None:
        self.val_sizes += [list(mask.shape) for mask in batch[1]]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("balanced", [False, True])
def test_a_trainer_gets_the_same_batches(tmp_path: Path, balanced: bool) -> None:
    root, options = tmp_path / "camvid", {"class_balanced": balanced, "balance_threshold": 1.0}
    expected = epochs(build(root, **options))
    module = Recorder()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=build(root, **options))
    assert same(module.train_batches, expected)
    assert module.val_sizes == [[16, 20]] * 4


@pytest.mark.parametrize("name", LAYOUTS)
def test_hyperparameters_rebuild_the_datamodule(name: str, tmp_path: Path) -> None:
    kind, _, _, _, options = LAYOUTS[name]
    data = kind(str(tmp_path), crop_size=33, **options)
    again = kind(**data.hparams)
    assert dict(again.hparams) == dict(data.hparams)
    assert again.crop_size == (33, 33)


def test_a_config_file_may_set_everything(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(SegmentationDataModule, "data")
    settings = {
        "root": str(tmp_path),
        "colors": {"car": [0, 0, 255], "bus": [255, 0, 0]},
        "ignore": [[0, 0, 0]],
        "crop_size": [32, 48],
        "scale_range": [0.1, 2.0],
        "check": True,
    }
    kind = "litflora.datamodules.MaskFolderDataModule"
    config = parser.parse_object({"data": {"class_path": kind, "init_args": settings}})
    data = parser.instantiate(config).data
    assert data.crop_size == (32, 48)
    assert data.scale_range == (0.1, 2.0)
    assert data.legend.ignored == [0]
    assert data.class_names == ["car", "bus"]


# Mistakes in the data --------------------------------------------------------------------------


def test_a_check_names_all_mistakes_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "camvid"
    data = build(root, check=True)
    Image.new("L", (20, 15)).save(root / "trainannot" / "0.png")
    Image.new("L", (20, 16), 77).save(root / "trainannot" / "1.png")
    (root / "val" / "1.png").write_bytes(b"hi")
    Image.new("RGB", (20, 16)).save(root / "testannot" / "1.png")
    data.setup()
    with pytest.raises(ValueError, match=r"^4 of 9 samples have mistakes:\n") as error:
        data.prepare_data()
    lines = str(error.value).splitlines()[1:]
    expected = [
        ("train/0.png", "trainannot/0.png", "20 x 16", "20 x 15"),
        ("trainannot/1.png", "id 77"),
        ("val/1.png", "cannot read"),
        ("testannot/1.png", "mode RGB"),
    ]
    for line, parts in zip(lines, expected, strict=True):
        assert all(part in line for part in parts), line
    assert "Checking images" in capsys.readouterr().out


def test_a_check_shows_ten_mistakes(tmp_path: Path) -> None:
    for i in range(13):
        pair(tmp_path / f"images/{i}.png", tmp_path / f"masks/{i}.png", [7])
    data = MaskFolderDataModule(str(tmp_path), ["a"], check=True)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"13 of 13 (.*\n){11}and 3 more"):
        data.prepare_data()


def test_good_files_pass_the_check(layout: tuple[str, Any]) -> None:
    _, data = layout
    data.check = True
    data.setup()
    data.setup("predict")
    data.prepare_data()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_is_named_when_loaded(tmp_path: Path, workers: int) -> None:
    root = tmp_path / "camvid"
    data = build(root, num_workers=workers)
    Image.new("L", (20, 16), 77).save(root / "valannot" / "0.png")
    data.setup("validate")
    with pytest.raises(ValueError, match=r"valannot/0\.png holds id 77"):
        list(data.val_dataloader())


def test_a_missing_mask_is_named_at_once(tmp_path: Path) -> None:
    data = build(tmp_path / "camvid")
    (tmp_path / "camvid" / "valannot" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 images without a mask .*val/1\.png"):
        data.setup("fit")


# Drawn and real scenes -------------------------------------------------------------------------


def test_drawn_scenes() -> None:
    sizes = {"train_samples": 20, "val_samples": 10, "test_samples": 10}
    data = ShapesSegmentationDataModule("source", **sizes, img_size=48, batch_size=5)
    assert data.class_names == ["background", *KINDS]
    assert (data.num_classes, len(data.palette), data.crop_size) == (11, 11, (48, 48))
    assert dict(ShapesSegmentationDataModule(**data.hparams).hparams) == dict(data.hparams)
    data.setup()
    data.setup("predict")
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, masks.shape) == ((5, 3, 48, 48), (5, 48, 48))
    assert (images.dtype, masks.dtype) == (torch.uint8, torch.int64)
    # The source domain's ground is plain and near grey, its shapes are of full colours.
    colourful = (images.amax(1).int() - images.amin(1).int()) > 60
    assert ((masks > 0) == colourful).float().mean() > 0.97
    images, masks = next(iter(data.val_dataloader()))
    assert isinstance(images, list)
    assert masks[0].shape == (48, 48)
    # Scene k has a shape of kind k % 10.
    assert all((mask == 1 + k % 10).any() for k, mask in enumerate(masks))
    _, names = next(iter(data.predict_dataloader()))
    assert names[0] == "test/00000"


def test_real_street_scenes(shared_data: Path) -> None:
    data = CamVidDataModule(str(shared_data / "CamVid"), crop_size=(180, 240), check=True)
    data.setup()
    data.prepare_data()
    assert [len(data.datasets[split]) for split in ("train", "val", "test")] == [74, 21, 21]
    masks = [data.datasets["train"].pairs[index][1] for index in range(74)]
    counts = torch.bincount(torch.stack(masks).flatten().long(), minlength=256)
    share = dict(zip(data.class_names, (counts / counts.sum()).tolist(), strict=False))
    assert counts[11:255].sum() == 0
    assert (counts[255] / counts.sum()).item() == pytest.approx(0.04, abs=0.002)
    assert share["Road"] == pytest.approx(0.32, abs=0.005)
    assert share["Bicyclist"] == pytest.approx(0.003, abs=0.0005)
    images, masks = next(iter(data.train_dataloader()))
    assert (images.shape, masks.shape) == ((8, 3, 180, 240), (8, 180, 240))
