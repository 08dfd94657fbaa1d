"""Semantic segmentation: a pyramid and a head that gives every pixel its logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.pyramid import Pyramid, Wrapper
from .decoders import DPT, FPN, DeepLabV3Plus, SegFormer, UNet, UPerNet


class LinearHead(nn.Module):
    """Batch norm and one linear layer on the maps, resized to the finest and concatenated.

    This is the linear evaluation of DINOv2 (Oquab et al. 2023, arXiv:2304.07193). A linear layer on
    concatenated maps is a sum of one layer per map, and resizing commutes with it: so each map is
    projected at its own size, and only logits are resized.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        width: int = 256,
    ) -> None:
        """Makes a layer for each map; it has no ``width`` of its own."""
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in channels)
        self.layers = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for width in channels)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [N, classes, h, w] at the size of the first map, which is the finest."""
        layers = zip(self.norms, self.layers, maps, strict=True)
        logits = [layer(norm(features)) for norm, layer, features in layers]
        size = logits[0].shape[-2:]
        return sum(F.interpolate(part, size, mode="bilinear") for part in logits[1:]) + logits[0]


HEADS: dict[str, type[nn.Module]] = {
    "linear": LinearHead,
    "unet": UNet,
    "fpn": FPN,
    "upernet": UPerNet,
    "segformer": SegFormer,
    "dpt": DPT,
    "deeplabv3plus": DeepLabV3Plus,
}


def create_head(
    name: str,
    channels: Sequence[int],
    strides: Sequence[int],
    num_classes: int,
    width: int = 256,
) -> nn.Module:
    """Builds a segmentation head for the maps of a pyramid.

    Args:
        name: ``linear``, or a decoder of segmentation_models_pytorch: ``unet``, ``fpn``,
            ``upernet``, ``segformer``, ``dpt`` or ``deeplabv3plus``.
        channels: Channels of the maps, finest first.
        strides: Strides of the maps.
        num_classes: Number of classes.
        width: Channels that the decoder works in.

    Returns:
        A module that makes logits [N, num_classes, h, w] from a list of maps.

    Raises:
        ImportError: If the decoder's library is not installed.
        ValueError: If there is no such head, or it cannot take these strides or this width.
    """
    if name not in HEADS:
        raise ValueError(f"no segmentation head is called {name!r}: there are {', '.join(HEADS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    if width < 16:
        raise ValueError(f"the width of a head must be at least 16, not {width}")
    return HEADS[name](channels, strides, num_classes, width)


class SegmentationNet(Wrapper):
    """A pyramid and a head: images to the logits of every pixel.

    It can be tuned as a timm model is: neck and head are its classifier.

    Attributes:
        pyramid: Makes feature maps.
        head: Makes logits from them.
    """

    inner: ClassVar[str] = "pyramid"

    def __init__(self, pyramid: Pyramid, head: nn.Module) -> None:
        super().__init__()
        if not getattr(head, "reads_all", True) and any(True for _ in pyramid.neck.parameters()):
            raise ValueError(
                f"{type(head).__name__} reads the finest and the coarsest map alone: the others of "
                "a plain ViT's pyramid would train nothing. Take another head"
            )
        self.pyramid = pyramid
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes, H, W] of normalised images [N, 3, H, W] of any size."""
        maps = self.pyramid(images)
        padded = [side * self.pyramid.strides[0] for side in maps[0].shape[-2:]]
        logits = F.interpolate(self.head(maps), padded, mode="bilinear")
        return logits[..., : images.shape[-2], : images.shape[-1]]

    def parts(self) -> dict[str, list[str]]:
        """Names of the modules of backbone, neck and head; a neck without parameters has none."""
        neck = ["pyramid.neck"] if any(True for _ in self.pyramid.neck.parameters()) else []
        return {"backbone": ["pyramid.backbone"], "neck": neck, "head": ["head"]}

    def get_classifier(self) -> tuple[nn.Module, nn.Module]:
        """What is trained whole, and not adapted: neck and head."""
        return self.pyramid.neck, self.head
