"""Conversations that are too long: left out of training, and unanswered in an evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..datamodules.conversations import ASSISTANT, USER, Conversation, Turn

Make = Callable[[Sequence[Conversation]], dict[str, Any]]

# So short that it has room wherever anything has.
STAND_IN = Conversation("stand-in", (Turn(USER, "?"), Turn(ASSISTANT, ".")))


class TooLongError(ValueError):
    """Conversations have more tokens than there is room for.

    Attributes:
        reason: The message without what to do about it.
        which: Indices of the conversations in the batch.
    """

    def __init__(self, message: str, reason: str = "", which: Sequence[int] = (0,)) -> None:
        """A loader's process hands on the message alone, so the rest may be left out."""
        super().__init__(message)
        self.reason = reason or message
        self.which = which


class LengthGuard:
    """Keeps conversations that are too long from ending a run, and warns of the first.

    What it remembers is in shared memory: processes that load warn once between them.
    """

    def __init__(self) -> None:
        self.warned = {
            stage: torch.zeros(1, dtype=torch.bool).share_memory_() for stage in ("train", "eval")
        }

    def leave_out(self, make: Make, conversations: Sequence[Conversation]) -> dict[str, Any]:
        """A batch of the conversations that there is room for.

        Raises:
            TooLongError: There is none.
        """
        try:
            return make(conversations)
        except TooLongError as error:
            kept = [each for index, each in enumerate(conversations) if index not in error.which]
            if not kept:
                raise
            done = "it is left out of training, as all such are; a higher max_length keeps it"
            self._warn("train", f"{error.reason}: {done}")
            return self.leave_out(make, kept)

    def stand_in(
        self, make: Make, conversations: Sequence[Conversation], counts: str
    ) -> tuple[dict[str, Any], Sequence[int]]:
        """A batch with something short in place of what is too long, and where in it that is.

        Rows stay where they are, and every process has some to run. ``counts`` says for the warning
        how what is too long counts.

        Raises:
            TooLongError: Even that is too long.
        """
        try:
            return make(conversations), []
        except TooLongError as error:
            short = [
                STAND_IN if index in error.which else each
                for index, each in enumerate(conversations)
            ]
            try:
                batch = make(short)
            except TooLongError:
                raise error from None
            done = f"it counts as {counts}, as all such do; a higher max_length mends it"
            self._warn("eval", f"{error.reason}: {done}")
            return batch, error.which

    def _warn(self, stage: str, message: str) -> None:
        if not self.warned[stage]:
            self.warned[stage].fill_(True)
            warnings.warn(message, stacklevel=2)


def each_that_fits(
    make: Callable[[Conversation], Any], conversations: Sequence[Conversation]
) -> list[Any]:
    """What is made of each conversation.

    Raises:
        TooLongError: Some are too long: it has the message of the first, and the indices of all.
    """
    made, refused = [], {}
    for index, each in enumerate(conversations):
        try:
            made.append(make(each))
        except TooLongError as error:
            refused[index] = error
    if refused:
        first = next(iter(refused.values()))
        raise TooLongError(str(first), first.reason, tuple(refused))
    return made
