"""Transforms of images together with their masks and boxes, for every dense task.

They take samples of torchvision's tv_tensors, as (image, mask) or (image, {"boxes": ..., ...}).
"""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from .masks import IGNORE

# Padding of an image: the mean of ImageNet's photos, which a backbone's normalisation takes to
# about zero.
MEAN_COLOR = [124, 116, 104]
# How far colours are changed, each with probability 1/2 (Liu et al., SSD, arXiv 1512.02325).
DISTORTION = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05}


class ScaleJitter(v2.Transform):
    """Resizes to a random multiple of the image's own size, or of that which just fits a size.

    torchvision's class of this name resizes masks by "nearest", which moves them by up to half a
    pixel against the image; "nearest-exact" does not.

    Args:
        scale_range: Least and greatest scale.
        fit: Height and width that scale 1 fits into; None is the image's own. With a range of
            (0.1, 2.0) this is large-scale jitter (Ghiasi et al., arXiv 2012.07177).
    """

    def __init__(
        self, scale_range: tuple[float, float], fit: tuple[int, int] | None = None
    ) -> None:
        super().__init__()
        self.fit = fit
        self.scale_range = scale_range

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size that comes out."""
        height, width = v2.query_size(flat_inputs)
        unit = min(self.fit[0] / height, self.fit[1] / width) if self.fit else 1.0
        scale = unit * torch.empty(()).uniform_(*self.scale_range).item()
        return {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize a part of the sample: images bilinear and antialiased."""
        if not isinstance(inpt, tv_tensors.Mask):
            return v2.functional.resize(inpt, params["size"], antialias=True)
        resized = v2.functional.resize(
            inpt.as_subclass(Tensor)[None],
            params["size"],
            interpolation=v2.InterpolationMode.NEAREST_EXACT,
        )
        return tv_tensors.wrap(resized[0], like=inpt)


class PadTo(v2.Transform):
    """Pads on the right and below what is smaller than a size.

    Args:
        size: Least height and width.
        mask_fill: Value of the masks there.
    """

    def __init__(self, size: tuple[int, int], mask_fill: int = IGNORE) -> None:
        super().__init__()
        self.size = size
        self.fill: dict[type, Any] = {tv_tensors.Image: MEAN_COLOR, tv_tensors.Mask: mask_fill}

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Find how much is missing."""
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, max(0, self.size[1] - width), max(0, self.size[0] - height)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Pad a part of the sample."""
        return v2.functional.pad(inpt, params["padding"], fill=self.fill.get(type(inpt)))


class TightenBoxes(v2.Transform):
    """Draws boxes anew round the masks [n, height, width] of their objects, if there are masks.

    What is left of an object in a crop rarely reaches all sides of its box's remainder. The box of
    an empty mask gets no size.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Find the boxes."""
        masks = [part for part in flat_inputs if isinstance(part, tv_tensors.Mask)]
        return {"boxes": boxes_round(masks[0].as_subclass(Tensor)) if masks else None}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Replace the boxes of the sample."""
        if params["boxes"] is None or not isinstance(inpt, tv_tensors.BoundingBoxes):
            return inpt
        return tv_tensors.wrap(params["boxes"].to(inpt.dtype), like=inpt)


def boxes_round(masks: Tensor) -> Tensor:
    """The corners x0, y0, x1, y1 round each mask's pixels, the last two exclusive.

    Args:
        masks: Not zero where the objects are: [n, height, width].

    Returns:
        In pixels, zeros for an empty mask: float32 [n, 4].
    """
    boxes = torch.zeros(len(masks), 4)
    some = masks.flatten(1).any(1).bool()  # of uint8 it is uint8
    boxes[some] = masks_to_boxes(masks[some]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    return boxes


def random_crop(
    size: tuple[int, int],
    scale_range: tuple[float, float] = (0.5, 2.0),
    photometric: bool = True,
    mask_fill: int = IGNORE,
    boxes: bool = False,
    fit: bool = False,
) -> v2.Compose:
    """The augmentation of dense tasks: scale jitter, crop, mirroring, changed colours.

    Args:
        size: Height and width that come out, in pixels; what lacks is padded.
        scale_range: Scales drawn from; at 1 the image has its own size.
        photometric: Change brightness, contrast, saturation and hue.
        mask_fill: Value of masks in the padding; 0 for masks of single objects.
        boxes: Samples have boxes with labels, as `visible_boxes` takes them.
        fit: At scale 1 the image just fits the size instead.
    """
    distortion = [
        v2.RandomApply([v2.ColorJitter(**{kind: amount})]) for kind, amount in DISTORTION.items()
    ]
    return v2.Compose(
        [
            ScaleJitter(scale_range, size if fit else None),
            PadTo(size, mask_fill),
            v2.RandomCrop(size),
            v2.RandomHorizontalFlip(),
            *(distortion if photometric else []),
            *([visible_boxes()] if boxes else []),
        ]
    )


def visible_boxes() -> v2.Compose:
    """Boxes of what is visible of each object; one with a side below 1 pixel is dropped.

    Samples are (image, {"boxes": ..., "labels": ..., and if known "masks": ...}).
    """
    return v2.Compose([v2.ClampBoundingBoxes(), TightenBoxes(), v2.SanitizeBoundingBoxes()])


def whole(size: tuple[int, int]) -> v2.Compose:
    """The whole image with its boxes, made to fit a size and padded: nothing is augmented."""
    return v2.Compose([ScaleJitter((1.0, 1.0), size), PadTo(size, mask_fill=0), visible_boxes()])


def middle(size: tuple[int, int]) -> v2.Compose:
    """The image's middle at its own scale, padded to a size: for training without augmentation."""
    return v2.Compose([PadTo(size), v2.CenterCrop(size)])


def to_tensors() -> v2.Compose:
    """Plain tensors: images stay uint8 [3, height, width], masks become int64."""
    as_int64 = v2.ToDtype({tv_tensors.Mask: torch.int64, "others": None})
    return v2.Compose([as_int64, v2.ToPureTensor()])
