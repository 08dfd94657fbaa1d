"""Your own conversations about images, in LLaVA's JSON format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .base import SPLITS
from .conversation_files import ConversationFilesDataModule, Read
from .conversations import ASSISTANT, SYSTEM, USER, Conversation, Turn
from .records import Records, check_file

# Who speaks, in LLaVA's files and in those of others that took over its format.
SPEAKERS = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "system": SYSTEM}


class LlavaDataModule(ConversationFilesDataModule):
    r"""Conversations in LLaVA's format (Liu et al., arXiv:2304.08485).

    A file is a JSON list, or has one record a line if its name ends with ``.jsonl``::

        {"id": "1", "image": "photos/1.jpg", "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A cat."}]}

    ``image`` may be a list of images, or missing; each ``<image>`` in the turns stands for the next
    of them. Every record is checked before training. Files may be large: of each record its place
    in the file is kept, and the record read again when its turn comes.

    Args:
        root: The folder that all other paths start from, those of images too.
        train_file: Conversations to train on.
        val_file: Those to validate on; without it some training images are held out.
        test_file: Those to test on; without it validation stands in.
        predict_file: Those to predict, answered or not; without it those of the test.
        options: `batch_size` to `pack` of `ConversationFilesDataModule`.
    """

    def __init__(
        self,
        root: str,
        train_file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        given = (train_file, val_file, test_file, predict_file)
        files = zip((*SPLITS, "predict"), given, strict=True)
        self.files = {name: self.root / file for name, file in files if file is not None}
        for path in self.files.values() if self.predict_root is None else ():
            check_file(path)

    def sources(self) -> Mapping[str, Read]:
        """The splits that have a file."""
        return {
            name: partial(LlavaFile, path, self.root, answered=name != "predict")
            for name, path in self.files.items()
        }


class LlavaFile(Sequence[Conversation]):
    """The conversations of a file in LLaVA's format, each read and checked when asked for.

    Args:
        path: The file.
        root: What the paths of images start from.
        answered: Whether the assistant must speak in each.
    """

    def __init__(self, path: Path, root: Path, answered: bool = True) -> None:
        self.path = path
        self.root = root
        self.answered = answered
        self.records = Records(path)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        record = self.records[index]
        try:
            own = str(record.get("id", index + 1))
            images = tuple(self.root / name for name in _names(record.get("image"), own))
            conversation = Conversation(own, _turns(record.get("conversations"), own), images)
            conversation.check(self.answered)
        except ValueError as reason:
            raise ValueError(f"{self.path}: {reason}") from reason
        return conversation


def _names(given: Any, own: str) -> list[str]:
    names = given if isinstance(given, list) else [given] if given else []
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"conversation {own}: image is {given!r}, neither a path nor a list")
    return names


def _turns(given: Any, own: str) -> tuple[Turn, ...]:
    if not isinstance(given, list):
        raise ValueError(
            f"conversation {own} has no list conversations: "
            '[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]'
        )
    return tuple(_turn(turn, own) for turn in given)


def _turn(given: Any, own: str) -> Turn:
    speaker, value = (
        (given.get("from"), given.get("value")) if isinstance(given, dict) else (None, None)
    )
    if not isinstance(speaker, str) or not isinstance(value, str):
        raise ValueError(f"conversation {own}: turn {given!r} needs texts 'from' and 'value'")
    if speaker not in SPEAKERS:
        raise ValueError(f"conversation {own}: from {speaker!r} is none of {', '.join(SPEAKERS)}")
    return Turn(SPEAKERS[speaker], value)
