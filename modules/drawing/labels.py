"""Classification: images with the names of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .base import Drawing, Key, show_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class LabelDrawing(Drawing):
    """Draws images, each with the name of its class below."""

    def sample(self, axes: Sequence[Axes], image: Tensor, target: int) -> set[Key]:
        """Draws an image and its class."""
        show_image(axes[0], image)
        axes[0].set_xlabel(self.class_names[target])
        return set()
