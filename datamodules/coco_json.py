"""COCO's JSON files: images, classes, boxes and masks, checked while they are read."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .coco_columns import Content, check_unique, column, ids_of, numbers, read_content
from .dense_files import raise_mistakes
from .detection import Objects
from .detection_files import ListedImage, Size, clipped, flawed_boxes

# Polygons x, y, x, y ... in pixels, or run lengths {"size": [height, width], "counts": ...}.
Segmentation = list[NDArray[np.float64]] | dict[str, Any]


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
        except (ValueError, RuntimeError) as reason:  # run lengths are decoded in C++
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
        content = read_content(self.path, "objects", ("images", "annotations", "categories"))
        try:
            ids = zip(ids_of(content, "annotations"), content["annotations"], strict=True)
            content["annotations"] = [row for number, row in ids if number not in self.flawed]
            names = column(content, "categories", "name", str)
            categories = dict(sorted(zip(ids_of(content, "categories"), names, strict=True)))
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


def _images(
    content: Content, category_ids: list[int], folder: Path, masks: bool
) -> list[CocoImage]:
    """The images with their annotations, which lie in arrays of all: there may be many."""
    ids, paths = ids_of(content, "images"), column(content, "images", "file_name", str)
    check_unique(paths, "files are listed as two images")
    sizes = _sizes(content)
    labels = _positions(column(content, "annotations", "category_id", Hashable), category_ids)
    owners = _positions(column(content, "annotations", "image_id", Hashable), ids)
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


def _sizes(content: Content) -> NDArray[np.float64]:
    """Width and height of each image: [n, 2]."""
    sizes = numbers([column(content, "images", key) for key in ("width", "height")], "a size").T
    strange = np.flatnonzero(~((sizes >= 1) & (sizes < np.inf) & (sizes == sizes.round())).all(1))
    if len(strange):
        name, (width, height) = content["images"][strange[0]]["file_name"], sizes[strange[0]]
        raise ValueError(
            f"{len(strange)} images have no size in whole pixels: {name} is {width:g} x {height:g}"
        )
    return sizes


def _positions(values: Sequence[Any], ids: Sequence[int]) -> NDArray[np.int64]:
    """The place of each value among ids, -1 for a strange one."""
    place = {each: index for index, each in enumerate(ids)}
    return np.array([place.get(value, -1) for value in values], np.int64)


def _boxes(content: Content) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """The corners [n, 4] of all boxes, which are crowds, and areas; if not given, a box's own."""
    rows, boxes = content["annotations"], column(content, "annotations", "bbox")
    for row, box in zip(rows, boxes, strict=True):
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f"bbox {box} of annotation {row['id']} is not [x, y, width, height]")
    corners = numbers(boxes, "a bbox").reshape(-1, 4)
    own = corners[:, 2] * corners[:, 3]
    corners[:, 2:] += corners[:, :2]
    crowds = numbers([row.get("iscrowd", 0) for row in rows], "an iscrowd")
    areas = [row.get("area", alone) for row, alone in zip(rows, own, strict=True)]
    found = numbers(areas, "an area")
    _check_each(rows, "iscrowd", np.isin(crowds, (0, 1)), "is neither 0 nor 1")
    _check_each(rows, "area", (found >= 0) & (found < np.inf), "is no area in pixels")
    return corners, crowds.astype(np.int64), found


def _check_each(rows: Sequence[Any], key: str, right: NDArray[np.bool_], said: str) -> None:
    if not right.all():
        row = rows[int(right.argmin())]
        raise ValueError(f"{key} {row[key]} of annotation {row['id']} {said}")


def _segmentation(given: Any, size: NDArray[np.float64]) -> Segmentation:
    """A segmentation in less memory, once it is checked."""
    if not given:
        raise ValueError("it has no segmentation (masks: false trains without)")
    width, height = size.tolist()
    if isinstance(given, dict):
        if given.get("size") != [height, width]:
            raise ValueError(f"its run lengths have the size {given.get('size')}, not the image's")
        counts = given.get("counts")
        if isinstance(counts, str):
            return given
        if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
            raise ValueError("its run lengths have no counts, as text or a list of whole numbers")
        if sum(counts) != height * width:
            raise ValueError(f"its run lengths make {sum(counts)} pixels, its image has others")
        return given
    if not isinstance(given, list):
        raise ValueError(f"its segmentation is {given!r}, neither polygons nor run lengths")
    polygons = [numbers(polygon, "a polygon's coordinate") for polygon in given]
    if any(polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise ValueError("its segmentation is no list of polygons [x, y, x, y, x, y, ...]")
    far = 2 * max(width, height)  # drawing what lies further away would take memory by its length
    if not all((np.abs(polygon) <= far).all() for polygon in polygons):
        raise ValueError("its polygon has corners far outside of its image")
    return polygons
