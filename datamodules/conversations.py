"""Conversations about images: what every datamodule of visual instruction tuning yields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

IMAGE = "<image>"
SYSTEM, USER, ASSISTANT = ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        text: What it says; each ``<image>`` in it stands for the next image.
    """

    role: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """Turns of a user and an assistant about images.

    Attributes:
        id: Names it in messages and predictions.
        turns: In order; the first may be the system's.
        images: One for each ``<image>``, in order: a file, or uint8 ``[3, H, W]``.
        answers: All answers that count as right for the last turn; none are that turn's own text.
        closed: Whether the answer is one of few, as yes or no; None is unknown.
        files: Names of the files that images have been read from.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str | Path | Tensor, ...] = ()
    answers: tuple[str, ...] = field(default=())
    closed: bool | None = None
    files: tuple[str, ...] = ()

    def check(self, answered: bool = True) -> None:
        """Raises unless it can be trained on.

        Args:
            answered: Whether somebody must answer; else there must be something to ask.

        Raises:
            ValueError: A role is unknown, nobody answers, turns do not take turns, a text is none,
                or images and their marks differ in number; it names the conversation.
        """
        for turn in self.turns:
            if turn.role not in ROLES:
                raise ValueError(
                    f"conversation {self.id}: role {turn.role!r} is none of {', '.join(ROLES)}"
                )
            if any("\ud800" <= letter <= "\udfff" for letter in turn.text):
                raise ValueError(
                    f"conversation {self.id} holds half a character (a lone surrogate): mend it"
                )
        roles = [turn.role for turn in self.turns]
        if answered and ASSISTANT not in roles:
            raise ValueError(f"conversation {self.id} has no assistant turn: nothing to learn")
        if not answered and USER not in roles:
            raise ValueError(f"conversation {self.id} has no user turn: nothing to answer")
        self._check_order(roles[1:] if roles[:1] == [SYSTEM] else roles)
        marks = sum(turn.text.count(IMAGE) for turn in self.turns)
        if marks != len(self.images):
            raise ValueError(
                f"conversation {self.id} has {marks} {IMAGE} in its text, and "
                f"{len(self.images)} image(s): write {IMAGE} once for each image, where it belongs"
            )

    def _check_order(self, roles: list[str]) -> None:
        """Raises unless user and assistant take turns: chat templates ask for nothing else."""
        expected = [(USER, ASSISTANT)[number % 2] for number in range(len(roles))]
        for number, (role, due) in enumerate(zip(roles, expected, strict=True), 1):
            if role != due:
                raise ValueError(
                    f"conversation {self.id}: turn {number} is the {role}'s, and the {due} is due: "
                    "user and assistant take turns, after a system's first"
                )

    def asks(self) -> list[int]:
        """How many turns come before each answer; of one that ends with a question, all turns."""
        if self.turns[-1].role == USER:
            return [len(self.turns)]
        return [place for place, turn in enumerate(self.turns) if turn.role == ASSISTANT]

    def until(self, place: int) -> Conversation:
        """What is said before a turn and in it, as a conversation of its own."""
        if place >= len(self.turns) - 1:
            return self
        turns = self.turns[: place + 1]
        count = sum(turn.text.count(IMAGE) for turn in turns)
        return Conversation(self.id, turns, self.images[:count], files=self.files[:count])

    def question(self) -> Conversation:
        """Everything before the last answer."""
        last = max(i for i, turn in enumerate(self.turns) if turn.role == ASSISTANT)
        turns = self.turns[:last]
        count = sum(turn.text.count(IMAGE) for turn in turns)
        return Conversation(self.id, turns, self.images[:count], files=self.files[:count])

    def accepted(self) -> tuple[str, ...]:
        """The answers that count as right for the last turn."""
        return self.answers or (
            next(turn.text for turn in reversed(self.turns) if turn.role == ASSISTANT),
        )
