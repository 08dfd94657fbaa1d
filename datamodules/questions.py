"""Data sets of questions about images: each question is a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .conversations import ASSISTANT, IMAGE, USER, Conversation, Turn

# The endings of LLaVA-1.5's questions (Liu et al., arXiv:2310.03744), which ask for a form.
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
YES_NO = ("yes", "no")


class Question(NamedTuple):
    """A question, its answer, and its image.

    Attributes:
        id: The data set's own, or the question's place in its file.
        text: The question.
        answer: What is to be learnt; None is unknown.
        image: Path of the image, None without.
        accepted: All answers that count as right; none are ``answer``.
        closed: Whether the answer is one of few, as yes or no; None is unknown.
    """

    id: str
    text: str
    answer: str | None
    image: str | None
    accepted: tuple[str, ...] = ()
    closed: bool | None = None


class Questions(Sequence[Conversation]):
    """Questions as conversations, made when asked for.

    Args:
        questions: In order.
        folder: What the paths of images start from.
        ending: What each question ends with.
    """

    def __init__(self, questions: Sequence[Question], folder: Path, ending: str) -> None:
        self.questions = questions
        self.folder = folder
        self.ending = ending

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: Any) -> Any:
        own, text, answer, image, accepted, closed = self.questions[index]
        mark = "" if image is None else f"{IMAGE}\n"
        asked = Turn(USER, f"{mark}{text}{self.ending}")
        turns = (asked,) if answer is None else (asked, Turn(ASSISTANT, answer))
        images = () if image is None else (self.folder / image,)
        return Conversation(own, turns, images, accepted, closed)


def questions_of(
    path: Path, rows: Iterable[Any], make: Callable[[Any], Question | None]
) -> list[Question]:
    """The questions that are made of a file's entries; those of which none is made are left out.

    Raises:
        ValueError: An entry lacks something, or there are no questions; names file and entry.
    """
    made = []
    for number, row in enumerate(rows, 1):
        try:
            made.append(make(row))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as reason:
            said = f"it has no {reason}" if isinstance(reason, KeyError) else str(reason)
            raise ValueError(
                f"{path}: entry {number} is not of its data set's form: {said}"
            ) from None
    found = [question for question in made if question is not None]
    if not found:
        raise ValueError(f"{path} has no questions of this split")
    return found
