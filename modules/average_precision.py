"""COCO's average precision of boxes and masks."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from .processes import gathered

# What is logged of torchmetrics' summary, and what it is called there.
SUMMARY = {
    "map": "map",
    "map50": "map_50",
    "map75": "map_75",
    "map_small": "map_small",
    "map_medium": "map_medium",
    "map_large": "map_large",
    "mar100": "mar_100",
}


class AveragePrecision(MeanAveragePrecision):
    """COCO's mean average precision, under the names that are logged.

    faster-coco-eval computes it, as COCO's own code does: what lies on a crowd counts neither for
    nor against, classes without an object are left out of the mean, images without one count their
    false finds. It is updated with lists of what was found, see `litflora.heads.detection`, and of
    targets, whose ``labels`` are the same numbers; ``iscrowd`` and ``area`` are taken from them
    where they are. It is -1 where nothing could be found.

    Args:
        masks: Whether masks are judged beside boxes.
        per_class: Whether `compute` also gives the ``classes`` that occur, and the precision of
            each, ``box_map_per_class`` and ``mask_map_per_class``.
    """

    def __init__(self, masks: bool, per_class: bool = False) -> None:
        if find_spec("faster_coco_eval") is None:
            raise ImportError("average precision needs an extra: pip install 'litflora[dense]'")
        super().__init__(
            iou_type=("bbox", "segm") if masks else "bbox",
            # torchmetrics' own are rounded to float32: a recall of just 0.1 would miss its step.
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            class_metrics=per_class,
            backend="faster_coco_eval",
        )
        self.per_class = per_class
        self.warn_on_many_detections = False  # that the best 100 count is COCO's definition

    def update(self, preds: list[dict[str, Tensor]], target: list[dict[str, Tensor]]) -> None:
        """Takes what was found in each image, and its target."""
        # Half precision would round a box's size once more.
        super().update([{**found, "boxes": found["boxes"].float()} for found in preds], target)

    def compute(self) -> dict[str, Tensor]:
        """The precisions: ``box_map``, ``box_map50``, ..., and ``mask_map``, ... if asked for."""
        found = super().compute()
        kinds = {"box": "bbox_", "mask": "segm_"} if len(self.iou_type) > 1 else {"box": ""}
        told: dict[str, Tensor] = {}
        for kind, prefix in kinds.items():
            told |= {f"{kind}_{name}": found[prefix + own] for name, own in SUMMARY.items()}
            if self.per_class:
                told[f"{kind}_map_per_class"] = found[f"{prefix}map_per_class"]
        return {**told, "classes": found["classes"]} if self.per_class else told

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """Gathers the images of all processes, in the order of one.

        torchmetrics gathers every tensor of an image on its own, which crashes or hangs where
        processes have different numbers of images, and it has no other place to change that.
        """
        states = apply_to_collection(self.metric_state, Tensor, Tensor.cpu)
        for name, images in states.items():
            setattr(self, name, gathered(images))
