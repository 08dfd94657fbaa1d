"""COCO's JSON: values against COCO's own tools, classes, and mistakes that are named."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from objects import SIZE, Content, annotation, content, write_coco, write_coco_folder
from PIL import Image

from litflora.datamodules import CocoDataModule, CocoFolderDataModule


def build(root: Path, given: Any = None, **options: Any) -> CocoFolderDataModule:
    write_coco_folder(root, given)
    options = {"train_json": "train.json", "val_json": "val.json", "crop_size": 24, **options}
    return CocoFolderDataModule(str(root), **options)


def test_targets_are_those_of_the_file(tmp_path: Path) -> None:
    data = build(tmp_path, masks=True)
    assert data.class_names == ["cat", "eel", "dog"]
    assert data.category_ids == [2, 5, 9]
    assert (data.num_classes, len(set(data.palette))) == (3, 3)
    data.setup()
    samples = data.datasets["val"]
    assert [Path(name).name for name in samples.names] == ["4.png", "3.png", "2.png", "1.png"]
    assert list(data.image_ids.values()) == [40, 30, 20, 10]
    image, target, name = samples[0]
    assert image.shape == (3, 30, 40)
    assert (image[0] == 4).all()
    assert data.image_ids[name] == 40
    assert target["boxes"].tolist() == [[4.5, 3, 12.5, 11], [20, 10, 28, 18], [0, 5, 1, 25]]
    assert target["labels"].tolist() == [2, 0, 2]
    assert target["iscrowd"].tolist() == [0, 0, 1]
    assert target["area"].tolist() == [50, 64, 50]
    kinds = {key: (value.dtype, type(value)) for key, value in target.items()}
    assert kinds == {
        "boxes": (torch.float32, torch.Tensor),
        "labels": (torch.int64, torch.Tensor),
        "masks": (torch.uint8, torch.Tensor),
        "iscrowd": (torch.int64, torch.Tensor),
        "area": (torch.float32, torch.Tensor),
    }
    crowd = torch.zeros(30, 40, dtype=torch.uint8)
    crowd[5:25, 0] = 1
    assert torch.equal(target["masks"][2], crowd)
    assert target["masks"][1].sum() == 64
    assert target["masks"][1, 10:18, 20:28].all()
    assert {key: len(value) for key, value in samples[2][1].items()} == dict.fromkeys(target, 0)
    assert samples[2][1]["masks"].shape == (0, 30, 40)


def test_training_leaves_crowds_out(tmp_path: Path) -> None:
    data = build(tmp_path, masks=True, augment=False, crop_size=SIZE[::-1])
    data.setup("fit")
    targets = [data.datasets["train"][i][1] for i in range(4)]
    assert all(set(target) == {"boxes", "labels", "masks"} for target in targets)
    assert [target["labels"].tolist() for target in targets] == [[2, 0], [0], [], []]
    assert targets[3]["masks"].shape == (0, 30, 40)
    assert targets[3]["boxes"].shape == (0, 4)


def test_masks_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    given = content()
    for row in given["annotations"]:
        del row["segmentation"], row["area"], row["iscrowd"]
    data = build(tmp_path, given)
    data.setup("validate")
    target = data.datasets["val"][0][1]
    assert set(target) == {"boxes", "labels", "iscrowd", "area"}
    assert target["area"].tolist() == [64, 64, 20]
    assert target["iscrowd"].tolist() == [0, 0, 0]
    with pytest.raises(ImportError, match=r"pip install 'litflora\[dense\]'"):
        build(tmp_path, masks=True)


def test_missing_splits_are_made(tmp_path: Path) -> None:
    data = build(tmp_path, val_json=None, val_fraction=0.3)
    data.setup()
    sizes = {name: len(samples) for name, samples in data.datasets.items()}
    assert sizes == {"train": 3, "val": 1, "test": 1}
    ((name, number),) = data.image_ids.items()
    assert int(Path(name).stem) * 10 == number


def test_a_split_is_read_when_it_is_needed(tmp_path: Path) -> None:
    build(tmp_path)
    (tmp_path / "train.json").write_text(
        "{ no JSON, and longer than the file of the other split" * 99
    )
    data = CocoFolderDataModule(str(tmp_path), "train.json", "val.json")
    data.setup("validate")
    with pytest.raises(ValueError, match=r"train\.json is no JSON"):
        data.setup("fit")


@pytest.mark.parametrize("images", ["pictures", {"train": "pictures", "val": "others"}])
def test_images_may_lie_elsewhere(tmp_path: Path, images: str | dict[str, str]) -> None:
    for folder in ("pictures", "others"):
        (tmp_path / folder).mkdir()
        for name in "1234":
            Image.new("RGB", SIZE).save(tmp_path / folder / f"{name}.png")
    data = build(tmp_path, images=images)
    data.setup("fit")
    found = {name: Path(each.names[0]).parent.name for name, each in data.datasets.items()}
    assert found == {"train": "pictures", "val": "others" if len(images) == 2 else "pictures"}


def test_prediction_of_a_folder_needs_no_data_set(tmp_path: Path) -> None:
    Image.new("RGB", SIZE).save(tmp_path / "x.png")
    data = CocoDataModule(str(tmp_path / "none"), predict_root=str(tmp_path))
    assert (data.class_names, data.category_ids) == ([], [])
    data.setup("predict")
    ((images, names),) = data.predict_dataloader()
    assert images[0].shape == (3, 30, 40)
    assert data.image_ids == {names[0]: 1} == {str(tmp_path / "x.png"): 1}


# Mistakes --------------------------------------------------------------------------------------

Change = Callable[[Content], Any]
MISTAKES: dict[str, tuple[Change, str]] = {
    "negative width": (
        lambda c: c["annotations"][1].update(bbox=[20, 10, -3, 8]),
        r"1 of 5 .*\nannotation 2 of 3\.png: its box .* has the width -3 and the height 8",
    ),
    "no height": (
        lambda c: c["annotations"][2].update(bbox=[20, 10, 3, 0]),
        r"annotation 3 of 4\.png: .* has the width 3 and the height 0",
    ),
    "no number": (
        lambda c: c["annotations"][2].update(bbox=[float("nan"), 10, 3, 3]),
        r"annotation 3 of 4\.png: its box from \(nan",
    ),
    "outside": (
        lambda c: c["annotations"][0].update(bbox=[30, 3, 12, 8]),
        r"annotation 1 of 4\.png: .* lies outside of its image of 40 x 30 pixels",
    ),
    "beside": (
        lambda c: c["annotations"][0].update(bbox=[40, 3, 1, 8]),
        r"annotation 1 of 4\.png: .* lies outside of its image of 40 x 30 pixels",
    ),
    "no box": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "bbox .* of annotation 1 is"),
    "words": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, "4a"]), "bbox is no number"),
    "category": (
        lambda c: c["annotations"][4].update(category_id=3),
        r"annotation 5 of 1\.png: no category has its category_id 3",
    ),
    "image": (
        lambda c: c["annotations"][4].update(image_id=77),
        "annotation 5 of no image: no image has its image_id 77",
    ),
    "image twice": (lambda c: c["images"][1].update(id=40), "1 ids stand for two images: 40"),
    "file twice": (
        lambda c: c["images"][1].update(file_name="4.png"),
        r"1 files are listed as two images: 4\.png",
    ),
    "annotation twice": (lambda c: c["annotations"][1].update(id=1), "two annotations: 1"),
    "category twice": (lambda c: c["categories"][1].update(id=9), "two categories: 9"),
    "id": (lambda c: c["images"][1].update(id="a"), "id 'a' of the images is no whole number"),
    "key": (lambda c: c["images"][2].pop("height"), "1 images have no 'height': number 2"),
    "list": (lambda c: c.pop("images"), "no COCO file of objects: it has no list 'images'"),
    "image without a size": (
        lambda c: c["images"][2].update(width=None),
        r"1 images have no size in whole pixels: 2\.png is nan x 30",
    ),
    "endless image": (lambda c: c["images"][0].update(height=float("inf")), "4.png is 40 x inf"),
    "no file": (lambda c: c["images"][0].update(file_name=None), "file_name None of the images"),
    "no name": (lambda c: c["categories"][0].update(name=5), "name 5 of the categories is no text"),
    "no id": (lambda c: c["categories"][0].update(id=None), "id None of the categories is no"),
    "list as id": (lambda c: c["annotations"][0].update(id=[1]), r"id \[1\] of the annotations"),
    "list as category": (
        lambda c: c["annotations"][0].update(category_id=[9]),
        r"category_id \[9\] of the annotations is no number",
    ),
    "huge number": (
        lambda c: c["annotations"][0].update(bbox=[10**400, 1, 2, 3]),
        "a bbox is no number",
    ),
    "no crowd": (
        lambda c: c["annotations"][3].update(iscrowd=None),
        "iscrowd None of annotation 4 is neither 0 nor 1",
    ),
    "no area": (
        lambda c: c["annotations"][3].update(area=-1),
        "area -1 of annotation 4 is no area in pixels",
    ),
    "no images": (lambda c: c["images"].clear(), "has no images"),
    "no mask": (lambda c: c["annotations"][0].update(segmentation=[]), "has no segmentation"),
    "two corners": (
        lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]),
        r"annotation 1 of 4\.png: its segmentation is no list of polygons",
    ),
    "run lengths": (
        lambda c: c["annotations"][3]["segmentation"].update(counts=[5, 20]),
        "its run lengths make 25 pixels",
    ),
    "no run lengths": (
        lambda c: c["annotations"][3]["segmentation"].pop("counts"),
        "its run lengths have no counts",
    ),
    "broken run lengths": (
        lambda c: c["annotations"][3]["segmentation"].update(counts=[5.5, 20, 1174.5]),
        "its run lengths have no counts",
    ),
    "number as mask": (
        lambda c: c["annotations"][0].update(segmentation=5),
        "its segmentation is 5, neither polygons nor run lengths",
    ),
    "no coordinates": (
        lambda c: c["annotations"][0].update(segmentation=[[float("nan")] * 6]),
        "corners far outside of its image",
    ),
    "far away": (
        lambda c: c["annotations"][0].update(segmentation=[[-1e9, 0, 1e9, 0, 5, 5]]),
        "corners far outside of its image",
    ),
    "size": (
        lambda c: c["annotations"][3]["segmentation"].update(size=[40, 30]),
        r"its run lengths have the size \[40, 30\]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_before_training(tmp_path: Path, name: str) -> None:
    change, said = MISTAKES[name]
    given = content()
    change(given)
    with pytest.raises(ValueError, match=said) as error:
        build(tmp_path, given, masks=True).setup("fit")
    assert ".json" in str(error.value)


def test_a_file_that_nests_too_deeply_is_named(tmp_path: Path) -> None:
    write_coco_folder(tmp_path)
    (tmp_path / "train.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"train\.json is no JSON"):
        CocoFolderDataModule(str(tmp_path), "train.json")


def test_a_file_name_too_long_for_a_disk_is_a_missing_file(tmp_path: Path) -> None:
    given = content()
    given["images"][0]["file_name"] = 300 * "x"
    with pytest.raises(FileNotFoundError, match=r"1 of 4 annotated images .*xxx"):
        build(tmp_path, given).setup("fit")


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    given = content()
    given["annotations"] += [annotation(10 + i, 20, 9, [0, 0, i - 30, 2]) for i in range(13)]
    given["annotations"][0]["category_id"] = 4
    with pytest.raises(ValueError, match=r"14 of 18 annotations (.*\n){11}and 4 more"):
        build(tmp_path, given)


def test_rounding_is_no_mistake_and_is_cut_off(tmp_path: Path) -> None:
    given = content()
    given["annotations"][0]["bbox"] = [-0.4, 3, 40.9, 27.5]
    data = build(tmp_path, given)
    data.setup("validate")
    assert data.datasets["val"][0][1]["boxes"][0].tolist() == [0, 3, 40, 30]


def test_missing_images_are_counted(tmp_path: Path) -> None:
    data = build(tmp_path)
    (tmp_path / "3.png").unlink()
    (tmp_path / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 4 .* missing: .*/3\.png, .*/1\.png \("):
        data.setup("fit")


def test_splits_of_other_classes(tmp_path: Path) -> None:
    build(tmp_path)
    given = content()
    given["categories"] += [{"id": 4, "name": "a name that makes this file the larger one"}]
    (tmp_path / "train.json").write_text(json.dumps(given))
    data = CocoFolderDataModule(str(tmp_path), "train.json", "val.json")
    assert data.num_classes == 3
    with pytest.raises(ValueError, match=r"train\.json has other categories than .*differ in 4: a"):
        data.setup("fit")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"_train2017\.json and .*_val2017\.json missing"):
        CocoDataModule(str(tmp_path))
    with pytest.raises(ValueError, match="images names no folder of val"):
        build(tmp_path, images={"train": "a"})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: Image.new("RGB", (39, 30)).save(path), "39 x 30 .* of 40 x 30; annotate"),
        (lambda path: path.write_bytes(b"no image"), "cannot read"),
        (lambda path: Image.new("I;16", SIZE).save(path), "convert it to 8 bits"),
    ],
)
def test_a_check_names_images_with_mistakes(
    tmp_path: Path, make: Callable[[Path], Any], said: str
) -> None:
    data = build(tmp_path, check=True)
    for name in "23":
        make(tmp_path / f"{name}.png")
    data.setup("fit")
    with pytest.raises(ValueError, match=said) as error:
        data.prepare_data()
    lines = str(error.value).splitlines()
    assert lines[0] == "4 of 8 samples have mistakes:"  # either split has its own annotations
    assert ["3.png" in line for line in lines[1:]] == [True, False, True, False]


@pytest.mark.parametrize("counts", ["T3", "é"])
def test_a_packed_mask_that_is_broken_is_named(tmp_path: Path, counts: str) -> None:
    given = content()
    given["annotations"][4]["segmentation"]["counts"] = counts
    data = build(tmp_path, given, masks=True)
    data.setup("validate")
    with pytest.raises(ValueError, match=r"cannot draw a mask of .*/1\.png"):
        data.datasets["val"][3]


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_rotation_that_explains_a_size_is_told(tmp_path: Path, orientation: int) -> None:
    data = build(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", SIZE).save(tmp_path / "4.png", exif=exif)
    data.setup("validate")
    if orientation == 1:
        assert data.datasets["val"][0][0].shape == (3, 30, 40)
    else:
        with pytest.raises(ValueError, match=r"30 x 40 .* EXIF orientation turns it"):
            data.datasets["val"][0]


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA"])
def test_other_colours_are_read(tmp_path: Path, mode: str) -> None:
    data = build(tmp_path)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    Image.new("RGB", SIZE, (102, 102, 102)).convert(mode).save(tmp_path / "4.png", format=kind)
    data.setup("validate")
    image = data.datasets["val"][0][0].int()
    assert image.shape == (3, 30, 40)
    assert (image - 102).abs().max() <= 4


# The real thing --------------------------------------------------------------------------------


def test_flaws_of_the_published_file_are_left_out(tmp_path: Path) -> None:
    given = content()
    given["annotations"].append(annotation(918, 40, 9, [4, 4, 3, 0]))
    write_coco(tmp_path, given)
    data = CocoDataModule(str(tmp_path))
    data.setup()
    assert [len(data.datasets["test"][i][1]["boxes"]) for i in range(4)] == [3, 1, 0, 1]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_real_photos(shared_data: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco").COCO
    root = shared_data / "coco"
    data = CocoDataModule(str(root), masks=True, crop_size=128, check=True)
    assert data.num_classes == 80
    assert (data.category_ids[0], data.category_ids[-1]) == (1, 90)
    data.setup()
    data.prepare_data()
    sizes = {name: len(samples) for name, samples in data.datasets.items()}
    assert sizes == {"train": 80, "val": 50, "test": 50}
    crowds = sum(int(image.listed.iscrowd.sum()) for image in data.datasets["train"].pairs.items)
    assert sum(len(i.listed.labels) for i in data.datasets["train"].pairs.items) == 739
    assert crowds == 8
    theirs = coco(str(root / "annotations/instances_val2017.json"))
    compared = 0
    for image, target, name in data.datasets["val"]:
        rows = theirs.loadAnns(theirs.getAnnIds([data.image_ids[name]]))
        assert theirs.imgs[data.image_ids[name]]["file_name"] == Path(name).name
        assert image.shape[1:] == target["masks"].shape[1:]
        order = torch.tensor([[row["bbox"][0], row["bbox"][1]] for row in rows]).reshape(-1, 2)
        torch.testing.assert_close(target["boxes"][:, :2], order.float())
        assert [data.category_ids[label] for label in target["labels"]] == [
            row["category_id"] for row in rows
        ]
        torch.testing.assert_close(target["area"], torch.tensor([row["area"] for row in rows]))
        for row, mask in zip(rows, target["masks"], strict=True):
            assert np.array_equal(theirs.annToMask(row), mask.numpy())
            compared += 1
    assert compared == 408
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 128, 128)
    assert all(set(target) == {"boxes", "labels", "masks"} for target in targets)
