"""Detection: images with boxes, names and scores, and masks where there are some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from .base import Color, Drawing, Key, shade, show, show_image
from .matching import NOTHING, Objects, crowds, match

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_SCORE = 0.3  # below it are too many predictions for a picture
MOST_DRAWN = 20  # and an untrained head may give as many above it
OPACITY = 0.45  # of masks
CROWD = (130, 130, 130)
FOUND = Key(0, "found", (0, 140, 70))
MISSED = Key(1, "true, and not found", (225, 110, 0))
WRONG = Key(2, "predicted, and matches nothing at IoU 0.5", (190, 0, 130))

INCHES = 6.0  # the longer side of a picture by itself: sets how large its text is
LEAST_PIXELS = 640  # its least length


class BoxDrawing(Drawing):
    """Draws objects: dicts of ``boxes`` (XYXY), ``labels``, and maybe ``scores`` and ``masks``.

    Of predictions, the 20 with the highest scores are drawn, if these are 0.3 or more.
    """

    columns: ClassVar[tuple[str, ...]] = (
        "truth",
        f"prediction (score ≥ {LEAST_SCORE})",
        "errors",
    )

    def sample(self, axes: Sequence[Axes], image: Tensor, target: Objects) -> set[Key]:
        """Draws an image and its objects; crowds are grey."""
        show_image(axes[0], image)
        self._objects(axes[0], target)
        return set()

    def predict(self, module: Any, sample: Any) -> Objects:
        """The objects that the module finds."""
        found = module.detect(sample[0].to(module.device))
        return {key: value.cpu() for key, value in found.items()}

    def compare(
        self, axes: Sequence[Axes], image: Tensor, target: Objects, found: Objects
    ) -> set[Key]:
        """Draws true and predicted objects, and those that do not match."""
        found = _likely(found)
        self.sample(axes[:1], image, target)
        self.sample(axes[1:2], image, found)
        self._errors(axes[2], image, target, found)
        return {FOUND, MISSED, WRONG}

    def picture(self, image: Tensor, found: Objects) -> Figure:
        """A figure of one image and the objects found in it.

        It has the image's own size or, where that is small, a multiple of it.
        """
        from matplotlib.figure import Figure

        height, width = image.shape[-2:]
        longest = max(height, width)
        inches = INCHES * width / longest, INCHES * height / longest
        figure = Figure(figsize=inches, dpi=longest * -(-LEAST_PIXELS // longest) / INCHES)
        axis = figure.add_axes((0, 0, 1, 1), frame_on=False)
        self.sample([axis], image, _likely(found))
        return figure

    def _objects(self, axis: Axes, objects: Objects) -> None:
        crowd = crowds(objects).tolist()
        labels = objects["labels"].tolist()
        colors = [
            CROWD if many else self.palette[label]
            for label, many in zip(labels, crowd, strict=True)
        ]
        if "masks" in objects and colors:
            show(axis, _blended(objects["masks"], colors))
        for box, color, text in zip(
            objects["boxes"].tolist(), colors, self._texts(objects), strict=True
        ):
            _box(axis, box, color, text)

    def _errors(self, axis: Axes, image: Tensor, target: Objects, found: Objects) -> None:
        show_image(axis, 255 - (255 - image) // 3)  # paler, so that the boxes stand out
        matches = match(target, found).tolist()
        crowd, true_texts = crowds(target).tolist(), self._texts(target)
        for place, box in enumerate(target["boxes"].tolist()):
            if place not in matches and not crowd[place]:
                _box(axis, box, MISSED.color, true_texts[place], at_foot=True)
        for box, text, matched in zip(
            found["boxes"].tolist(), self._texts(found), matches, strict=True
        ):
            wrong = matched == NOTHING
            _box(axis, box, (WRONG if wrong else FOUND).color, text if wrong else "")
        hits, wrongs = sum(m >= 0 for m in matches), matches.count(NOTHING)
        axis.set_xlabel(f"{hits} of {crowd.count(False)} found, {wrongs} wrong")

    def _texts(self, objects: Objects) -> list[str]:
        names = [self.class_names[label] for label in objects["labels"].tolist()]
        if "scores" not in objects:
            return names
        scores = objects["scores"].tolist()
        return [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]


def _likely(found: Objects) -> Objects:
    likely = (found["scores"] >= LEAST_SCORE).nonzero()[:MOST_DRAWN, 0]  # the highest come first
    return {key: value[likely] for key, value in found.items()}


def _blended(masks: Tensor, colors: Sequence[Color]) -> np.ndarray:
    """Masks ``[n, H, W]`` in their colours, ``[H, W, 4]`` uint8; the first lie on top."""
    pixels = np.zeros((*masks.shape[1:], 4), np.uint8)
    for mask, color in reversed(list(zip(masks.bool().numpy(), colors, strict=True))):
        pixels[mask] = (*color, round(255 * OPACITY))
    return pixels


def _box(axis: Axes, box: Sequence[float], color: Color, text: str, at_foot: bool = False) -> None:
    """Draws a box, and its text above or at the foot: inside, where there is no room outside."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    x0, y0, x1, y1 = (edge - 0.5 for edge in box)  # the first pixel's centre is at 0
    halo = withStroke(linewidth=3, foreground="white")  # a dark line shows on a dark image, too
    edges = {"fill": False, "edgecolor": shade(color), "linewidth": 1.5, "path_effects": [halo]}
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **edges))
    if not text:
        return
    right, bottom = axis.get_xlim()[1], axis.get_ylim()[0]
    to_left = x0 > 0.7 * right
    under = y1 < 0.94 * bottom if at_foot else y0 < 0.06 * bottom
    light = np.dot(color, (0.299, 0.587, 0.114)) > 150
    axis.annotate(
        text,
        (x1 if to_left else x0, y1 if at_foot else y0),
        ha="right" if to_left else "left",
        va="top" if under else "bottom",
        fontsize=8,
        color="black" if light else "white",
        bbox={"facecolor": shade(color), "edgecolor": "none", "boxstyle": "square,pad=0.1"},
    )
