"""Detectors of torchvision on the pyramids of timm backbones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ..backbones.pyramid import Pyramid, Wrapper
from .detector_options import check_options

Target = dict[str, Tensor]


class FeatureMaps(nn.Module):
    """What torchvision calls the backbone of a detector: maps of equal width, by name.

    The stages of a hierarchical backbone go through a feature pyramid network (Lin et al. 2017,
    arXiv:1612.03144). It has layer norms: stages of a classifier differ in scale. The simple
    feature pyramid of a plain ViT is used as it is.

    Attributes:
        pyramid: Makes the backbone's maps.
        fpn: The feature pyramid network; an identity for a plain ViT.
        coarser: Makes further maps from the coarsest.
        strides: Strides of all maps, finest first.
        out_channels: Channels of each.
    """

    def __init__(self, pyramid: Pyramid, width: int, halvings: int) -> None:
        """Takes over a pyramid.

        Args:
            pyramid: Makes maps, each of twice the stride before.
            width: Channels of the maps that come out; a plain ViT's pyramid has it already.
            halvings: How many coarser maps there are: 1 by pooling, or 2 by convolutions.
        """
        super().__init__()
        self.pyramid = pyramid
        self.fpn: nn.Module = nn.Identity()
        if isinstance(pyramid.neck, nn.Identity):
            channels = list(pyramid.channels)
            self.fpn = FeaturePyramidNetwork(channels, width, norm_layer=LayerNorm2d)
        self.coarser = LastLevelMaxPool() if halvings == 1 else LastLevelP6P7(width, width)
        added = (pyramid.strides[-1] * 2**times for times in range(1, halvings + 1))
        self.strides = (*pyramid.strides, *added)
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps [N, out_channels, H / stride, W / stride] of normalised images, by name."""
        stages = self.pyramid(images)
        maps = self.fpn({str(level): features for level, features in enumerate(stages)})
        levels, names = self.coarser(list(maps.values()), stages, list(maps))
        return dict(zip(names, levels, strict=True))


@dataclass(frozen=True)
class Kind:
    """How one of torchvision's detectors is put onto maps.

    Attributes:
        made: torchvision's class.
        parts: Arguments of it, made from maps, number of classes and side of the anchors.
        finest: Stride of the finest map.
        halvings: Number of maps coarser than the backbone's.
        anchor_scale: Side of the anchors in strides of their map, as published.
        first_label: What it calls the first class; 1 where 0 is the background.
    """

    made: type[nn.Module]
    parts: Callable[[FeatureMaps, int, float], dict[str, Any]]
    finest: int
    halvings: int
    anchor_scale: float
    first_label: int


def _box_parts(maps: FeatureMaps, num_classes: int, scale: float) -> dict[str, Any]:
    width = maps.out_channels
    return {
        "rpn_anchor_generator": _anchors(maps, scale),
        "box_roi_pool": _pool(maps, 7, scale),
        "box_head": TwoMLPHead(width * 7 * 7, 4 * width),
        "box_predictor": FastRCNNPredictor(4 * width, num_classes + 1),
    }


def _mask_parts(maps: FeatureMaps, num_classes: int, scale: float) -> dict[str, Any]:
    width = maps.out_channels
    return _box_parts(maps, num_classes, scale) | {
        "mask_roi_pool": _pool(maps, 14, scale),
        "mask_head": MaskRCNNHeads(width, (width,) * 4, dilation=1),
        "mask_predictor": MaskRCNNPredictor(width, width, num_classes + 1),
    }


def _retinanet_parts(maps: FeatureMaps, num_classes: int, scale: float) -> dict[str, Any]:
    octaves = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
    anchors = _anchors(maps, scale, octaves)
    return {"num_classes": num_classes, "anchor_generator": anchors}


def _fcos_parts(maps: FeatureMaps, num_classes: int, scale: float) -> dict[str, Any]:
    if maps.out_channels < 64 or maps.out_channels % 32:  # it has norms over 32 groups of channels
        raise ValueError(f"head_width must be 64, 96, 128, ... for fcos, not {maps.out_channels}")
    anchors = _anchors(maps, scale, ratios=(1.0,))
    return {"num_classes": num_classes, "anchor_generator": anchors}


def _anchors(
    maps: FeatureMaps,
    scale: float,
    octaves: tuple[float, ...] = (1.0,),
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0),
) -> AnchorGenerator:
    sizes = tuple(tuple(scale * stride * octave for octave in octaves) for stride in maps.strides)
    return AnchorGenerator(sizes, (ratios,) * len(sizes))


def _pool(maps: FeatureMaps, size: int, scale: float) -> MultiScaleRoIAlign:
    """Reads a box from the map whose anchors are of its size: 224 px at stride 16 for scale 8."""
    names = [str(level) for level in range(len(maps.strides) - 1)]
    return MultiScaleRoIAlign(names, size, sampling_ratio=2, canonical_scale=round(28 * scale))


DETECTORS: dict[str, Kind] = {
    "faster_rcnn": Kind(FasterRCNN, _box_parts, 4, 1, 8.0, first_label=1),
    "mask_rcnn": Kind(MaskRCNN, _mask_parts, 4, 1, 8.0, first_label=1),
    "retinanet": Kind(RetinaNet, _retinanet_parts, 8, 2, 4.0, first_label=0),
    "fcos": Kind(FCOS, _fcos_parts, 8, 2, 1.0, first_label=0),
}


def check_detector(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError if there is no such detector, or it takes no such options."""
    if name not in DETECTORS:
        raise ValueError(f"no detector is called {name!r}: there are {', '.join(DETECTORS)}")
    check_options(name, DETECTORS[name].made, options)


def finest_stride(name: str) -> int:
    """Stride of the finest map that a detector reads."""
    return DETECTORS[name].finest


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
            img_size: What images of an evaluation are resized to: the shorter side to the smaller
                number unless the longer one would pass the larger. Training images are left alone.
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
        self.detector.transform = _Resize(
            min(img_size),
            max(img_size),
            image_mean=[0.0] * 3,
            image_std=[1.0] * 3,
            size_divisible=pyramid.divisor,
            _skip_resize=True,
        )
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
            assert targets is not None
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


class _Resize(GeneralizedRCNNTransform):
    """torchvision's, which would leave no pixel of the shorter side of a strip."""

    def resize(self, image: Tensor, target: Target | None = None) -> Any:
        """Resizes an image in an evaluation; a strip is widened first."""
        height, width = image.shape[-2:]
        least = max(height, width) // self.max_size + 1
        if min(height, width) < least and not self.training:
            # Boxes found are resized back by each side's own ratio.
            size = (max(height, least), max(width, least))
            image = F.interpolate(image[None], size, mode="bilinear")[0]
        return super().resize(image, target)


def _full_precision(module: nn.Module, args: Any, output: Any) -> Any:
    """Undoes autocast: bfloat16 has no more than 8 bits, and a photo more pixels."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.half) else output
    if isinstance(output, dict):
        return {key: _full_precision(module, args, value) for key, value in output.items()}
    return type(output)(_full_precision(module, args, value) for value in output)
