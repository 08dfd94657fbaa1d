"""JSON files: whole ones, and long lists of records of which only the places are kept in memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

SPACE = re.compile(r"\s*")
CHUNK = 1 << 16  # bytes that are read at a time

Found = tuple[Any, str, int, int]  # a record, its name, its first byte and the one after its last


def check_file(path: Path) -> None:
    """Raises if there is no such file."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing (set data.init_args.root to the data set's own folder)"
        )


def read_json(path: Path) -> Any:
    """What a JSON file holds; one that is missing or no JSON is named."""
    check_file(path)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as reason:
        raise ValueError(f"{path} is no JSON: {reason}") from reason


class Records(Sequence[dict[str, Any]]):
    """The records of a JSON list, or of a file of one JSON object a line, read when asked for.

    The file is gone through once, in pieces. In memory stay two numbers of each record, however
    long the file: pictures, texts and parsed objects do not.

    Args:
        path: A ``.jsonl`` file, or any other name for a JSON list.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON, no list, or holds something else than objects; it names the file
            and the record, which count from 1.
    """

    def __init__(self, path: Path) -> None:
        check_file(path)
        self.path = path
        found = _lines(path) if path.suffix.lower() == ".jsonl" else _elements(path)
        self.places = np.array([_place(path, *each) for each in found], np.int64)
        if not len(self.places):
            raise ValueError(f"{path} holds no records")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        begin, end = self.places[index].tolist()
        with self.path.open("rb") as file:
            file.seek(begin)
            return json.loads(file.read(end - begin))


def _place(path: Path, record: Any, name: str, begin: int, end: int) -> tuple[int, int]:
    if not isinstance(record, dict):
        raise ValueError(f"{path}, {name} is no object {{...}}, but {type(record).__name__}")
    return begin, end


def _lines(path: Path) -> Iterator[Found]:
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            begin, end = end, end + len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as reason:
                raise ValueError(f"{path}, line {number} is no JSON: {reason}") from reason
            yield record, f"line {number}", begin, end


def _elements(path: Path) -> Iterator[Found]:
    with path.open("rb") as file:
        text, number = _Text(file), 0
        try:
            if text.peek() != "[":
                raise ValueError("it does not begin with [")
            while text.peek() == ("," if number else "["):
                text.skip(1)
                if text.peek() == "]" and not number:
                    break
                number, begin = number + 1, text.place
                record = text.value()
                yield record, f"record {number}", begin, text.place
            text.close()
        except (ValueError, RecursionError) as reason:
            raise ValueError(
                f"{path} is no JSON list of records: {reason}, at record {number or 1} (one JSON "
                "object a line is read from files named .jsonl)"
            ) from reason


class _Text:
    """UTF-8 text that is read from a file in pieces, and forgotten once it is behind.

    Attributes:
        place: Byte of the file that the reading is at.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.place = 0
        self.text, self.at = "", 0
        self.decode = codecs.getincrementaldecoder("utf-8")().decode

    def peek(self) -> str:
        """Goes to the next character that is no space, and gives it; nothing at the end."""
        while True:
            self.skip(SPACE.match(self.text, self.at).end() - self.at)  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._read():
                return self.text[self.at : self.at + 1]

    def skip(self, count: int) -> None:
        """Goes on by a number of characters."""
        passed = self.text[self.at : self.at + count]
        self.place += len(passed) if passed.isascii() else len(passed.encode())
        self.at += count

    def value(self) -> Any:
        """Goes past one value, and gives it."""
        while True:
            try:
                found, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as reason:
                if not self._read():  # it was cut in two no longer
                    raise ValueError(reason.msg) from reason
            else:
                self.skip(end - self.at)
                return found

    def close(self) -> None:
        """Raises unless only the end of the list is left."""
        if self.peek() != "]":
            raise ValueError("no , and no ] after it")
        self.skip(1)
        if self.peek():
            raise ValueError("more comes after its ]")

    def _read(self) -> bool:
        """Reads as much as is in hand, so that long values are not tried many times over."""
        rest = self.text[self.at :]
        read = self.file.read(max(CHUNK, len(rest)))
        self.text, self.at = rest + self.decode(read, final=not read), 0
        return bool(read)
