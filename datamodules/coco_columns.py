"""What all rows of a COCO file say under one key, checked for its kind."""

from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .records import read_json

Content = dict[str, list[dict[str, Any]]]
_KINDS = {int: "whole number", str: "text", Hashable: "number"}


def read_content(path: Path, of: str, lists: Sequence[str]) -> Content:
    """A COCO file with lists of rows, none of which but the annotations may be empty.

    Args:
        path: The JSON file.
        of: What it is about, for messages.
        lists: What must be in it.
    """
    content = read_json(path)
    for kind in lists:
        rows = content.get(kind) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} is no COCO file of {of}: it has no list {kind!r}")
        if not rows and kind != "annotations":
            raise ValueError(f"{path} has no {kind}")
    return content


def column(content: Content, list_name: str, key: str, kind: type = object) -> list[Any]:
    """The values of a key in all rows of a list.

    Raises:
        ValueError: If a row has no such key, or a value of another kind.
    """
    rows = content[list_name]
    lacking = [index for index, row in enumerate(rows) if key not in row]
    if lacking:
        raise ValueError(
            f"{len(lacking)} {list_name} have no {key!r}: number {lacking[0]} counted from 0"
        )
    values = [row[key] for row in rows]
    strange = [value for value in values if not isinstance(value, kind)]
    if strange:
        raise ValueError(f"{key} {strange[0]!r} of the {list_name} is no {_KINDS[kind]}")
    return values


def ids_of(content: Content, list_name: str) -> list[int]:
    """The ids of all rows, each of which is there once."""
    ids = column(content, list_name, "id", int)
    check_unique(ids, f"ids stand for two {list_name}")
    return ids


def check_unique(values: Sequence[Any], said: str) -> None:
    """Raise if a value is there twice."""
    twice = [each for each, count in Counter(values).items() if count > 1]
    if twice:
        shown = ", ".join([*map(str, twice[:5]), *(["..."] if len(twice) > 5 else [])])
        raise ValueError(f"{len(twice)} {said}: {shown}")


def numbers(values: Sequence[Any], name: str) -> NDArray[np.float64]:
    """Values as an array; raise if one of them is none."""
    try:
        return np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError) as reason:
        raise ValueError(f"{name} is no number") from reason
