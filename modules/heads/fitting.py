"""How a detector brings images of any size to the size it is trained at, and its finds back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform


class Fit(GeneralizedRCNNTransform):
    """Brings images of an evaluation to what those of training are.

    torchvision's own resizes by the shorter side, without antialiasing, and pads to the largest
    image of the batch. Here images are made to fit a size, antialiased, as the datamodules do in
    training, and are padded to that size, as ViTDet pads them: position embeddings are then those
    of training, and no image changes what is found in another.

    Args:
        size: Height and width in pixels.
        divisor: Padded sides are multiples of it.
    """

    def __init__(self, size: tuple[int, int], divisor: int) -> None:
        super().__init__(min(size), max(size), [0.0] * 3, [1.0] * 3, divisor)
        self.size = size

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Resizes a normalised image [3, H, W]; those of training have their size already."""
        if self.training:
            return image, target
        scale = min(side / own for side, own in zip(self.size, image.shape[-2:], strict=True))
        sides = [max(1, round(scale * own)) for own in image.shape[-2:]]
        return F.interpolate(image[None], sides, mode="bilinear", antialias=True)[0], target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Stacks images, with zeros, the mean colour, at the right and below."""
        shapes = [self.size, *(image.shape[-2:] for image in images)]
        height, width = (max(sides) for sides in zip(*shapes, strict=True))
        height, width = height + -height % size_divisible, width + -width % size_divisible
        return torch.stack(
            [F.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in images]
        )
