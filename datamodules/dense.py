"""What dense tasks share: images with targets of any kind, transformed together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, ImageOps
from torch import Tensor

from .base import SeededDataset
from .images import UNREADABLE

DenseSample = tuple[Tensor, Any, str]


class Pairs(Protocol):
    """Anything that gives (image, target) for an index, in tv_tensors."""

    def __getitem__(self, index: int, /) -> tuple[Any, Any]: ...


@dataclass
class DenseSamples(SeededDataset):
    """Images with their targets and names, drawn as (image, target, name).

    The transform gets the pair (image, target).
    """

    pairs: Pairs
    names: Sequence[str]
    transform: Callable[[Any], Any] | None = None
    seed: int = 0

    def __getitem__(self, key: int) -> DenseSample:
        index = key % len(self)
        image, target = self._transformed(self.pairs[index], key)
        return image, target, self.names[index]


def read_upright(path: Path) -> Image.Image:
    """Read a file in its own mode, turned as a viewer shows it; an unreadable one is named."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except UNREADABLE as reason:
        raise ValueError(f"cannot read {path} ({reason}); replace or remove it") from reason


def read_photo(path: Path) -> Image.Image:
    """Read a file as RGB, turned as a viewer shows it."""
    image = read_upright(path)
    if image.mode[0] in "IF":  # Pillow would cut their values off at 255
        raise ValueError(f"image {path} has mode {image.mode}; convert it to 8 bits a channel")
    return image.convert("RGB")
