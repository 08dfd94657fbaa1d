"""Metrics of semantic segmentation: IoU, pixel accuracy, and how well boundaries are drawn.

Each takes class ids, image by image, of any size; pixels of 255 in the mask count for nothing.
"""

from __future__ import annotations

from math import hypot, isqrt
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.utilities import dim_zero_cat

from .losses import IGNORED
from .processes import gather_in_order


def segmentation_metrics(num_classes: int) -> MetricCollection:
    """The metrics of semantic segmentation.

    - ``miou``: the mean over classes of the IoU, intersections and unions summed over all images.
      Classes that are neither in the masks nor predicted are left out, as in mmsegmentation.
    - ``iou``: the IoU of each class, ``[C]``; nan for those left out.
    - ``acc``: share of the pixels that are right.
    - ``boundary_f``: see `BoundaryFScore`.

    They are updated with predicted class ids and a mask, both ``[H, W]`` integers.

    Args:
        num_classes: Number of classes, 2 to 255.
    """
    if not 2 <= num_classes <= IGNORED:
        raise ValueError(f"num_classes must be 2 to {IGNORED}, not {num_classes}")
    nan = float("nan")
    return MetricCollection(
        {
            "miou": JaccardIndex(num_classes, average="macro", ignore_index=IGNORED),
            "iou": JaccardIndex(
                num_classes, average="none", ignore_index=IGNORED, zero_division=nan
            ),
            "acc": MulticlassAccuracy(
                num_classes, average="micro", ignore_index=IGNORED, validate_args=False
            ),
            "boundary_f": BoundaryFScore(num_classes),
        },
        compute_groups=[["miou", "iou"], ["acc"], ["boundary_f"]],
    )


class JaccardIndex(MulticlassJaccardIndex):
    """torchmetrics' Jaccard index, with pixels counted by ``torch.bincount`` everywhere.

    In deterministic mode torchmetrics compares every pixel with every pair of classes at once: a
    mask of 2 megapixels and 150 classes would take 374 GB. Counts of integers are deterministic.
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Counts an image.

        Args:
            preds: Class ids ``[H, W]``.
            target: Class ids ``[H, W]``, 255 where they are to be ignored.
        """
        _check(preds, target, self.num_classes)
        kept = target != IGNORED
        pairs = target[kept].long() * self.num_classes + preds[kept]
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self.confmat += counts.view(self.num_classes, self.num_classes)


class BoundaryFScore(Metric):
    """Boundary F1 of Csurka et al. (BMVC 2013).

    A boundary pixel of a class has a neighbour of another class on its left, right, top or bottom.
    It is right if a boundary pixel of its class lies within the tolerance on the other side, in
    Euclidean distance. An image's score is the mean of the F1 of the classes that have a boundary
    on either side, and the metric is the mean over images, as in the paper; images in which no
    class has one are left out. It is nan while there is none.

    Ignored pixels of the mask are cut out of the prediction too. No boundary runs between a class
    and them: data sets that paint void between all objects, as VOC does, have next to none.

    Args:
        num_classes: Number of classes.
        tolerance: Share of the image's diagonal; one pixel at least.
        kwargs: Those of a torchmetrics metric.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    scores: list[Tensor]

    def __init__(self, num_classes: int, tolerance: float = 0.0075, **kwargs: Any) -> None:
        super().__init__(dist_sync_fn=gather_in_order, **kwargs)
        if not 0.0 <= tolerance < 1.0:
            raise ValueError(f"tolerance is a share of the diagonal in [0, 1), not {tolerance}")
        self.num_classes = num_classes
        self.tolerance = tolerance
        self.add_state("scores", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Counts an image.

        Args:
            preds: Class ids ``[H, W]``.
            target: Class ids ``[H, W]``, 255 where they are to be ignored.
        """
        _check(preds, target, self.num_classes)
        radius = max(self.tolerance * hypot(*target.shape), 1.0)
        drawn = _boundaries(preds.masked_fill(target == IGNORED, IGNORED))
        true = _boundaries(target)
        right_drawn, all_drawn = self._counts(drawn, true, radius)
        right_true, all_true = self._counts(true, drawn, radius)
        here = all_drawn + all_true > 0
        precision = right_drawn / all_drawn.clamp(min=1)
        recall = right_true / all_true.clamp(min=1)
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        self.scores.append((f1.sum() / here.sum()).view(1))  # nan where there is no boundary

    def compute(self) -> Tensor:
        """The mean score of the images."""
        return dim_zero_cat(self.scores).nanmean()

    def _counts(self, pixels: Tensor, others: Tensor, radius: float) -> tuple[Tensor, Tensor]:
        """Boundary pixels of each class that lie near one of its others, and all of them."""
        classes, near = _near(pixels, others, radius)
        n = self.num_classes
        return classes[near].bincount(minlength=n), classes.bincount(minlength=n)


def _boundaries(mask: Tensor) -> Tensor:
    """A mask in which all but the boundaries is ignored."""
    at_boundary = torch.zeros_like(mask, dtype=torch.bool)
    for axis in (0, 1):
        size = mask.shape[axis] - 1
        first, second = mask.narrow(axis, 0, size), mask.narrow(axis, 1, size)
        differ = (first != second) & (first != IGNORED) & (second != IGNORED)
        at_boundary.narrow(axis, 0, size).logical_or_(differ)
        at_boundary.narrow(axis, 1, size).logical_or_(differ)
    return mask.masked_fill(~at_boundary, IGNORED)


def _near(pixels: Tensor, others: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Class of each boundary pixel, and whether one of its class lies near among the others.

    Row by row of the disc around each pixel, the first of the others at or after the disc's left
    edge is looked up: all classes at once, and no map of distances for any.
    """
    reach = int(radius)
    classes, here = _keys(pixels, reach)
    there = _keys(others, reach)[1].sort().values
    there = torch.cat([there, there.new_full((1,), torch.iinfo(there.dtype).max)])
    columns = pixels.shape[1] + 2 * reach
    near = torch.zeros_like(classes, dtype=torch.bool)
    for row in range(-reach, reach + 1):
        half = isqrt(int(radius**2) - row**2)
        first = here + row * columns - half
        near |= there[torch.searchsorted(there, first)] <= first + 2 * half
    return classes, near


def _keys(mask: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Class of each pixel that is not ignored, and a number that orders by class, row and column.

    A margin lies around each class, so that no disc reaches into another row or class.
    """
    y, x = (mask != IGNORED).nonzero(as_tuple=True)
    classes = mask[y, x].long()
    height, width = (side + 2 * reach for side in mask.shape)
    return classes, ((classes * height) + y + reach) * width + x + reach


def _check(preds: Tensor, target: Tensor, num_classes: int) -> None:
    if preds.ndim != 2 or preds.shape != target.shape:
        raise ValueError(
            f"prediction and mask must be class ids [H, W] of one size, "
            f"not {list(preds.shape)} and {list(target.shape)}"
        )
    ignored = target == IGNORED
    for name, ids in (("prediction", preds), ("mask", target)):
        low, high = torch.aminmax(ids.masked_fill(ignored, 0))
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"the {name} has class ids from {low} to {high}: they must be 0 to "
                f"{num_classes - 1}, and {IGNORED} in a mask where pixels are to be ignored"
            )
