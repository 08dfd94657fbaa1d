"""Convolutions whose patches do not overlap, such as ConvNeXt's downsampling.

They are a linear map of the patches. On a CPU, where pixels lie with their channels together and
there are fewer numbers in the input than in the weight, one copy of the input and matrix products
take less time than torch's convolution, which lays out the weight anew in every call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .maps import LinearMap


def suits(x: Tensor, weight: Tensor, stride: list[int], rest: list[int], groups: int) -> bool:
    """Whether `PatchMap` computes this convolution, and is the faster way.

    Args:
        x: Input.
        weight: Weight, ``[out, C / groups, *kernel]``.
        stride: Stride.
        rest: Padding, and dilation less one: all zeros here.
        groups: Groups.
    """
    if list(weight.shape[2:]) != stride or any(rest) or groups > 1 or x.numel() > weight.numel():
        return False
    whole = all(size % k == 0 for size, k in zip(x.shape[2:], stride, strict=True))
    together = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return whole and together and x.device.type == "cpu"


@dataclass(frozen=True)
class PatchMap(LinearMap):
    """A convolution as a linear map; it takes patches ``[N, H / kh, W / kw, kh * kw * C]``.

    Attributes:
        kernel: The kernel's size, and the stride.
    """

    kernel: list[int]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The map itself."""
        return super().__call__(x, _flat(weight), bias).movedim(-1, 1)

    def prepared(self, x: Tensor) -> Tensor:
        """Gathers the patches of ``[N, C, H, W]``."""
        kh, kw = self.kernel
        n, c, h, w = x.shape
        tiles = x.permute(0, 2, 3, 1).reshape(n, h // kh, kh, w // kw, kw, c)
        return tiles.transpose(2, 3).flatten(3)

    def restored(self, gx: Tensor, shape: torch.Size) -> Tensor:
        """Puts the patches of a gradient back in their places."""
        n, c, h, w = shape
        tiles = gx.unflatten(3, (*self.kernel, c)).transpose(2, 3)
        return tiles.reshape(n, h, w, c).permute(0, 3, 1, 2)

    def wants_channels_last(self, x: Tensor) -> bool:
        """As in the patches."""
        return True

    def stand_in(self, gy: Tensor, shape: torch.Size) -> Tensor:
        """Nothing is read of it."""
        return gy

    def input_grad(self, gy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """The gradient of the patches."""
        return super().input_grad(gy.movedim(1, -1), _flat(weight), x)

    def input_and_hidden_grad(
        self, gy: Tensor, weight: Tensor, widen: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the patches and of what `hidden` gives."""
        return self.input_grad(gy, weight, x), self.hidden_grad(gy, widen)

    def weight_grad(self, gy: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the weight."""
        return self.narrow_grad(gy.movedim(1, -1), x, shape)

    def bias_grad(self, gy: Tensor) -> Tensor:
        """The gradient of the bias."""
        return super().bias_grad(gy.movedim(1, -1))

    def hidden(self, x: Tensor, narrow: Tensor) -> Tensor:
        """The chain's first product, ``[N, H / kh, W / kw, R]``."""
        return super().hidden(x, _flat(narrow))

    def hidden_grad(self, gy: Tensor, widen: Tensor) -> Tensor:
        """The gradient of what `hidden` gives."""
        return LinearMap().hidden(gy.movedim(1, -1), widen.T)

    def widen_grad(self, gy: Tensor, hidden: Tensor) -> Tensor:
        """The gradient of B."""
        return super().widen_grad(gy.movedim(1, -1), hidden)

    def narrow_grad(self, g_hidden: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of A."""
        flat = super().narrow_grad(g_hidden, x, shape)
        return flat.unflatten(1, (*shape[2:], shape[1])).movedim(-1, 1)

    def plus_widened(self, y: Tensor, hidden: Tensor, widen: Tensor) -> Tensor:
        """``y`` plus what comes through the chain; may write into ``y``."""
        return super().plus_widened(y.movedim(1, -1), hidden, widen).movedim(-1, 1)

    def narrowed_grad(self, g_hidden: Tensor, narrow: Tensor, x: Tensor) -> Tensor:
        """The gradient of what `hidden` takes."""
        return super().input_grad(g_hidden, _flat(narrow), x)

    def plus_input_grad(self, gx: Tensor, g_hidden: Tensor, narrow: Tensor) -> Tensor:
        """``gx`` plus what comes through A; may write into ``gx``."""
        return super().plus_input_grad(gx, g_hidden, _flat(narrow))


def _flat(weight: Tensor) -> Tensor:
    """``[out, kh * kw * C]`` of ``[out, C, kh, kw]``."""
    return weight.movedim(1, -1).flatten(1)
