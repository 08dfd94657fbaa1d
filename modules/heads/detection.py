"""DetectionNet: one of torchvision's detectors on the pyramid of a timm backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbones.pyramid import Pyramid, Wrapper
from .detectors import DETECTORS, FeatureMaps, check_detector
from .fitting import Fit

Target = dict[str, Tensor]


class DetectionNet(Wrapper):
    """One of torchvision's detectors on a pyramid, which takes normalised images.

    It can be tuned as a timm model is: all but the backbone is its classifier.

    Attributes:
        detector: torchvision's module; its ``backbone`` are the `FeatureMaps`.
    """

    inner: ClassVar[str] = "detector.backbone.pyramid"

    def __init__(
        self,
        name: str,
        pyramid: Pyramid,
        num_classes: int,
        width: int,
        img_size: tuple[int, int],
        anchor_scale: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes over a pyramid.

        Args:
            name: ``faster_rcnn``, ``mask_rcnn``, ``retinanet`` or ``fcos``.
            pyramid: Makes maps, the finest of `finest_stride`.
            num_classes: Number of classes, without background.
            width: Channels of the maps and of the heads on them.
            img_size: Height and width of training images in pixels, which those of an evaluation
                are resized to fit.
            anchor_scale: Side of the anchors in strides of their map; None is as published.
            options: Other arguments of torchvision's class, such as ``box_score_thresh``.
        """
        super().__init__()
        options = dict(options or {})
        check_detector(name, options)
        kind = DETECTORS[name]
        maps = FeatureMaps(pyramid, width, kind.halvings)
        parts = kind.parts(maps, num_classes, anchor_scale or kind.anchor_scale)
        self.first_label = kind.first_label
        self.detector = kind.made(maps, **parts, **options)
        self.detector.transform = Fit(img_size, pyramid.divisor)
        for module in self._before_boxes():
            module.register_forward_hook(_full_precision)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        """Losses by name in training, else what is found in each image.

        Args:
            images: Normalised images [3, H, W] of any size.
            targets: ``boxes`` [n, 4] and ``labels`` [n] of each image, and for Mask R-CNN ``masks``
                [n, H, W]; needed in training.

        Returns:
            In training, scalars by name. Else, for each image, ``boxes`` [n, 4] in pixels,
            ``labels`` [n] from 0, ``scores`` [n] and for Mask R-CNN ``masks`` [n, H, W], bool.
        """
        if self.training:
            if targets is None:
                raise ValueError("a detector in training mode needs targets: call eval() to detect")
            shifted = [{**t, "labels": t["labels"] + self.first_label} for t in targets]
            return self.detector(images, shifted)
        return [self._told(found) for found in self.detector(images)]

    def _told(self, found: Target) -> Target:
        told = {key: found[key] for key in ("boxes", "scores")}
        told["labels"] = found["labels"] - self.first_label
        if "masks" in found:
            told["masks"] = found["masks"][:, 0] > 0.5
        return told

    def _before_boxes(self) -> list[nn.Module]:
        """What gives maps, whose dtype is the anchors', and numbers that boxes are made from."""
        in_one_stage = hasattr(self.detector, "head")
        heads = ["head"] if in_one_stage else ["rpn.head", "roi_heads.box_predictor"]
        return [self.detector.get_submodule(name) for name in ("backbone", *heads)]

    def parts(self) -> dict[str, list[str]]:
        """Names of the modules of backbone, neck and head, but those without parameters."""
        maps = ["pyramid.neck", "fpn", "coarser"]
        neck = [f"detector.backbone.{name}" for name in maps]
        heads = [name for name, _ in self.detector.named_children() if name != "backbone"]
        named = {
            "backbone": [f"{self.inner}.backbone"],
            "neck": neck,
            "head": [f"detector.{name}" for name in heads],
        }
        return {part: list(filter(self._has_parameters, names)) for part, names in named.items()}

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """What is trained whole, and not adapted: neck and head."""
        parts = self.parts()
        return tuple(self.get_submodule(name) for name in (*parts["neck"], *parts["head"]))

    def _has_parameters(self, name: str) -> bool:
        return any(True for _ in self.get_submodule(name).parameters())


def _full_precision(module: nn.Module, args: Any, output: Any) -> Any:
    """Undoes autocast: bfloat16 has no more than 8 bits, and a photo more pixels."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.half) else output
    if isinstance(output, dict):
        return {key: _full_precision(module, args, value) for key, value in output.items()}
    return type(output)(_full_precision(module, args, value) for value in output)
