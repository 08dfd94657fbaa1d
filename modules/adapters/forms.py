"""How the tensors of a layer become those of its map, and the gradients come back.

Most layers are a map as they are. A convolution whose patches do not overlap, such as ConvNeXt's
downsampling, is a linear map of its patches: on a CPU, where pixels lie with their channels
together and the input has fewer numbers than the weight, one copy of the input and matrix products
take less time than torch's convolution, which lays out the weight anew in every call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .maps import is_channels_last


class Form:
    """A layer that is a map as it is."""

    def input(self, x: Tensor) -> Tensor:
        """The map's input from the layer's."""
        return x

    def weight(self, weight: Tensor) -> Tensor:
        """The map's weight, or A of its chain, from the layer's."""
        return weight

    def output(self, y: Tensor) -> Tensor:
        """The layer's output from the map's."""
        return y

    def output_grad(self, gy: Tensor) -> Tensor:
        """The gradient of the map's output from that of the layer's."""
        return gy

    def input_grad(self, gx: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the layer's input, of this shape, from that of the map's."""
        return gx

    def weight_grad(self, gw: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the layer's weight, or of A, of this shape, from that of the map's."""
        return gw


@dataclass(frozen=True)
class Patches(Form):
    """A convolution as a linear map of patches ``[N, H / kh, W / kw, kh * kw * C]``.

    Attributes:
        kernel: Height and width of the kernel, which are the stride.
    """

    kernel: list[int]

    def input(self, x: Tensor) -> Tensor:
        """Gathers the patches of ``[N, C, H, W]``."""
        kh, kw = self.kernel
        n, c, h, w = x.shape
        tiles = x.permute(0, 2, 3, 1).reshape(n, h // kh, kh, w // kw, kw, c)
        return tiles.transpose(2, 3).flatten(3)

    def weight(self, weight: Tensor) -> Tensor:
        """``[out, kh * kw * C]`` of ``[out, C, kh, kw]``."""
        return weight.movedim(1, -1).flatten(1)

    def output(self, y: Tensor) -> Tensor:
        """``[N, out, H', W']``, in channels_last, of ``[N, H', W', out]``."""
        return y.movedim(-1, 1)

    def output_grad(self, gy: Tensor) -> Tensor:
        """``[N, H', W', out]`` of ``[N, out, H', W']``."""
        return gy.movedim(1, -1)

    def input_grad(self, gx: Tensor, shape: torch.Size) -> Tensor:
        """Puts the gradients of patches back in their places."""
        n, c, h, w = shape
        kh, kw = self.kernel
        tiles = gx.reshape(n, h // kh, w // kw, kh, kw, c).transpose(2, 3)
        return tiles.reshape(n, h, w, c).permute(0, 3, 1, 2)

    def weight_grad(self, gw: Tensor, shape: torch.Size) -> Tensor:
        """``[out, C, kh, kw]`` of ``[out, kh * kw * C]``."""
        return gw.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def takes_patches(
    x: Tensor, weight: Tensor, stride: list[int], offsets: list[int], groups: int
) -> bool:
    """Whether a convolution can be computed as `Patches`, and is the faster for it.

    Args:
        x: Input.
        weight: Weight, ``[out, C / groups, *kernel]``.
        stride: Stride.
        offsets: Padding, and what dilation adds to a step of one.
        groups: Groups.
    """
    pays = x.numel() <= weight.numel() and x.device.type == "cpu"
    if not pays or list(weight.shape[2:]) != stride or any(offsets) or groups > 1:
        return False
    whole = all(size % k == 0 for size, k in zip(x.shape[2:], stride, strict=True))
    return whole and is_channels_last(x)
