"""Images of any size as the tower takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

GREY = 127


def fitted(images: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Images ``[3, h, w]``, uint8, as one tensor ``[n, 3, height, width]``.

    Each is as large as fits, in the middle of grey: LLaVA-1.5 pads, and cuts nothing off.
    """
    if not images:
        return torch.zeros(0, 3, height, width, dtype=torch.uint8)
    return torch.stack([_fitted(image, height, width) for image in images])


def _fitted(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[-2:] == (height, width):
        return image
    scale = min(height / image.shape[-2], width / image.shape[-1])
    sides = [max(1, round(scale * side)) for side in image.shape[-2:]]
    resized = resize(image, sides, InterpolationMode.BICUBIC, antialias=True)
    fitted = image.new_full((image.shape[0], height, width), GREY)
    top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
    fitted[:, top : top + sides[0], left : left + sides[1]] = resized
    return fitted
