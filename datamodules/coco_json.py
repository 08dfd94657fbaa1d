"""COCO's JSON files: images, classes, boxes and masks, checked while they are read."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dense_files import raise_mistakes
from .detection import Objects
from .detection_files import ListedImage, Size, clipped, flawed_boxes

# Polygons x, y, x, y ... in pixels, or run lengths {"size": [height, width], "counts": ...}.
Segmentation = list[NDArray[np.float64]] | dict[str, Any]
Content = dict[str, list[dict[str, Any]]]


@dataclass(eq=False)
class CocoImage(ListedImage):
    """An image of a COCO file, with the segmentation of each object if masks are wanted."""

    segmentations: Sequence[Segmentation]

    def objects(self, size: Size, train: bool, masks: bool) -> Objects:
        """The objects; masks are drawn from polygons or run lengths."""
        objects = super().objects(size, train, masks)
        if not masks:
            return objects
        shapes = [self.segmentations[index] for index in self.chosen(train)]
        try:
            return replace(objects, masks=draw_masks(shapes, size))
        except ValueError as reason:
            raise ValueError(f"cannot draw a mask of {self.path}: {reason}") from reason


class CocoFile(Sequence[CocoImage]):
    """The images of a COCO file in its own order; it is read once, when first asked for.

    Args:
        path: The JSON file.
        folder: Where the images are.
        masks: Keep the segmentations, too.
        flawed: Ids of annotations to leave out.
    """

    def __init__(
        self, path: Path, folder: Path, masks: bool, flawed: frozenset[int] = frozenset()
    ) -> None:
        self.path = path
        self.folder = folder
        self.masks = masks
        self.flawed = flawed

    @cached_property
    def categories(self) -> dict[int, str]:
        """The names of the classes by their ids, which rise."""
        return self._read[0]

    def __len__(self) -> int:
        return len(self._read[1])

    def __getitem__(self, index: Any) -> Any:
        return self._read[1][index]

    @cached_property
    def _read(self) -> tuple[dict[int, str], list[CocoImage]]:
        content = _load(self.path)
        kept = [row for row in content["annotations"] if row.get("id") not in self.flawed]
        content["annotations"] = kept
        try:
            names = _column(content, "categories", "name")
            categories = dict(sorted(zip(_ids(content, "categories"), names, strict=True)))
            return categories, _images(content, list(categories), self.folder, self.masks)
        except ValueError as reason:
            raise ValueError(f"{self.path}: {reason}") from reason


def mask_api() -> Any:
    """The functions that draw COCO's masks."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as missing:
        raise ImportError(
            "COCO's masks need faster-coco-eval: pip install 'litflora[dense]', or set masks: false"
        ) from missing
    return mask


def draw_masks(shapes: Sequence[Segmentation], size: Size) -> NDArray[np.uint8]:
    """The masks of segmentations in an image of a width and height: [n, height, width]."""
    width, height = size
    if not shapes:
        return np.zeros((0, height, width), np.uint8)
    api = mask_api()

    def lengths(shape: Segmentation) -> Any:
        if isinstance(shape, list):
            return api.merge(api.frPyObjects(shape, height, width))
        packed = not isinstance(shape["counts"], list)
        return shape if packed else api.frPyObjects(shape, height, width)

    drawn = api.decode([lengths(shape) for shape in shapes])
    return np.ascontiguousarray(drawn.transpose(2, 0, 1))


def _load(path: Path) -> Content:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing (set data.init_args.root to the data set's own folder)"
        )
    try:
        content = json.loads(path.read_bytes())
    except ValueError as reason:
        raise ValueError(f"{path} is no JSON: {reason}") from reason
    for kind in ("images", "annotations", "categories"):
        rows = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} is no COCO file of objects: it has no list {kind!r}")
        if not rows and kind != "annotations":
            raise ValueError(f"{path} has no {kind}")
    return content


def _column(content: Content, kind: str, key: str) -> list[Any]:
    lacking = [index for index, row in enumerate(content[kind]) if key not in row]
    if lacking:
        raise ValueError(
            f"{len(lacking)} {kind} have no {key!r}: number {lacking[0]} counted from 0"
        )
    return [row[key] for row in content[kind]]


def _ids(content: Content, kind: str) -> list[int]:
    ids = _column(content, kind, "id")
    strange = next((each for each in ids if not isinstance(each, int)), None)
    if strange is not None:
        raise ValueError(f"id {strange!r} of the {kind} is no whole number")
    _check_unique(ids, f"ids stand for two {kind}")
    return ids


def _check_unique(values: Sequence[Any], said: str) -> None:
    twice = [each for each, count in Counter(values).items() if count > 1]
    if twice:
        shown = ", ".join([*map(str, twice[:5]), *(["..."] if len(twice) > 5 else [])])
        raise ValueError(f"{len(twice)} {said}: {shown}")


def _numbers(values: Sequence[Any], name: str) -> NDArray[np.float64]:
    try:
        return np.array(values, np.float64)
    except (TypeError, ValueError) as reason:
        raise ValueError(f"a {name} is no number") from reason


def _images(
    content: Content, category_ids: list[int], folder: Path, masks: bool
) -> list[CocoImage]:
    """The images with their annotations, which lie in arrays of all: there may be many."""
    ids, paths = _ids(content, "images"), _column(content, "images", "file_name")
    _check_unique(paths, "files are listed as two images")
    sizes = _numbers([_column(content, "images", key) for key in ("width", "height")], "size").T
    labels = _positions(_column(content, "annotations", "category_id"), category_ids)
    owners = _positions(_column(content, "annotations", "image_id"), ids)
    corners, crowds, areas = _boxes(content)
    rows = content["annotations"]
    # Without an image -1 takes the last one's size, but what is said of that comes first.
    flaws = dict(flawed_boxes(corners, sizes[owners]))
    segmentations: list[Any] = [None] * len(rows)
    for index, row in enumerate(rows if masks else []):
        try:
            segmentations[index] = _segmentation(row.get("segmentation"), sizes[owners[index]])
        except ValueError as reason:
            flaws.setdefault(index, str(reason))
    for key, positions in (("category", labels), ("image", owners)):
        for index in np.flatnonzero(positions < 0).tolist():
            flaws[index] = f"no {key} has its {key}_id {rows[index][f'{key}_id']}"
    names = [*paths, "no image"]  # the last for the position -1
    said = [
        f"annotation {rows[index]['id']} of {names[owners[index]]}: {flaw}"
        for index, flaw in sorted(flaws.items())
    ]
    raise_mistakes(said, f"of {len(rows)} annotations have mistakes")

    order = np.argsort(owners, kind="stable")
    ends = np.searchsorted(owners[order], np.arange(len(ids) + 1))
    columns: list[NDArray[Any]] = [
        clipped(corners, sizes[owners])[order].astype(np.float32),
        labels[order],
        crowds[order],
        areas[order].astype(np.float32),
    ]
    shapes = [segmentations[index] for index in order]
    return [
        CocoImage(
            folder / paths[i],
            ids[i],
            (int(sizes[i, 0]), int(sizes[i, 1])),
            Objects(*(column[start:end] for column in columns)),
            shapes[start:end] if masks else (),
        )
        for i, (start, end) in enumerate(pairwise(ends))
    ]


def _positions(values: Sequence[Any], ids: Sequence[int]) -> NDArray[np.int64]:
    """The place of each value among ids, -1 for a strange one."""
    place = {each: index for index, each in enumerate(ids)}
    return np.array([place.get(value, -1) for value in values], np.int64)


def _boxes(content: Content) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """The corners [n, 4] of all boxes, which are crowds, and areas; if not given, a box's own."""
    boxes = _column(content, "annotations", "bbox")
    for number, box in zip(_ids(content, "annotations"), boxes, strict=True):
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f"bbox {box} of annotation {number} is not [x, y, width, height]")
    corners = _numbers(boxes, "bbox").reshape(-1, 4)
    own = corners[:, 2] * corners[:, 3]
    corners[:, 2:] += corners[:, :2]
    rows = content["annotations"]
    crowds = _numbers([row.get("iscrowd", 0) for row in rows], "iscrowd").astype(np.int64)
    areas = [row.get("area", alone) for row, alone in zip(rows, own, strict=True)]
    return corners, crowds, _numbers(areas, "area")


def _segmentation(given: Any, size: NDArray[np.float64]) -> Segmentation:
    """A segmentation in less memory, once it is checked."""
    if not given:
        raise ValueError("it has no segmentation (masks: false trains without)")
    width, height = size.tolist()
    if isinstance(given, dict):
        if given.get("size") != [height, width]:
            raise ValueError(f"its run lengths have the size {given.get('size')}, not the image's")
        counts = given.get("counts")
        if isinstance(counts, list) and sum(counts) != height * width:
            raise ValueError(f"its run lengths make {sum(counts)} pixels, its image has others")
        return given
    polygons = [_numbers(polygon, "polygon's coordinate") for polygon in given]
    if any(polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise ValueError("its segmentation is no list of polygons [x, y, x, y, x, y, ...]")
    return polygons
