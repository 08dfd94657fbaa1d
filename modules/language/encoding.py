"""From conversations to what a model takes: token ids, labels, images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..datamodules.conversations import IMAGE, Conversation
from .fitting import fitted
from .packing import places, rows_of
from .templates import written
from .too_long import LengthGuard, TooLongError, each_that_fits

MARK = re.compile(rf"{IMAGE}\s?")
IGNORED = -100  # the label of a token that is not to be learnt, as transformers has it

Batch = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens.

    Attributes:
        input_ids: Token ids.
        labels: The same where the assistant speaks, -100 elsewhere.
        images: How many of the conversation's images are in it.
    """

    input_ids: list[int]
    labels: list[int]
    images: int


class Encoder:
    """Writes conversations in tokens, with as many tokens for each image as it has features.

    Attributes:
        tokenizer: A fast tokenizer of transformers.
        image_token: Id of the token whose place an image's features take.
        tokens_per_image: How many of them an image has.
        max_length: Tokens that a conversation is cut off at.
        image_size: Height and width of the images in pixels.
    """

    def __init__(
        self, tokenizer: Any, tokens_per_image: int, max_length: int, image_size: tuple[int, int]
    ) -> None:
        """Checks that the tokenizer has what is needed.

        Raises:
            ValueError: It has no token for images, or cannot tell where its tokens are in a text.
        """
        self.tokenizer = tokenizer
        self.image_token = image_token_of(tokenizer)
        self.tokens_per_image = tokens_per_image
        self.max_length = max_length
        self.image_size = image_size
        self.guard = LengthGuard()
        bos = tokenizer.bos_token_id
        adds = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
        self._begin = [bos] if adds else []  # what the tokenizer begins a text with
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot say where in the text its tokens are: give a "
                "model with a fast tokenizer (tokenizer.json)"
            )

    def encode(self, conversation: Conversation) -> Encoded:
        """Tokens of a conversation, and labels of what the assistant says in it.

        What is too long is cut off at the end; of an image all tokens stay, or none.

        Raises:
            TooLongError: None of the assistant's tokens is left; names the conversation.
        """
        text, spans = written(self.tokenizer, conversation.turns)
        ids, labels = self._tokens(text, spans)
        length = self._cut(ids)
        found = Encoded(ids[:length], labels[:length], self._count(ids[:length]))
        if all(label == IGNORED for label in found.labels):
            reason = (
                f"conversation {conversation.id} has {len(ids):,} tokens, and none of its answers "
                f"begins within max_length {self.max_length:,}"
            )
            raise TooLongError(f"{reason}: raise it, or leave it out", reason)
        return found

    def prompt(self, conversation: Conversation) -> Encoded:
        """Tokens of a conversation that the assistant is to go on with.

        Raises:
            TooLongError: It is; names the conversation.
        """
        text, _ = written(self.tokenizer, conversation.turns)
        ids, labels = self._tokens(text, [])
        if len(ids) > self.max_length:
            reason = (
                f"the question of conversation {conversation.id} has {len(ids):,} tokens: more "
                f"than max_length {self.max_length:,}"
            )
            raise TooLongError(f"{reason}: shorten it, or raise max_length", reason)
        return Encoded(ids, labels, self._count(ids))

    def _tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        found = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        written_already = found["input_ids"][: len(self._begin)] == self._begin
        start = [] if written_already else self._begin
        ids, labels = [*start], [IGNORED] * len(start)
        for token, (begin, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            if token == self.image_token:
                ids += [token] * self.tokens_per_image
                labels += [IGNORED] * self.tokens_per_image
                continue
            spoken = any(begin < last and end > first for first, last in spans)
            ids.append(token)
            labels.append(token if spoken else IGNORED)
        return ids, labels

    def _cut(self, ids: list[int]) -> int:
        """How many tokens stay: no image is cut in two."""
        end = min(len(ids), self.max_length)
        if end == len(ids) or ids[end] != self.image_token:
            return end
        within = self._count_tokens(ids[:end]) % self.tokens_per_image
        return end - within

    def _count_tokens(self, ids: list[int]) -> int:
        return sum(token == self.image_token for token in ids)

    def _count(self, ids: list[int]) -> int:
        return self._count_tokens(ids) // self.tokens_per_image

    def train_batch(self, conversations: Sequence[Conversation]) -> Batch:
        """What a training step takes: see `batch`, and ``images`` ``[n, 3, h, w]``, uint8.

        Conversations of which no answer is left are left out.

        Raises:
            TooLongError: All are.
        """
        return self.guard.leave_out(self._train_batch, conversations)

    def _train_batch(self, conversations: Sequence[Conversation]) -> Batch:
        encoded = each_that_fits(self.encode, conversations)
        return {**self.batch(encoded), "images": self._kept_images(conversations, encoded)}

    def packed_batch(self, conversations: Sequence[Conversation]) -> Batch:
        """`train_batch` with several conversations a row, as many as ``max_length`` has room for.

        ``position_ids`` ``[rows, longest]`` count from 0 in each conversation, none of which sees
        another by the ``attention_mask``, ``[rows, 1, longest, longest]``, bool. The last token of
        one does not learn the first of the next.
        """
        return self.guard.leave_out(self._packed_batch, conversations)

    def _packed_batch(self, conversations: Sequence[Conversation]) -> Batch:
        encoded = each_that_fits(self.encode, conversations)
        rows = rows_of([len(each.input_ids) for each in encoded], self.max_length)
        order = [index for row in rows for index in row]
        images = self._kept_images([conversations[i] for i in order], [encoded[i] for i in order])
        joined = [_joined([encoded[i] for i in row]) for row in rows]
        lengths = [[len(encoded[i].input_ids) for i in row] for row in rows]
        positions, mask = places(lengths)
        seen = {"attention_mask": mask, "position_ids": positions}
        return {**self.batch(joined), **seen, "images": images}

    def _kept_images(
        self, conversations: Sequence[Conversation], encoded: Sequence[Encoded]
    ) -> Tensor:
        kept = zip(conversations, encoded, strict=True)
        return self.images([image for each, found in kept for image in each.images[: found.images]])

    def eval_batch(self, conversations: Sequence[Conversation]) -> Batch:
        """What an evaluation takes: `train_batch`, `predict_batch` under ``prompt``, and the truth.

        The truth is ``accepted``, the answers that count as right, and ``closed``. Labels are those
        of the last answer, which is asked for. Where a question is too long, ``unanswered`` is
        true, something else is in its place, and nothing of it is a label.
        """
        stand_in = self.guard.stand_in
        prompt, unanswered = stand_in(self._asked_batch, conversations, "unanswered")
        batch, lost = stand_in(self._train_batch, conversations, "nothing in the loss")
        batch["labels"] = last_answer(batch["labels"])
        batch["labels"][[*lost, *unanswered]] = IGNORED
        return {
            **batch,
            "prompt": {**prompt, **asked([each.question() for each in conversations])},
            "accepted": [each.accepted() for each in conversations],
            "closed": [each.closed for each in conversations],
            "unanswered": [index in unanswered for index in range(len(conversations))],
        }

    def _asked_batch(self, conversations: Sequence[Conversation]) -> Batch:
        return self.predict_batch([each.question() for each in conversations])

    def predict_batch(self, conversations: Sequence[Conversation]) -> Batch:
        """What an answer needs: prompts padded on the left, and `asked`."""
        images = [image for each in conversations for image in each.images]
        return {
            **self.batch(each_that_fits(self.prompt, conversations), left=True),
            "images": self.images(images),
            **asked(conversations),
        }

    def images(self, images: Sequence[Any]) -> Tensor:
        """Images of any size as one tensor ``[n, 3, h, w]``, uint8, resized to fit and padded."""
        return fitted(images, *self.image_size)

    def padded(self, rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
        """Rows of ids in one tensor ``[rows, longest]``."""
        longest = max(map(len, rows))
        fill = [[value] * (longest - len(row)) for row in rows]
        pairs = zip(rows, fill, strict=True)
        return torch.tensor([[*pad, *row] if left else [*row, *pad] for row, pad in pairs])

    def batch(self, rows: Sequence[Encoded], left: bool = False) -> dict[str, Tensor]:
        """Padded ``input_ids``, ``attention_mask`` and ``labels``, each ``[rows, longest]``."""
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        ids = [row.input_ids for row in rows]
        ones = [[1] * len(row) for row in ids]
        return {
            "input_ids": self.padded(ids, 0 if pad is None else pad, left),
            "attention_mask": self.padded(ones, 0, left),
            "labels": self.padded([row.labels for row in rows], IGNORED, left),
        }


def last_answer(labels: Tensor) -> Tensor:
    """Labels ``[batch, length]`` of the last tokens in a row that are learnt, -100 elsewhere."""
    learnt = labels != IGNORED
    begins = learnt & ~F.pad(learnt, (1, 0))[:, :-1]
    run = begins.cumsum(1)
    return labels.masked_fill(run < run[:, -1:], IGNORED)


def asked(conversations: Sequence[Conversation]) -> dict[str, list[Any]]:
    """What an answer is reported with: ``ids``, ``questions`` and the ``files`` of images."""
    return {
        "ids": [each.id for each in conversations],
        "questions": [MARK.sub("", each.turns[-1].text).strip() for each in conversations],
        "files": [each.files for each in conversations],
    }


def _joined(row: Sequence[Encoded]) -> Encoded:
    """Conversations one after another; the first token of each is not to be learnt."""
    ids = [token for each in row for token in each.input_ids]
    labels = [label for each in row for label in (IGNORED, *each.labels[1:])]
    return Encoded(ids, labels, sum(each.images for each in row))


def image_token_of(tokenizer: Any) -> int:
    """The id of a tokenizer's token for images.

    Raises:
        ValueError: It has none, or ``<image>`` is several tokens to it.
    """
    ids = tokenizer(IMAGE, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"the tokenizer has no token {IMAGE}: tokenizer.add_tokens(['{IMAGE}'], "
            "special_tokens=True), and save it with the language model"
        )
    return int(ids[0])
