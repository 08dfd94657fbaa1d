"""VQAv2 and GQA: many questions about photos."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .conversation_files import ConversationFilesDataModule, Read
from .questions import SHORT, Question, Questions, questions_of
from .records import read_json


class VQAv2DataModule(ConversationFilesDataModule):
    """VQAv2 (Goyal et al., arXiv:1612.00837): questions about COCO's photos, ten answers each.

    `root` holds `v2_OpenEnded_mscoco_{train2014,val2014}_questions.json`,
    `v2_mscoco_{train2014,val2014}_annotations.json`, `train2014/` and `val2014/`. Validation stands
    in for the test split, whose answers are not public; those of
    `v2_OpenEnded_mscoco_test2015_questions.json` and `test2015/`, where they are, are predicted.
    """

    ending = SHORT

    def sources(self) -> Mapping[str, Read]:
        """The splits "train" and "val", and "predict" if its file is there."""
        names = {"train": "train2014", "val": "val2014"}
        if self._listing("test2015").is_file():
            names["predict"] = "test2015"
        return {split: partial(self._questions, name) for split, name in names.items()}

    def _listing(self, name: str) -> Path:
        return self.root / f"v2_OpenEnded_mscoco_{name}_questions.json"

    def _questions(self, name: str) -> Questions:
        path = self._listing(name)
        answers = {} if name == "test2015" else self._answers(name)

        def question(row: Any) -> Question:
            own, image = row["question_id"], f"COCO_{name}_{row['image_id']:012d}.jpg"
            if name == "test2015":
                return Question(str(own), row["question"], None, image)
            if own not in answers:
                raise ValueError(f"question {own} has no answers in the annotations")
            return Question(str(own), row["question"], answers[own][0], image, *answers[own][1:])

        found = questions_of(path, _rows(path, "questions"), question)
        return Questions(found, self.root / name, self.ending)

    def _answers(self, name: str) -> dict[int, tuple[str, tuple[str, ...], bool]]:
        """The most common answer to each question, those of ten people, whether it is closed."""
        path = self.root / f"v2_mscoco_{name}_annotations.json"
        found = {}
        for row in _rows(path, "annotations"):
            try:
                people = tuple(given["answer"] for given in row["answers"])
                closed = row["answer_type"] == "yes/no"
                found[row["question_id"]] = (row["multiple_choice_answer"], people, closed)
            except (KeyError, TypeError) as reason:
                raise ValueError(f"{path}: an annotation has no {reason}: {row!r:.80}") from None
        return found


class GQADataModule(ConversationFilesDataModule):
    """GQA (Hudson and Manning, arXiv:1902.09506), its balanced questions about photos.

    `root` holds `{train,val,testdev}_balanced_questions.json` and `images/`; testdev is the test
    split. Questions that are not of the structure "query" are closed, as in GQA's own evaluation.
    """

    ending = SHORT

    def sources(self) -> Mapping[str, Read]:
        """The splits "train", "val" and "test"."""
        names = {"train": "train", "val": "val", "test": "testdev"}
        return {split: partial(self._questions, name) for split, name in names.items()}

    def _questions(self, name: str) -> Questions:
        path = self.root / f"{name}_balanced_questions.json"

        def question(entry: tuple[str, Any]) -> Question:
            own, row = entry
            closed = row["types"]["structural"] != "query"
            image = f"{row['imageId']}.jpg"
            return Question(own, row["question"], row["answer"], image, (), closed)

        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no object of questions by their ids")
        found = questions_of(path, content.items(), question)
        return Questions(found, self.root / "images", self.ending)


def _rows(path: Path, key: str) -> list[Any]:
    content = read_json(path)
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path} has no list {key!r}")
    return rows
