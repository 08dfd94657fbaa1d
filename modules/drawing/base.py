"""What all drawings share: images side by side, and a legend of their colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Color = tuple[int, int, int]


class Key(NamedTuple):
    """An entry of a legend; entries are sorted by place."""

    place: int
    label: str
    color: Color


class Drawing:
    """How a task draws its samples, and what a model makes of them.

    Args:
        class_names: Names of the classes.
        palette: A colour (red, green, blue) of each class; generated if there are none.

    Attributes:
        parts: How many pictures `sample` draws side by side.
        columns: Titles of the pictures that `compare` draws; empty if a task has no gallery.
    """

    parts: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ()

    def __init__(self, class_names: Sequence[str], palette: Sequence[Color] = ()) -> None:
        self.class_names = class_names
        self.palette = palette or _distinct(len(class_names))

    def shown(self, sample: Any) -> tuple[Tensor, Any, str]:
        """Image, truth and name of a sample as the task's datasets give it."""
        return sample

    def sample(self, axes: Sequence[Axes], image: Tensor, target: Any) -> set[Key]:
        """Draws an image with its truth.

        Args:
            axes: As many as `parts` says.
            image: uint8 ``[3, H, W]``.
            target: The truth as the task's datamodules give it.

        Returns:
            What the colours stand for.
        """
        raise NotImplementedError

    def predict(self, module: Any, sample: Any) -> Any:
        """What the module makes of a sample as the task's datasets give it, on the CPU."""
        raise NotImplementedError

    def compare(self, axes: Sequence[Axes], image: Tensor, target: Any, found: Any) -> set[Key]:
        """Draws truth and prediction side by side.

        Args:
            axes: One for each of `columns`.
            image: uint8 ``[3, H, W]``.
            target: The truth as the task's datamodules give it.
            found: What `predict` gave.

        Returns:
            What the colours stand for.
        """
        raise NotImplementedError


def grid(heights: Sequence[float], columns: int, alike: bool = True) -> tuple[Figure, np.ndarray]:
    """A figure with room for a row of pictures for each of the heights, and its axes.

    Args:
        heights: Of the pictures of each row, as shares of their width.
        columns: Pictures in a row.
        alike: Whether those of a row have one shape.
    """
    from matplotlib.figure import Figure

    tall = 12 / columns * sum(heights) + 1
    # The closer layout shrinks all pictures of a column as far as its slimmest.
    layout = "compressed" if alike else "constrained"
    figure = Figure(figsize=(12, tall), dpi=100, layout=layout)
    return figure, figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights)


def legend(figure: Figure, keys: Iterable[Key]) -> None:
    """Says below the pictures what their colours stand for."""
    from matplotlib.patches import Patch

    patches = [Patch(color=shade(key.color), label=key.label) for key in sorted(keys)]
    if patches:
        longest = max(len(patch.get_label()) for patch in patches)
        columns = max(1, min(len(patches), 8, 130 // (longest + 6)))  # as many as are not cut off
        figure.legend(handles=patches, loc="outside lower center", ncols=columns)


def show(axis: Axes, pixels: np.ndarray) -> None:
    """Draws pixels ``[H, W, 3]`` (or 4, with opacity) as they are, without ticks."""
    axis.imshow(pixels, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def show_image(axis: Axes, image: Tensor) -> None:
    """Draws an image, uint8 ``[3, H, W]``."""
    show(axis, image.permute(1, 2, 0).numpy())


def shade(color: Color) -> tuple[float, ...]:
    """A colour as matplotlib takes it."""
    return tuple(channel / 255 for channel in color)


def _distinct(count: int) -> list[Color]:
    from matplotlib import colormaps

    colors = np.round(np.array(colormaps["tab20"].colors) * 255).astype(int).tolist()
    return [tuple(colors[index % len(colors)]) for index in range(count)]
