"""Which predicted objects find which true ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

Objects = dict[str, Tensor]

NOTHING, CROWD = -1, -2


def match(target: Objects, found: Objects, least_iou: float = 0.5) -> Tensor:
    """The true object that each prediction finds, as COCO's evaluation pairs them.

    Predictions choose by falling score: each takes, of the objects of its class that are left, the
    one that its box overlaps most. One that lies in a crowd of its class by half is no error.

    Args:
        target: ``boxes`` ``[T, 4]`` in XYXY, ``labels`` ``[T]``, and maybe ``iscrowd`` ``[T]``.
        found: ``boxes`` ``[P, 4]`` and ``labels`` ``[P]``, by falling score.
        least_iou: Intersection over union of boxes from which on an object is found.

    Returns:
        int64 ``[P]``: a place in the target, NOTHING or CROWD.
    """
    crowd = crowds(target)
    alike = found["labels"][:, None] == target["labels"]
    free = box_iou(found["boxes"], target["boxes"]) * (alike & ~crowd)
    inside = _share_inside(found["boxes"], target["boxes"]) * (alike & crowd)
    matches = torch.full((len(found["boxes"]),), NOTHING)
    matches[(inside >= least_iou).any(1)] = CROWD
    for place in range(len(matches) if len(crowd) else 0):
        iou, best = free[place].max(0)
        if iou >= least_iou:
            matches[place] = best
            free[:, best] = 0
    return matches


def crowds(target: Objects) -> Tensor:
    """Which true objects are crowds, not single ones: bool ``[T]``."""
    return target.get("iscrowd", torch.zeros(len(target["labels"]))).bool()


def _share_inside(boxes: Tensor, others: Tensor) -> Tensor:
    """The share of each box that lies in each of the others: ``[boxes, others]``."""
    start = torch.maximum(boxes[:, None, :2], others[:, :2])
    end = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    return (end - start).clamp(min=0).prod(2) / box_area(boxes)[:, None].clamp(min=1e-6)
