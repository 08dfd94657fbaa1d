"""From conversations to what a checkpoint of transformers takes, by its own processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..datamodules.conversations import ASSISTANT, IMAGE, Conversation, Turn
from .encoding import IGNORED, Batch, Encoder, asked
from .templates import Span, harmless, spoken
from .too_long import LengthGuard, TooLongError

# Where in a text its tokens are, and what images were written out to: to find who says what.
TRACES = ("offset_mapping", "text_replacement_offsets")


class ProcessorEncoder:
    """Writes conversations by the chat template and the processor of a checkpoint.

    Attributes:
        processor: A processor of transformers.
        tokenizer: Its tokenizer.
        max_length: Tokens that a conversation is cut off at.
    """

    def __init__(self, processor: Any, max_length: int) -> None:
        """Checks that the processor has what is needed.

        Raises:
            ValueError: It takes no images, or has no chat template or no token for images, or its
                tokenizer cannot tell where its tokens are in a text.
        """
        kind = type(processor).__name__
        if getattr(processor, "image_processor", None) is None:
            raise ValueError(f"{kind} takes no images: the checkpoint needs a processor that does")
        if processor.chat_template is None:
            raise ValueError(
                f"{kind} has no chat template: give the checkpoint a chat_template.jinja"
            )
        if getattr(processor, "image_token", None) is None:
            raise ValueError(f"{kind} has no image_token: nothing says where in a text images are")
        if not processor.tokenizer.is_fast:
            raise ValueError(
                f"{type(processor.tokenizer).__name__} cannot say where in the text its tokens "
                "are: give the checkpoint a fast tokenizer (tokenizer.json)"
            )
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self.guard = LengthGuard()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def train_batch(self, conversations: Sequence[Conversation]) -> Batch:
        """What the processor gives, padded on the right, and ``labels`` ``[batch, length]``.

        What is too long is cut off at the end; where that would cut into images, whole exchanges
        are left out from the end, and a conversation of which no answer is left.

        Raises:
            TooLongError: No conversation is left.
        """
        return self.guard.leave_out(self._train_batch, conversations)

    def _train_batch(self, conversations: Sequence[Conversation]) -> Batch:
        kept = list(conversations)
        while True:
            texts, spans = zip(*map(self.written, kept), strict=True)
            batch = self._processed(kept, texts, "right")
            labels = self._labels(batch, spans)
            cut = self._images(batch["input_ids"])[:, self.max_length :].any(1).tolist()
            if not any(cut):
                break
            pairs = zip(kept, cut, strict=True)
            kept = [_shortened(each) if over else each for each, over in pairs]
            self._refuse_empty(conversations, [each is not None for each in kept])
        batch = self._cut({**batch, "labels": labels})
        self._refuse_empty(conversations, (batch["labels"] != IGNORED).any(1).tolist())
        return batch

    def predict_batch(self, conversations: Sequence[Conversation]) -> Batch:
        """What the processor gives, padded on the left, and `asked`.

        Raises:
            TooLongError: A question is; names the conversation.
        """
        texts = [self.written(each)[0] for each in conversations]
        batch = self._processed(conversations, texts, "left")
        lengths = batch["attention_mask"].sum(1).tolist()
        long = [index for index, length in enumerate(lengths) if length > self.max_length]
        if long:
            reason = (
                f"the question of conversation {conversations[long[0]].id} has "
                f"{lengths[long[0]]:,} tokens: more than max_length {self.max_length:,}"
            )
            raise TooLongError(f"{reason}: shorten it, or raise max_length", reason, long)
        return {
            **{key: value for key, value in batch.items() if key not in TRACES},
            **asked(conversations),
        }

    # The same, of these batches.
    eval_batch = Encoder.eval_batch
    _asked_batch = Encoder._asked_batch

    def written(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The text before images are written out, and the spans that the assistant says.

        Raises:
            ValueError: The text has other numbers of images than the conversation; names it.
        """
        text, spans = spoken(
            self._render,
            harmless(self.tokenizer, conversation.turns),
            self.tokenizer.eos_token or "",
        )
        count = text.count(self.processor.image_token)
        if count != len(conversation.images):
            raise ValueError(
                f"conversation {conversation.id} has {len(conversation.images)} image(s), and the "
                f"chat template writes {count} {self.processor.image_token} for them"
            )
        return text, spans

    def _render(self, turns: Sequence[Turn], ask: bool) -> str:
        messages = [{"role": turn.role, "content": list(_content(turn.text))} for turn in turns]
        return self.processor.apply_chat_template(messages, add_generation_prompt=ask)

    def _processed(
        self, conversations: Sequence[Conversation], texts: Sequence[str], side: str
    ) -> Batch:
        from transformers import BatchFeature

        begin = self.tokenizer.bos_token
        found = self.processor(
            text=list(texts),
            images=[image for each in conversations for image in each.images] or None,
            add_special_tokens=not (begin and texts[0].startswith(begin)),  # templates write it
            padding=True,
            padding_side=side,
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            images_kwargs={"return_tensors": "pt"},
        )
        # Where images were written out to is no numbers, as InternVL's processor takes it to be if
        # the first of several texts has no image.
        return dict(BatchFeature(found, "pt", skip_tensor_conversion=TRACES[1:]))

    def _labels(self, batch: Batch, spans: Sequence[Sequence[Span]]) -> Tensor:
        """The ids of the assistant's tokens, -100 elsewhere: ``[batch, length]``."""
        begins, ends = batch["offset_mapping"].unbind(-1)
        told = torch.zeros_like(begins, dtype=torch.bool)
        for row, (own, replaced) in enumerate(
            zip(spans, batch["text_replacement_offsets"], strict=True)
        ):
            for first, last in ((_moved(place, replaced) for place in span) for span in own):
                told[row] |= (begins[row] < last) & (ends[row] > first)
        told &= batch["attention_mask"].bool() & ~self._images(batch["input_ids"])
        return batch["input_ids"].masked_fill(~told, IGNORED)

    def _images(self, ids: Tensor) -> Tensor:
        """Where the tokens of images are."""
        return torch.isin(ids, torch.tensor([i for i in self.processor.image_token_ids if i]))

    def _cut(self, batch: Batch) -> Batch:
        shape = batch["input_ids"].shape
        return {
            key: value[:, : self.max_length] if value.shape == shape else value
            for key, value in batch.items()
            if key not in TRACES
        }

    def _refuse_empty(self, conversations: Sequence[Conversation], learnt: Sequence[bool]) -> None:
        empty = [index for index, some in enumerate(learnt) if not some]
        if empty:
            reason = (
                f"conversation {conversations[empty[0]].id}: none of its answers begins within "
                f"max_length {self.max_length:,} tokens"
            )
            raise TooLongError(f"{reason}: raise it, or leave it out", reason, empty)


def _content(text: str) -> Iterator[dict[str, str]]:
    """Text and images of a turn, in order; templates write themselves what is between them."""
    pieces = text.split(IMAGE)
    for index, piece in enumerate(pieces):
        if index:
            yield {"type": "image"}
            piece = piece.lstrip("\n")
        piece = piece if index == len(pieces) - 1 else piece.rstrip("\n")
        if piece or len(pieces) == 1:
            yield {"type": "text", "text": piece}


def _moved(place: int, replaced: Sequence[dict[str, Any]]) -> int:
    """Where a place in a text is after images have been written out."""
    lengths = ((each["span"], each["new_span"]) for each in replaced)
    return place + sum(
        (new[1] - new[0]) - (old[1] - old[0]) for old, new in lengths if old[1] <= place
    )


def _shortened(conversation: Conversation) -> Conversation | None:
    """The conversation up to the answer before the last; None if there is none."""
    turns = conversation.question().turns
    while turns and turns[-1].role != ASSISTANT:
        turns = turns[:-1]
    count = sum(turn.text.count(IMAGE) for turn in turns)
    return replace(conversation, turns=turns, images=conversation.images[:count]) if turns else None
