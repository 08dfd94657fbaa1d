"""Small data sets of annotated objects, each in the layout that its datamodule reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (40, 30)  # width and height of every image
Content = dict[str, Any]


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def annotation(number: int, image: int, category: int, box: list[float], **more: Any) -> Content:
    ring = square(box[0], box[1], 8)
    given = {"id": number, "image_id": image, "category_id": category, "bbox": box}
    return {**given, "segmentation": ring, "iscrowd": 0, "area": 50.0, **more}


def content() -> Content:
    """Images with two objects and a crowd, with one object, with none, with a packed crowd."""
    crowd = {"size": [30, 40], "counts": [5, 20, 1175]}
    packed = {"size": [30, 40], "counts": "T3d0:0`P1"}
    return {
        "images": [
            {"id": 10 * i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]}
            for i in (4, 3, 2, 1)
        ],
        "categories": [
            {"id": 9, "name": "dog"},
            {"id": 2, "name": "cat"},
            {"id": 5, "name": "eel"},
        ],
        "annotations": [
            annotation(1, 40, 9, [4.5, 3.0, 8.0, 8.0]),
            annotation(2, 30, 2, [20.0, 10.0, 8.0, 8.0]),
            annotation(3, 40, 2, [20.0, 10.0, 8.0, 8.0], area=64.0),
            annotation(4, 40, 9, [0.0, 5.0, 1.0, 20.0], segmentation=crowd, iscrowd=1),
            annotation(5, 10, 5, [3.0, 10.0, 2.0, 20.0], segmentation=packed, iscrowd=1),
        ],
    }


def write_coco_folder(root: Path, given: Content | None = None) -> Path:
    """The images of `content`, and beside them two JSONs of the same annotations."""
    _write_images(root)
    for name in ("train.json", "val.json"):
        (root / name).write_text(json.dumps(given or content()))
    return root


def write_coco(root: Path, given: Content | None = None) -> Path:
    """The images and annotations of `content` in either split, as COCO 2017 lays them out."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for name in ("train2017", "val2017"):
        _write_images(root / name)
        listing = root / f"annotations/instances_{name}.json"
        listing.write_text(json.dumps(given or content()))
    return root


def _write_images(folder: Path) -> None:
    """Writes those that are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in "1234":
        if not (folder / f"{name}.png").exists():
            Image.new("RGB", SIZE, (int(name), 0, 0)).save(folder / f"{name}.png")


def write_voc(root: Path, **files: str) -> Path:
    """Four images with a dog each and, in the second, a difficult cat; files replace some."""
    home = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    for number in range(4):
        Image.new("RGB", SIZE).save(home / f"JPEGImages/{number}.jpg")
        cat = thing("cat", 1, 1, 40, 30, difficult=1) if number == 1 else ""
        text = xml(thing("dog", 11, 6, 20, 12.5) + cat)
        (home / f"Annotations/{number}.xml").write_text(files.get(f"file{number}", text))
    (home / "ImageSets/Main/train.txt").write_text("0\n1\n")
    (home / "ImageSets/Main/val.txt").write_text("1 -1\n2  1\n3\n")
    return root


def xml(objects: str) -> str:
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
    return f"<annotation>{size}{objects}</annotation>"


def thing(name: str, *corners: float, difficult: int = 0) -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, corners, strict=True))
    part = "<part><name>head</name><bndbox><xmin>0</xmin></bndbox></part>"
    told = f"<difficult>{difficult}</difficult>" if difficult else ""  # old files leave 0 out
    return f"<object><name>{name}</name>{told}{part}<bndbox>{box}</bndbox></object>"


def write_people(root: Path, count: int = 10) -> Path:
    for folder in ("PNGImages", "PedMasks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        ids = np.zeros(SIZE[::-1], np.uint8)
        ids[5:25, 4:9], ids[10:30, 20:35] = 1, 2
        Image.fromarray(ids * 100).convert("RGB").save(root / f"PNGImages/{number}.png")
        Image.fromarray(ids).save(root / f"PedMasks/{number}_mask.png")
    return root
