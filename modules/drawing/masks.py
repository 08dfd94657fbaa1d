"""Semantic segmentation: images and masks of class ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..losses import IGNORED
from .base import Color, Drawing, Key, show, show_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RIGHT, WRONG, VOID = (216, 232, 216), (200, 30, 30), (160, 160, 160)


class MaskDrawing(Drawing):
    """Draws masks ``[H, W]`` of class ids in the colours of the classes."""

    parts: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = ("image", "truth", "prediction", "wrong pixels")

    def sample(self, axes: Sequence[Axes], image: Tensor, target: Tensor) -> set[Key]:
        """Draws an image and its mask."""
        show_image(axes[0], image)
        show(axes[1], coloured(target, self.palette))
        return self._keys(target)

    def predict(self, module: Any, sample: Any) -> Tensor:
        """The class ids that the module gives the pixels."""
        return module.segment(sample[0].to(module.device)).cpu()

    def compare(
        self, axes: Sequence[Axes], image: Tensor, target: Tensor, found: Tensor
    ) -> set[Key]:
        """Draws the image, its true and its predicted mask, and where these differ."""
        keys = self.sample(axes, image, target) | self._keys(found)
        show(axes[2], coloured(found, self.palette))
        show(axes[3], _errors(target, found))
        share = (found == target)[target != IGNORED].float().mean()
        axes[3].set_xlabel(f"{share:.1%} of pixels right")
        return keys

    def _keys(self, ids: Tensor) -> set[Key]:
        return {self._key(n) for n in ids.unique().tolist()}

    def _key(self, n: int) -> Key:
        if n == IGNORED:
            return Key(n, "unknown", VOID)
        return Key(n, self.class_names[n], tuple(self.palette[n]))


def coloured(ids: Tensor, palette: Sequence[Color]) -> np.ndarray:
    """Class ids ``[H, W]`` in their colours, ``[H, W, 3]`` uint8; ignored pixels are grey."""
    colours = np.full((IGNORED + 1, 3), VOID, np.uint8)
    colours[: len(palette)] = palette
    return colours[ids.numpy()]


def _errors(truth: Tensor, ids: Tensor) -> np.ndarray:
    kinds = torch.where(truth == IGNORED, 2, (truth != ids).long())
    return np.array([RIGHT, WRONG, VOID], np.uint8)[kinds.numpy()]
