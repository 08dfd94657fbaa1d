"""torchvision's detectors, and the maps and parts that they are made of here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ..backbones.pyramid import Pyramid
from .detector_options import check_options


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
