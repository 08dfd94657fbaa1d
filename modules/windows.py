"""Segmentation of images of any size: windows that overlap, a resized image, or the whole of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import resize

Predict = Callable[[Tensor], Tensor]
Size = int | tuple[int, int]

# Rows of a resized prediction that are made at a time: a band of 150 classes and 6000 columns has
# 230 MB, and the whole of an image of 4000 rows would have 14 GB.
BAND = 64


class Inference(ABC):
    """How an image of any size is given to a network.

    ``predict`` maps images ``[n, 3, h, w]`` to the scores of the classes ``[n, C, h, w]``, logits
    or probabilities. It gets images of the dtype and on the device of the image that is segmented,
    few at a time, and may move them. Results lie on the device of its scores.
    """

    @abstractmethod
    def bands(self, predict: Predict, image: Tensor) -> Iterator[Tensor]:
        """Scores of an image in bands of rows, from the top down.

        Args:
            predict: The network.
            image: ``[3, H, W]``, uint8 or float.

        Yields:
            Scores ``[C, rows, W]``; they are valid until the next are asked for.
        """

    @torch.no_grad()
    def __call__(self, predict: Predict, image: Tensor) -> Tensor:
        """Class ids ``[H, W]``, int64, of an image ``[3, H, W]``."""
        # On a CPU argmax takes two to six times as long for few classes.
        return torch.cat([band.max(0).indices for band in self.bands(predict, image)])

    @torch.no_grad()
    def scores(self, predict: Predict, image: Tensor) -> Tensor:
        """Scores ``[C, H, W]`` of an image ``[3, H, W]``, all of them in memory."""
        return torch.cat([band.clone() for band in self.bands(predict, image)], dim=1)


@dataclass
class Whole(Inference):
    """The image as it is, at once."""

    def bands(self, predict: Predict, image: Tensor) -> Iterator[Tensor]:
        """All rows in one band."""
        yield _predicted(predict, image[None])[0]


@dataclass
class Resized(Inference):
    """The image made to fit a size, and its scores made to fit the image, both bilinearly.

    The image keeps its shape, and zeros fill the size on its right or below, so that the network
    sees images of one size only.

    Attributes:
        size: Side, or height and width, that the image is to fit, in pixels.
    """

    size: Size

    def __post_init__(self) -> None:
        _check_size("size", self.size)

    def bands(self, predict: Predict, image: Tensor) -> Iterator[Tensor]:
        """Bands of 64 rows."""
        (height, width), (h, w) = image.shape[1:], _pair(self.size)
        scale = min(h / height, w / width)
        fit = [max(round(height * scale), 1), max(round(width * scale), 1)]
        scores = _predicted(predict, _padded(resize(image, fit), h, w)[None])[0]
        scores = _precise(scores[:, : fit[0], : fit[1]])
        upper, lower, share = _neighbours(fit[0], height, scores)
        for rows in torch.arange(height, device=scores.device).split(BAND):
            band = torch.lerp(scores[:, upper[rows]], scores[:, lower[rows]], share[rows, None])
            yield F.interpolate(band, width, mode="linear")


@dataclass
class SlidingWindow(Inference):
    """Windows of one size all over the image, blended where they overlap.

    A window's weight falls as a raised cosine towards its borders, and the weights at a pixel sum
    to 1. The last windows of a row and of a column are moved inside the image; an image smaller
    than a window is filled with zeros on its right and below. Scores are kept for one row of
    windows only: at most twice ``C x window x W`` numbers, beside the scores of two batches.

    Attributes:
        window: Side, or height and width, of a window in pixels.
        overlap: Share of its side that a window has in common with its neighbour. A half predicts
            each pixel about four times, a third about twice.
        batch_size: Windows that are predicted at a time.
    """

    window: Size
    overlap: float = 0.5
    batch_size: int = 4

    def __post_init__(self) -> None:
        _check_size("window", self.window)
        if not 0.0 <= self.overlap < 1.0:
            raise ValueError(f"overlap is a share of the window in [0, 1), not {self.overlap}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {self.batch_size}")

    def bands(self, predict: Predict, image: Tensor) -> Iterator[Tensor]:
        """One band for each row of windows: the rows that later windows do not reach."""
        (height, width), (h, w) = image.shape[1:], _pair(self.window)
        image = _padded(image, h, w)
        tops, lefts = self._starts(image.shape[1], h), self._starts(image.shape[2], w)
        down, across = _weights(tops, h), _weights(lefts, w)
        sums: Tensor | None = None
        for top, following, weight in zip(tops, [*tops[1:], height], down, strict=True):
            for left, scores, share in self._row(predict, image[:, top : top + h], lefts, across):
                if sums is None:
                    sums = _precise(scores.new_empty(0)).new_zeros(len(scores), h, image.shape[2])
                weights = weight.to(sums)[:, None] * share.to(sums)
                sums[:, :, left : left + w].addcmul_(_precise(scores), weights)
            assert sums is not None
            done = following - top
            yield sums[:, :done, :width]
            rest = sums[:, done:].clone()
            sums.zero_()[:, : rest.shape[1]] = rest

    def _row(
        self, predict: Predict, strip: Tensor, lefts: list[int], across: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The windows of one row: first column, scores ``[C, h, w]`` and weights of the columns."""
        w = across.shape[1]
        for first in range(0, len(lefts), self.batch_size):
            batch = slice(first, first + self.batch_size)
            crops = torch.stack([strip[:, :, left : left + w] for left in lefts[batch]])
            yield from zip(lefts[batch], _predicted(predict, crops), across[batch], strict=True)

    def _starts(self, length: int, window: int) -> list[int]:
        """Where windows begin along one side of the image."""
        stride = max(round(window * (1 - self.overlap)), 1)
        return [*range(0, length - window, stride), length - window]


def _weights(starts: list[int], window: int) -> Tensor:
    """Weights ``[windows, window]``, float64, along one side; at each pixel they sum to 1.

    The weights of windows on a grid are products of those along its sides, and so are the sums.
    """
    ramp = torch.sin((torch.arange(window, dtype=torch.float64) + 0.5) * pi / window).square()
    total = ramp.new_zeros(starts[-1] + window)
    for start in starts:
        total[start : start + window] += ramp
    return torch.stack([ramp / total[start : start + window] for start in starts])


def _neighbours(source: int, target: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two source rows between which each target row lies, and its share of the second."""
    centres = (torch.arange(target, dtype=torch.float64) + 0.5) * source / target
    place = (centres - 0.5).clamp(0, source - 1)
    upper = place.long().to(like.device)
    return upper, (upper + 1).clamp(max=source - 1), place.frac().to(like)


def _predicted(predict: Predict, images: Tensor) -> Tensor:
    scores = predict(images)
    n, _, h, w = images.shape
    if scores.ndim != 4 or (scores.shape[0], *scores.shape[2:]) != (n, h, w):
        raise ValueError(
            f"predict made {list(scores.shape)} of images {list(images.shape)}: "
            f"it must return [{n}, classes, {h}, {w}]"
        )
    return scores


def _precise(scores: Tensor) -> Tensor:
    """Scores in float32 at least: sums of half precision show seams."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _padded(image: Tensor, height: int, width: int) -> Tensor:
    """An image with zeros on its right and below, where it is smaller."""
    down, right = max(height - image.shape[1], 0), max(width - image.shape[2], 0)
    return F.pad(image, (0, right, 0, down)) if down or right else image


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _check_size(name: str, size: Size) -> None:
    if min(_pair(size)) < 1:
        raise ValueError(f"{name} is in pixels, 1 or more, not {size}")
