"""Decoders of segmentation_models_pytorch, fed from the maps of a pyramid.

That library's encoders begin with the image itself, at stride 1, and a map at stride 2. A pyramid
has neither, so each class here hands its decoder what that one reads in their place. Decoders,
final convolutions and initial weights are the library's.

Where a decoder pools a map to one pixel and normalises by the batch (upernet, deeplabv3plus),
training takes at least two images at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn


class DecoderHead(nn.Module):
    """A decoder and the convolution that turns its output into logits.

    A subclass makes both from the channels and strides of the maps, and a width: the channels that
    the decoder works in, at most those of its last maps.

    Attributes:
        reads_all: Whether every map is used.
    """

    reads_all: ClassVar[bool] = True

    def __init__(self, decoder: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        start = _library("base.initialization")
        start.initialize_decoder(decoder)
        start.initialize_head(classifier)
        self.decoder = decoder
        self.classifier = classifier

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [N, classes, h, w] that cover what the maps, finest first, cover."""
        return self.classifier(self.decoder(self.arrange(list(maps))))

    def arrange(self, maps: list[Tensor]) -> list[Tensor]:
        """The list that the decoder expects."""
        return maps


class UNet(DecoderHead):
    """The decoder of U-Net (Ronneberger et al. 2015, arXiv:1505.04597), down to stride 1."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        width: int = 256,
    ) -> None:
        finest = strides[0]
        if finest & (finest - 1):
            raise ValueError(f"unet doubles its maps up to the image: it cannot from {finest} px")
        above = [2**i for i in range(finest.bit_length() - 1)]
        targets = [*strides[-2::-1], *above[::-1]]
        widths = [min(width * stride // 16, width) for stride in targets]
        decoder = _library("decoders.unet.decoder").UnetDecoder(
            [0] * len(above) + list(channels), widths, n_blocks=len(targets)
        )
        super().__init__(decoder, _convolution(widths[-1], num_classes, 3))
        self.scales = [finest // stride for stride in above]

    def arrange(self, maps: list[Tensor]) -> list[Tensor]:
        """The maps, after finer ones without channels: they say the sizes to go on to."""
        return [_empty(maps[0], scale) for scale in self.scales] + maps


class FPN(DecoderHead):
    """The semantic branch of Panoptic FPN (Kirillov et al. 2019, arXiv:1901.02446)."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        width: int = 256,
    ) -> None:
        if width % 64:
            raise ValueError(
                f"fpn normalises in 32 groups: its width is a multiple of 64, not {width}"
            )
        if list(strides) != [strides[0] * 2**i for i in range(4)]:
            raise ValueError(f"fpn takes four maps, each at twice the stride before, not {strides}")
        decoder = _library("decoders.fpn.decoder").FPNDecoder(
            list(channels), pyramid_channels=width, segmentation_channels=width // 2
        )
        super().__init__(decoder, _convolution(decoder.out_channels, num_classes))


class UPerNet(DecoderHead):
    """UPerNet (Xiao et al. 2018, arXiv:1807.10221)."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        width: int = 256,
    ) -> None:
        library = _library("decoders.upernet.decoder")
        decoder = library.UPerNetDecoder([0, 0, *channels], decoder_channels=width)
        super().__init__(decoder, _convolution(width, num_classes))

    def arrange(self, maps: list[Tensor]) -> list[Tensor]:
        """The maps, after two that are not looked at."""
        return [*maps[:1] * 2, *maps]


class SegFormer(DecoderHead):
    """The decoder of SegFormer (Xie et al. 2021, arXiv:2105.15203)."""

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        width: int = 256,
    ) -> None:
        library = _library("decoders.segformer.decoder")
        decoder = library.SegformerDecoder([0, *channels], segmentation_channels=width)
        super().__init__(decoder, _convolution(width, num_classes))

    def arrange(self, maps: list[Tensor]) -> list[Tensor]:
        """The maps, after an image of which the finest is a quarter: it says the output's size."""
        return [_empty(maps[0], 4), *maps]


class DPT(DecoderHead):
    """The decoder of DPT (Ranftl et al. 2021, arXiv:2103.13413), which ignores class tokens.

    It reassembles the maps at strides 4, 8, 16 and 32 by whole factors. A stride between two powers
    of two counts as the nearer one: from patches of 14 the factors are those from 16.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        width: int = 256,
    ) -> None:
        if len(strides) != 4:
            raise ValueError(f"dpt takes four maps, not {len(strides)}")
        rounded = [2 ** round(math.log2(stride)) for stride in strides]
        library = _library("decoders.dpt.decoder")
        decoder = library.DPTDecoder(
            encoder_out_channels=channels,
            encoder_output_strides=rounded,
            encoder_has_prefix_tokens=False,
            readout="ignore",
            intermediate_channels=(width, 2 * width, 4 * width, 4 * width),
            fusion_channels=width,
        )
        classifier = library.DPTSegmentationHead(width, num_classes, upsampling=1)
        super().__init__(decoder, classifier)
        self.whole = max(1, 32 // rounded[-1])  # pixels of the last map that make one at stride 32
        self.scale = rounded[0] // 2  # the output has stride 2

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [N, classes, h, w] that cover what the maps, finest first, cover."""
        height, width = maps[0].shape[-2:]
        pad = (0, -width % self.whole, 0, -height % self.whole)
        padded = [F.pad(features, pad, mode="replicate") for features in maps]
        logits = self.classifier(self.decoder(padded, [None] * len(padded)))
        return logits[..., : height * self.scale, : width * self.scale]


class DeepLabV3Plus(DecoderHead):
    """The decoder of DeepLabV3+ (Chen et al. 2018, arXiv:1802.02611).

    The paper's backbones are dilated to end at four times the stride of the finest map. Others are
    not, and their last map is resized to that.
    """

    reads_all: ClassVar[bool] = False

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        width: int = 256,
    ) -> None:
        if strides[-1] % (4 * strides[0]):
            raise ValueError(
                f"deeplabv3plus takes a last stride of 4 times the first or more, not {strides}"
            )
        decoder = _library("decoders.deeplabv3.decoder").DeepLabV3PlusDecoder(
            encoder_channels=[0, 0, channels[0], channels[-1]],
            encoder_depth=4,
            out_channels=width,
            atrous_rates=(12, 24, 36),
            output_stride=16,
            aspp_separable=True,
            aspp_dropout=0.5,
        )
        super().__init__(decoder, _convolution(width, num_classes))

    def arrange(self, maps: list[Tensor]) -> list[Tensor]:
        """The finest map third, where it is read, and the coarsest last."""
        finest, coarsest = maps[0], maps[-1]
        size = [side // 4 for side in finest.shape[-2:]]
        return [finest, finest, finest, F.interpolate(coarsest, size, mode="bilinear")]


def _empty(features: Tensor, scale: int) -> Tensor:
    """A map of so many times the height and width, and no channels."""
    height, width = features.shape[-2:]
    return features.new_empty(len(features), 0, height * scale, width * scale)


def _convolution(channels: int, num_classes: int, kernel_size: int = 1) -> nn.Module:
    return _library("base").SegmentationHead(channels, num_classes, kernel_size)


def _library(module: str) -> Any:
    try:
        return import_module(f"segmentation_models_pytorch.{module}")
    except ImportError as error:
        raise ImportError(
            "the decoders are those of segmentation_models_pytorch: pip install 'litflora[dense]'"
        ) from error
