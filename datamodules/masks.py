"""Images with masks: what mask values mean, files in pairs, and reading them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .dense import read_photo, read_upright
from .images import find_images

IGNORE = 255  # the mask value of pixels that belong to no class; losses and metrics leave them out
UNKNOWN = -1

Color = tuple[int, int, int]
Pair = tuple[Path, Path | None]


@dataclass(frozen=True)
class Legend:
    """What the values in a data set's mask files mean.

    A value is an id of 8 or 16 bits (in a palette image, the index), or a colour packed by `pack`.

    Args:
        names: Names of the classes, in order.
        values: The value of each class in the files; 0, 1, 2 ... if none are given.
        ignored: Values of pixels that belong to no class.
        palette: A colour of each class to show it in; generated if none are given.
        colored: The values are packed colours, not ids.
    """

    names: Sequence[str]
    values: Sequence[int] = ()
    ignored: Sequence[int] = ()
    palette: Sequence[Color] = ()
    colored: bool = False

    def __post_init__(self) -> None:
        if not 0 < len(self.names) <= IGNORE:
            raise ValueError(f"{len(self.names)} classes: there must be 1 to {IGNORE}")
        if len(set(self.names)) < len(self.names):
            raise ValueError("two classes have one name: give each its own")
        fill = {"values": range(len(self.names)), "palette": color_map(len(self.names))}
        for key, default in fill.items():
            given = getattr(self, key) or default
            if len(given) != len(self.names):
                raise ValueError(f"{len(given)} {key} for {len(self.names)} classes: give as many")
            object.__setattr__(self, key, given)
        known = [*self.values, *self.ignored]
        if len(set(known)) < len(known):
            raise ValueError("a mask value stands for two classes, or for a class and the ignored")
        if min(known) < 0 or max(known) >= self._limit:
            raise ValueError(f"mask values must lie in 0 to {self._limit - 1}")

    @property
    def _limit(self) -> int:
        return 1 << (24 if self.colored else 16)

    @cached_property
    def table(self) -> NDArray[np.int16]:
        """The class id, IGNORE or UNKNOWN of every possible value."""
        table = np.full(self._limit, UNKNOWN, np.int16)
        table[list(self.ignored)] = IGNORE
        table[list(self.values)] = np.arange(len(self.values))
        return table

    def decode(self, image: Image.Image) -> NDArray[np.uint8]:
        """The class ids of a mask: [height, width].

        Raises:
            ValueError: If the mask is of the wrong kind or holds a value of no class.
        """
        values = pack(np.asarray(image.convert("RGB"))) if self.colored else _ids(image)
        classes = self.table[values]
        if (classes == UNKNOWN).any():
            strange = self._listed(np.unique(values[classes == UNKNOWN]).tolist())
            known = self._listed(sorted([*self.values, *self.ignored]))
            kind = "colour" if self.colored else "id"
            raise ValueError(f"holds {kind} {strange}, which is no class; known are {known}")
        return classes.astype(np.uint8)

    def _listed(self, values: Sequence[int]) -> str:
        shown = [str(list(unpack(value))) if self.colored else str(value) for value in values]
        return ", ".join(shown if len(shown) <= 30 else [*shown[:3], "...", shown[-1]])


def pack(colors: NDArray[np.integer] | Sequence[Color]) -> NDArray[np.int64]:
    """Colours [..., 3] of 8 bits a channel as one number each."""
    red, green, blue = np.moveaxis(np.asarray(colors, np.int64), -1, 0)
    return red << 16 | green << 8 | blue


def pack_one(color: Any) -> int:
    """A colour that a person gave as one number.

    Raises:
        ValueError: If it is none.
    """
    listed = isinstance(color, (list, tuple)) and len(color) == 3
    if not listed or not all(isinstance(part, int) and 0 <= part <= 255 for part in color):
        raise ValueError(f"{color!r} is no colour: give [red, green, blue], each from 0 to 255")
    return int(pack(color))


def unpack(value: int) -> Color:
    """The colour that a number stands for."""
    return value >> 16, value >> 8 & 255, value & 255


def color_map(count: int) -> list[Color]:
    """Colours that differ well, black first: those that PASCAL VOC gives its classes."""

    def channel(index: int, number: int) -> int:
        return sum((index >> 3 * bit + number & 1) << 7 - bit for bit in range(8))

    return [(channel(i, 0), channel(i, 1), channel(i, 2)) for i in range(count)]


def _ids(image: Image.Image) -> NDArray[np.integer]:
    values = np.asarray(image)
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise ValueError(
            f"is a picture of mode {image.mode}, not class ids; save it with one channel, or give "
            "the colours of the classes (`colors` of MaskFolderDataModule)"
        )
    if values.dtype.itemsize > 2 and (values.min() < 0 or values.max() >= 1 << 16):
        raise ValueError(f"holds id {values.min()} to {values.max()}; ids must lie in 0 to 65535")
    return values.astype(np.uint16)


# Files -----------------------------------------------------------------------------------------


def pairs_by_stem(images: Path, masks: Path, image_end: str = "", mask_end: str = "") -> list[Pair]:
    """The images and masks below two folders that have one name, sorted by it.

    Names are those below the folder, without extension and `image_end` or `mask_end`; files whose
    names end otherwise are left out.

    Raises:
        FileNotFoundError: If a folder is missing or empty, or a file has no partner.
    """
    image_of, mask_of = _by_stem(images, image_end), _by_stem(masks, mask_end)
    lonely = [image_of[stem] for stem in sorted({*image_of} - {*mask_of})]
    orphans = [mask_of[stem] for stem in sorted({*mask_of} - {*image_of})]
    found = []
    if lonely:
        found.append(f"{len(lonely)} images without a mask below {masks}: {_shown(lonely)}")
    if orphans:
        found.append(f"{len(orphans)} masks without an image below {images}: {_shown(orphans)}")
    if found:
        raise FileNotFoundError("; ".join(found))
    return [(image_of[stem], mask_of[stem]) for stem in sorted(image_of)]


def _by_stem(folder: Path, end: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in find_images(folder):
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem.endswith(end):
            stem = stem.removesuffix(end)
            if stem in files:
                raise ValueError(f"{files[stem]} and {path} have one name; remove one")
            files[stem] = path
    if not files:
        raise FileNotFoundError(
            f"found no {end or 'image'} files below {folder} "
            "(set data.init_args.root to the data set's own folder)"
        )
    return files


def pairs_in_list(listing: Path, images: Path, masks: Path, mask_end: str = ".png") -> list[Pair]:
    """The .jpg images and the masks whose names begin the lines of a text file.

    Raises:
        FileNotFoundError: If the list is missing, or a file that it names.
    """
    if not listing.is_file():
        raise FileNotFoundError(
            f"{listing} is missing (set data.init_args.root to the data set's own folder)"
        )
    names = [line.split()[0] for line in listing.read_text().splitlines() if line.strip()]
    pairs = [(images / f"{name}.jpg", masks / f"{name}{mask_end}") for name in names]
    missing = [path for pair in pairs for path in pair if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} files that {listing} lists are missing: {_shown(missing)}"
        )
    return list(pairs)


def _shown(paths: Sequence[Path]) -> str:
    return ", ".join([*map(str, paths[:5]), *(["..."] if len(paths) > 5 else [])])


def read_mask(path: Path, legend: Legend) -> NDArray[np.uint8]:
    """Read a mask's class ids: [height, width]."""
    image = read_upright(path)
    try:
        return legend.decode(image)
    except ValueError as reason:
        raise ValueError(f"mask {path} {reason}") from reason


def read_pair(
    image_path: Path, mask_path: Path, legend: Legend
) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Read an image and its mask, and raise if their sizes differ."""
    image, mask = read_photo(image_path), read_mask(mask_path, legend)
    height, width = mask.shape
    if image.size != (width, height):
        raise ValueError(
            f"image {image_path} is {image.width} x {image.height} pixels as a viewer shows it, "
            f"its mask {mask_path} {width} x {height}; make the mask anew in the image's size"
        )
    return image, mask
