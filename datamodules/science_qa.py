"""ScienceQA: school questions with choices, half of them about an image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from string import ascii_uppercase
from typing import Any

from .base import SPLITS
from .conversation_files import ConversationFilesDataModule, Read
from .questions import LETTER, Question, Questions, questions_of
from .records import read_json


class ScienceQADataModule(ConversationFilesDataModule):
    """ScienceQA (Lu et al., arXiv:2209.09513): the answer is the letter of a choice.

    `root` holds `problems.json`, `pid_splits.json` and `images/<split>/<problem>/`. Hints come
    before the question.
    """

    ending = LETTER

    def sources(self) -> Mapping[str, Read]:
        """The splits "train", "val" and "test"."""
        return {name: partial(self._questions, name) for name in SPLITS}

    @cached_property
    def _problems(self) -> Any:
        return read_json(self.root / "problems.json")

    def _questions(self, split: str) -> Questions:
        path = self.root / "pid_splits.json"

        def question(own: str) -> Question:
            if own not in self._problems:
                raise ValueError(f"problem {own} is not in problems.json")
            row = self._problems[own]
            letters = ascii_uppercase[: len(row["choices"])]
            choices = [f"{a}. {text}" for a, text in zip(letters, row["choices"], strict=True)]
            text = "\n".join([*filter(None, [row["hint"]]), row["question"], *choices])
            image = f"{split}/{own}/{row['image']}" if row["image"] else None
            return Question(own, text, letters[row["answer"]], image, (), True)

        listed = read_json(path)
        if not isinstance(listed, dict) or not isinstance(listed.get(split), list):
            raise ValueError(f"{path} has no list {split!r} of problems")
        found = questions_of(path, listed[split], question)
        return Questions(found, self.root / "images", self.ending)
