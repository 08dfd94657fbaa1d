"""Conversations: images beside what is said about them."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any, ClassVar
from unicodedata import category

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from ..datamodules.conversations import ASSISTANT, Conversation
from ..language.measures import are_sentences, is_exact
from ..language.too_long import TooLongError
from .base import Color, Drawing, Key, shade, show_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHARACTERS, LINES = 36, 11  # of text that there is room for beside an image
POINTS, LEADING = 10, 14
PAPER = 255
SIDE = 512  # pixels of an image, at the most
GAP = 4  # pixels between images
BLACK = (40, 40, 40)
NOTHING = "(nothing)"
ANSWER = Key(0, "the assistant: what is learnt", (0, 120, 60))
RIGHT = Key(0, "right", (0, 120, 60))
WRONG = Key(1, "wrong", (190, 0, 130))


class ConversationDrawing(Drawing):
    """Draws the images of a conversation, and beside them what is said.

    A sample is a `Conversation`, its images uint8 ``[3, H, W]``.
    """

    parts: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = ("images", "question and right answers", "the model says")

    def shown(self, sample: Conversation) -> tuple[Tensor, Conversation, str]:
        """Its images side by side, itself, and its id."""
        return collage(sample.images), sample, sample.id

    def sample(self, axes: Sequence[Axes], image: Tensor, target: Conversation) -> set[Key]:
        """Draws images and turns."""
        show_image(axes[0], image)
        turns = target.turns
        write(axes[1], [(t.text, ANSWER.color if t.role == ASSISTANT else BLACK) for t in turns])
        return {ANSWER}

    def predict(self, module: Any, sample: Conversation) -> str:
        """The answer in place of the last one; nothing to a question that is too long."""
        try:
            return module.reply(sample.question())
        except TooLongError:
            return ""

    def compare(
        self, axes: Sequence[Axes], image: Tensor, target: Conversation, found: str
    ) -> set[Key]:
        """Draws the images, the question with all right answers, and the model's answer."""
        show_image(axes[0], image)
        accepted = target.accepted()
        asked = [(turn.text, BLACK) for turn in target.question().turns]
        answers = list(dict.fromkeys(accepted))  # ten people say much the same
        sentences = are_sentences(accepted, target.closed)
        right = answers if sentences else [" | ".join(answers)]
        write(axes[1], [*asked, *((text, RIGHT.color) for text in right)])
        if sentences:  # of which hardly one is said word by word
            write(axes[2], [(found or NOTHING, BLACK)])
            return {RIGHT}
        write(axes[2], [(found or NOTHING, (RIGHT if is_exact(found, accepted) else WRONG).color)])
        return {RIGHT, WRONG}


def collage(images: Sequence[Tensor]) -> Tensor:
    """Images ``[3, H, W]``, uint8, side by side on paper that is high enough for text beside it."""
    images = [_thumbnail(image) for image in images]
    width = sum(image.shape[-1] for image in images) + GAP * (len(images) - 1)
    width = max(width, 4)  # of no image
    height = max([width * 3 // 4, *(image.shape[-2] for image in images)])
    paper = torch.full((3, height, width), PAPER, dtype=torch.uint8)
    left = 0
    for image in images:
        paper[:, : image.shape[-2], left : left + image.shape[-1]] = image
        left += image.shape[-1] + GAP
    return paper


def _thumbnail(image: Tensor) -> Tensor:
    """An image as large as it is drawn at the most: paper for a panorama would fill the memory."""
    scale = SIDE / max(image.shape[-2:])
    if scale >= 1:
        return image
    return resize(image, [max(1, round(scale * side)) for side in image.shape[-2:]], antialias=True)


def write(axis: Axes, pieces: Sequence[tuple[str, Color]]) -> None:
    """Writes texts below each other in their colours, as much as there is room for."""
    axis.set_axis_off()
    lines = [
        (line, color)
        for text, color in pieces
        for paragraph in text.splitlines() or [""]
        for line in wrap(paragraph, CHARACTERS) or [""]
    ]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], ("…", BLACK)]
    for number, (line, color) in enumerate(lines):
        text = axis.annotate(
            _drawable(line),
            (0, 1),
            (0, -LEADING * number),
            xycoords="axes fraction",
            textcoords="offset points",
            va="top",
            fontsize=POINTS,
            color=shade(color),
            parse_math=False,  # a price is no formula
        )
        text.set_in_layout(False)  # else the pictures would give way to it


def _drawable(line: str) -> str:
    """The line with a sign for what no font has: a model whose tokens are bytes says anything."""
    return "".join("\N{REPLACEMENT CHARACTER}" if category(c) == "Cc" else c for c in line)
