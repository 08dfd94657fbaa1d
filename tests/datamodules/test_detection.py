"""Datamodules of objects: layouts, batches, repeatability, and the shapes drawn for them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from objects import SIZE, content, thing, write_people, write_voc, xml
from PIL import Image
from torch import Tensor

from litflora.datamodules import (
    CocoDataModule,
    CocoFolderDataModule,
    PennFudanDataModule,
    ShapesDetectionDataModule,
    VOCDetectionDataModule,
)
from litflora.datamodules.detection import DetectionDataModule
from litflora.datamodules.scenes import KINDS

from .test_coco import build as coco_folder


def voc(root: Path, **options: Any) -> VOCDetectionDataModule:
    return VOCDetectionDataModule(str(write_voc(root)), **{"crop_size": 24, **options})


def people(root: Path, **options: Any) -> PennFudanDataModule:
    return PennFudanDataModule(str(write_people(root)), **{"crop_size": 24, **options})


Maker = Callable[..., Any]
MAKERS: dict[str, Maker] = {"voc": voc, "people": people, "coco": coco_folder}


# Layouts ---------------------------------------------------------------------------------------


def test_voc_counts_pixels_from_one(tmp_path: Path) -> None:
    data = voc(tmp_path)
    assert (data.num_classes, data.class_names[7], data.class_names[11]) == (20, "cat", "dog")
    assert data.category_ids == list(range(1, 21))
    data.setup()
    assert {name: len(data.datasets[name]) for name in data.datasets} == {
        "train": 2,
        "val": 3,
        "test": 3,
    }
    image, target, name = data.datasets["val"][0]
    assert image.shape == (3, 30, 40)
    assert name.endswith("JPEGImages/1.jpg")
    assert target["boxes"].tolist() == [[10, 5, 20, 12.5], [0, 0, 40, 30]]
    assert target["labels"].tolist() == [11, 7]
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["area"].tolist() == [75, 1200]
    assert list(data.image_ids.values()) == [1, 2, 3]
    plain = voc(tmp_path, augment=False, crop_size=SIZE[::-1])
    plain.setup("fit")
    assert plain.datasets["train"][1][1]["labels"].tolist() == [11]
    assert set(plain.datasets["train"][1][1]) == {"boxes", "labels"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<annotation>", r"0\.xml: is no XML"),
        (xml(thing("dragon", 1, 1, 5, 5)), r"0\.xml: 'dragon' is no class of VOC"),
        (xml(thing("dog", 9, 1, 5, 5)), r"object 1: its box .* has the width -3 and the height 5"),
        (xml(thing("dog", 9, 1, 43, 5)), "lies outside of its image of 40 x 30"),
        ("<annotation/>", "<annotation> has no size of numbers width, height"),
        (
            "<annotation><size><width>inf</width><height>9</height></size></annotation>",
            r"0\.xml: cannot convert float infinity",
        ),
        (xml("<object/>"), "<object> has no bndbox of numbers xmin"),
    ],
)
def test_a_mistake_in_vocs_files_is_named(tmp_path: Path, text: str, said: str) -> None:
    write_voc(tmp_path, file0=text)
    with pytest.raises(ValueError, match=said) as error:
        VOCDetectionDataModule(str(tmp_path)).setup("fit")
    assert str(error.value).startswith("1 of 2 annotations have mistakes:\n")


def test_people_have_boxes_round_their_masks(tmp_path: Path) -> None:
    data = people(tmp_path, masks=True)
    assert (data.class_names, data.category_ids) == (["pedestrian"], [1])
    data.setup()
    sizes = {name: len(samples) for name, samples in data.datasets.items()}
    assert sizes == {"train": 8, "val": 2, "test": 2}
    for _, target, name in data.datasets["val"]:
        assert target["boxes"].tolist() == [[4, 5, 9, 25], [20, 10, 35, 30]]
        assert target["area"].tolist() == [100, 300]
        assert target["masks"].sum((1, 2)).tolist() == [100, 300]
        assert target["masks"][1, 10:30, 20:35].all()
        assert data.image_ids[name] == 1 + int(Path(name).stem)
    data.masks = False
    assert "masks" not in people(tmp_path).split("val")[0][1]
    other = people(tmp_path, seed=1)
    other.setup("validate")
    assert other.datasets["val"].names != data.datasets["val"].names


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Image.new("L", (40, 29)), r"40 x 30 pixels .*0_mask\.png 40 x 29"),
        (Image.new("RGB", SIZE), r"0_mask\.png is a picture"),
    ],
)
def test_a_check_names_masks_with_mistakes(tmp_path: Path, mask: Image.Image, said: str) -> None:
    data = people(tmp_path, check=True)
    mask.save(tmp_path / "PedMasks/0_mask.png")
    data.setup()
    with pytest.raises(ValueError, match=f"^1 of 10 samples have mistakes:\n.*{said}"):
        data.prepare_data()


def test_a_missing_mask_is_named_at_once(tmp_path: Path) -> None:
    data = people(tmp_path)
    (tmp_path / "PedMasks/3_mask.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 images without a mask .*3\.png"):
        data.setup("fit")


def test_an_image_without_people_is_fine(tmp_path: Path) -> None:
    data = people(tmp_path, masks=True)
    for number in range(10):
        Image.new("L", SIZE).save(tmp_path / f"PedMasks/{number}_mask.png")
    data.setup("fit")
    for split in ("train", "val"):
        target = data.datasets[split][0][1]
        assert target["boxes"].shape == (0, 4)
        assert len(target["masks"]) == len(target["labels"]) == 0


def test_people_held_out_to_test_are_no_others(tmp_path: Path) -> None:
    data = people(tmp_path, val_fraction=0.25, test_fraction=0.2)
    for stage in ("fit", "test"):
        data.setup(stage)
    names = {split: set(data.datasets[split].names) for split in ("train", "val", "test")}
    assert {split: len(of_split) for split, of_split in names.items()} == {
        "train": 6,
        "val": 2,
        "test": 2,
    }
    assert len(set.union(*names.values())) == 10
    with pytest.raises(ValueError, match=r"test_fraction=0.5 must lie between 0 and 0.5"):
        people(tmp_path, test_fraction=0.5)


def test_real_people(shared_data: Path) -> None:
    root = shared_data / "PennFudanPed"
    data = PennFudanDataModule(str(root), masks=True, check=True)
    data.setup("fit")
    data.prepare_data()
    counts, gaps = [], []
    for split in ("train", "val"):
        files = data.datasets[split].pairs
        for index, path in enumerate(files.paths):
            boxes = files[index][1]["boxes"]
            told = (root / "Annotation" / f"{path.stem}.txt").read_text()
            corners = re.findall(r"\(Xmax, Ymax\) : \((\d+), (\d+)\) - \((\d+), (\d+)\)", told)
            theirs = torch.tensor([list(map(int, numbers)) for numbers in corners])
            counts.append(len(boxes))
            # Theirs count from 1 and name the last pixel: ours begin one earlier, and end after it.
            gaps += (theirs - torch.tensor([1, 1, 0, 0]) - boxes).abs().amax(1).tolist()
    assert (len(counts), sum(counts)) == (57, 149)
    assert (gaps.count(0), gaps.count(1)) == (146, 3)  # three of theirs begin a pixel early
    assert len(data.datasets["val"]) == 11


# What all of them do ---------------------------------------------------------------------------


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Maker:
    return lambda **options: MAKERS[request.param](tmp_path, **options)


def test_batches(make: Maker) -> None:
    data = make(batch_size=2, crop_size=(32, 48))
    data.setup()
    data.setup("predict")
    images, targets = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype) == ((2, 3, 32, 48), torch.uint8)
    assert len(targets) == 2
    images, targets = next(iter(data.val_dataloader()))
    assert (len(images), len(targets), images[0].shape) == (1, 1, (3, 30, 40))
    predicted = [name for _, names in data.predict_dataloader() for name in names]
    assert predicted == list(data.datasets["test"].names)
    assert set(data.image_ids) == {*data.datasets["val"].names, *predicted}
    assert f"{len(data.datasets['train'])} train" in data.contents()
    assert len(set(data.palette)) == data.num_classes


def flat(batch: Any) -> list[Tensor]:
    images, targets = batch
    return [images, *(part for target in targets for part in target.values())]


def epochs(data: Any) -> list[Tensor]:
    data.setup("fit")
    loader = data.train_dataloader()
    parts = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        parts += [part for batch in loader for part in flat(batch)]
    return parts


def same(ours: list[Tensor], others: list[Tensor]) -> bool:
    return len(ours) == len(others) and all(map(torch.equal, ours, others))


@pytest.mark.parametrize("balanced", [False, True])
def test_batches_follow_seed_and_epoch_not_workers(tmp_path: Path, balanced: bool) -> None:
    options = {"class_balanced": balanced, "balance_threshold": 1.0, "masks": True, "batch_size": 2}
    alone = epochs(coco_folder(tmp_path, **options))
    torch.manual_seed(99)
    assert same(alone, epochs(coco_folder(tmp_path, num_workers=2, **options)))
    assert not same(alone, epochs(coco_folder(tmp_path, seed=1, **options)))
    half = len(alone) // 2
    assert not same(alone[:half], alone[half:])


@pytest.mark.parametrize("augment", [False, True])
def test_only_augmentation_changes_a_sample(make: Maker, augment: bool) -> None:
    data = make(augment=augment)
    data.setup()
    for split in ("train", "val", "test"):
        samples = data.datasets[split]
        first, later = samples[0], samples[3 * len(samples)]
        assert first[2] == later[2]
        assert torch.equal(first[0], later[0]) is not (augment and split == "train")


def test_without_augmentation_an_image_fits_its_crop(tmp_path: Path) -> None:
    data = people(tmp_path, augment=False, masks=True, crop_size=(60, 100))
    data.setup("fit")
    image, target, _ = data.datasets["train"][0]
    assert image.shape == (3, 60, 100)
    assert target["boxes"].tolist() == [[8, 10, 18, 50], [40, 20, 70, 60]]
    assert target["masks"].sum((1, 2)).tolist() == [400, 1200]


def test_at_scale_one_augmentation_fits_an_image_into_its_crop(tmp_path: Path) -> None:
    options = {"scale_range": (1.0, 1.0), "photometric": False, "crop_size": (60, 100)}
    data = people(tmp_path, masks=True, **options)
    data.setup("fit")
    seen = []
    for index in range(8):
        _, target, _ = data.datasets["train"][index]
        sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
        assert sides.tolist() == [[10, 40], [30, 40]]
        assert target["masks"].sum((1, 2)).tolist() == [400, 1200]
        seen += [target["boxes"][0, 0].item()]
    assert set(seen) == {8, 82}  # mirrored with its padding, or not


def test_rare_classes_come_more_often(tmp_path: Path) -> None:
    given = content()
    data = coco_folder(tmp_path, given, class_balanced=True, balance_threshold=1.0)
    data.setup("fit")
    # Cats are in two images of four, a dog in the first of them; the eel is a crowd.
    assert data.classes_present().tolist() == [
        [True, False, True],
        [True, False, False],
        [False, False, False],
        [False, False, False],
    ]
    keys = list(data.train_dataloader().sampler)
    assert len(keys) == round(2 + 2**0.5 + 2)
    assert sum(key % 4 == 0 for key in keys) in (1, 2, 3)


def test_hyperparameters_rebuild_the_datamodule(make: Maker) -> None:
    data = make(crop_size=33)
    again = type(data)(**data.hparams)
    assert dict(again.hparams) == dict(data.hparams)
    assert again.crop_size == (33, 33)
    assert again.scale_range == (0.1, 2.0)


def test_a_config_file_may_set_everything(tmp_path: Path) -> None:
    coco_folder(tmp_path)
    parser = ArgumentParser()
    parser.add_subclass_arguments(DetectionDataModule, "data")
    settings = {
        "root": str(tmp_path),
        "train_json": "train.json",
        "images": {"train": ".", "test": "."},
        "test_json": "val.json",
        "masks": True,
        "crop_size": [32, 48],
        "scale_range": [0.5, 1.0],
        "check": True,
    }
    kind = "litflora.datamodules.CocoFolderDataModule"
    config = parser.parse_object({"data": {"class_path": kind, "init_args": settings}})
    data = parser.instantiate(config).data
    assert isinstance(data, CocoFolderDataModule)
    assert (data.crop_size, data.scale_range, data.masks) == ((32, 48), (0.5, 1.0), True)
    assert sorted(data.official_splits()) == ["test", "train"]


@pytest.mark.parametrize("kind", [CocoDataModule, VOCDetectionDataModule, PennFudanDataModule])
def test_an_empty_root(kind: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"set data\.init_args\.root"):
        kind(str(tmp_path)).setup("fit")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        kind(str(tmp_path / "nowhere"))


# Drawn scenes ----------------------------------------------------------------------------------


def test_drawn_scenes() -> None:
    sizes = {"train_samples": 20, "val_samples": 10, "test_samples": 10}
    data = ShapesDetectionDataModule("source", **sizes, img_size=48, batch_size=5)
    assert data.class_names == list(KINDS)
    assert (data.num_classes, len(data.palette), data.crop_size) == (10, 10, (48, 48))
    assert dict(ShapesDetectionDataModule(**data.hparams).hparams) == dict(data.hparams)
    data.setup()
    data.setup("predict")
    images, targets = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype) == ((5, 3, 48, 48), torch.uint8)
    assert set(targets[0]) == {"boxes", "labels", "masks"}
    for index, (image, target, _) in enumerate(data.datasets["val"]):
        masks, boxes = target["masks"], target["boxes"]
        assert (masks.dtype, boxes.dtype) == (torch.uint8, torch.float32)
        assert masks.sum(0).max() == 1  # of two shapes one is in front
        # The source domain's ground is plain and near grey, its shapes are of full colours.
        colourful = (image.amax(0).int() - image.amin(0).int()) > 60
        assert (masks.any(0) == colourful).float().mean() > 0.97
        assert torch.equal(target["area"], masks.sum((1, 2)).float())
        assert index % 10 in target["labels"]
        for (x0, y0, x1, y1), mask in zip(boxes.int().tolist(), masks, strict=True):
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
            for side in (mask[y0], mask[y1 - 1], mask[:, x0], mask[:, x1 - 1]):
                assert side.any()
    _, names = next(iter(data.predict_dataloader()))
    assert names[0] == "test/00000"
    assert data.image_ids["test/00000"] == data.image_ids["val/00000"] == 1
