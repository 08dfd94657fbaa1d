"""Small data sets of visual question answering: VQA-RAD and easy-VQA."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from .conversation_files import ConversationFilesDataModule, Read
from .questions import SHORT, YES_NO, Question, Questions, questions_of
from .records import read_json


class VQARADDataModule(ConversationFilesDataModule):
    """VQA-RAD (Lau et al., 2018): questions of clinicians about radiology images.

    `root` holds `VQA_RAD Dataset Public.json` and `VQA_RAD Image Folder/`. Test questions are those
    whose `phrase_type` says so; many are about images that training has questions of, too. There is
    no validation split.
    """

    ending = SHORT

    def sources(self) -> Mapping[str, Read]:
        """The splits "train" and "test"."""
        return {name: partial(self._questions, name == "test") for name in ("train", "test")}

    def _questions(self, test: bool) -> Questions:
        path = self.root / "VQA_RAD Dataset Public.json"

        def question(row: Any) -> Question | None:
            if row["phrase_type"].startswith("test") != test:
                return None
            closed = row["answer_type"].strip().upper() == "CLOSED"
            # Some answers are numbers.
            answer = str(row["answer"]).strip()
            return Question(str(row["qid"]), row["question"], answer, row["image_name"], (), closed)

        found = questions_of(path, read_json(path), question)
        return Questions(found, self.root / "VQA_RAD Image Folder", self.ending)


class EasyVQADataModule(ConversationFilesDataModule):
    """easy-VQA: questions about one drawn shape, with thirteen answers.

    `root` holds `{train,test}/questions.json` and `{train,test}/images/`. There is no validation
    split. Questions to be answered by yes or no are closed.
    """

    ending = SHORT

    def sources(self) -> Mapping[str, Read]:
        """The splits "train" and "test"."""
        return {name: partial(self._questions, name) for name in ("train", "test")}

    def _questions(self, split: str) -> Questions:
        path = self.root / split / "questions.json"

        def question(numbered: tuple[int, Any]) -> Question:
            number, (text, answer, image) = numbered
            closed = answer in YES_NO
            return Question(f"{split}/{number}", text, answer, f"{image}.png", (), closed)

        found = questions_of(path, enumerate(read_json(path)), question)
        return Questions(found, self.root / split / "images", self.ending)
