"""The gradient of a depthwise kernel on a CPU, where torch's own is slow on small maps.

Row by row of the kernel, one batched product correlates all rows of the input with all rows of the
output's gradient; the taps of that kernel row are sums along its diagonals. At 768 channels and few
pixels this takes a fifth of the time of torch's convolution; from about 56 pixels of width on, the
products' surplus makes it the slower one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDEST = 32
DTYPES = (torch.float32, torch.float64)  # the diagonals are summed after rounding


def takes_row_products(
    gy: Tensor, x: Tensor, stride: list[int], dilation: list[int], groups: int
) -> bool:
    """Whether `kernel_grad` can be used here, and is the faster way.

    Args:
        gy: Gradient of the output.
        x: Input.
        stride: Stride of the convolution.
        dilation: Dilation of the convolution.
        groups: Groups of the convolution.
    """
    plain = x.dim() == 4 and x.shape[1] == gy.shape[1] == groups > 1
    unit = set(stride) == set(dilation) == {1}
    fast = x.device.type == "cpu" and x.dtype in DTYPES and gy.shape[-1] <= WIDEST
    return plain and unit and fast


def kernel_grad(gy: Tensor, x: Tensor, kernel: torch.Size, padding: list[int]) -> Tensor:
    """The gradient of a kernel ``[C, 1, kh, kw]``.

    Args:
        gy: Gradient of the output, ``[N, C, H', W']``.
        x: Input, ``[N, C, H, W]``.
        kernel: Shape of the kernel.
        padding: Zeros on each side of height and width.
    """
    top, left = padding
    # Rows of all images lie one below the other, so that a shift by one row is a slice.
    x = F.pad(x.permute(1, 2, 0, 3), (left, left, 0, 0, top, top)).contiguous()
    gy = gy.permute(1, 2, 0, 3).contiguous()
    channels, height, _, wide = gy.shape
    rows = gy.flatten(1, 2)
    taps = []
    for row in range(kernel[2]):
        shifted = x[:, row : row + height].flatten(1, 2)
        products = torch.bmm(shifted.transpose(1, 2), rows)  # [C, W + 2 left, W']
        size = (channels, kernel[3], wide)
        diagonals = products.as_strided(size, (products[0].numel(), wide, wide + 1))
        taps.append(diagonals.sum(-1))
    return torch.stack(taps, 1).unsqueeze(1)
