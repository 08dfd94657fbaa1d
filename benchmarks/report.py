"""What the tables have in common: their form, and a line about the machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from litflora.adapters.measured import device_name
from litflora.adapters.replacing import replacing


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def ratio(value: float, base: float | None) -> str:
    return "" if base is None else f"{value / base:.2f}"


def about(device: str, precision: str, repetitions: int) -> str:
    """Types, machine and number of turns."""
    return f"{precision}, {device_name(torch.device(device))}, medians of {repetitions}"


def write(path: Path, text: str) -> None:
    """Puts a text in its place at once."""
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")
