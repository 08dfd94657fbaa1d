"""What training makes of a conversation, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from ..datamodules.conversations import ASSISTANT, USER, Conversation, Turn
from .encoding import IGNORED


def as_trained(encoder: Any, conversation: Conversation) -> Conversation:
    """A conversation with the text that its tokens stand for, and the images as they are fed.

    Args:
        encoder: Writes conversations in tokens.
        conversation: Its images are uint8 ``[3, H, W]``.

    Returns:
        What is learnt as turns of the assistant, all else as turns of the user.
    """
    batch = encoder.train_batch([conversation])
    pairs = zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True)
    turns = tuple(
        Turn(ASSISTANT if learnt else USER, _text(encoder.tokenizer, (token for token, _ in run)))
        for learnt, run in groupby(pairs, lambda pair: pair[1] != IGNORED)
    )
    return replace(conversation, turns=turns, images=_fed(encoder, batch, conversation.images))


def _fed(encoder: Any, batch: Any, images: tuple[Any, ...]) -> tuple[Any, ...]:
    """The images as they are fed, uint8; as they were where they are fed in pieces."""
    if "images" in batch:
        return tuple(batch["images"])
    pixels, made = batch.get("pixel_values"), encoder.processor.image_processor
    if pixels is None or pixels.shape[:2] != (len(images), 3) or not made.do_normalize:
        return images
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (made.image_mean, made.image_std))
    return tuple((255 * (pixels * std + mean)).round().clamp(0, 255).byte())


def _text(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Decodes tokens; special ones that are repeated, as those of an image are, are counted."""
    text, plain = "", []
    for token, run in groupby(tokens):
        count = len(list(run))
        if count == 1 or token not in tokenizer.all_special_ids:
            plain += [token] * count
            continue
        text += f"{tokenizer.decode(plain)}{tokenizer.decode([token])} x {count} "
        plain = []
    return text + tokenizer.decode(plain)
