"""Classification: images with the names of their classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .base import Drawing, Key, show_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class LabelDrawing(Drawing):
    """Draws images, and the name of its class under each."""

    def sample(self, axis: Axes, image: Tensor, target: int) -> set[Key]:
        """Draws an image and its class."""
        show_image(axis, image)
        axis.set_xlabel(self.class_names[target])
        return set()
