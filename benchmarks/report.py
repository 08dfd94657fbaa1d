"""What the tables have in common: their form, and a line about the machine."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def ratio(value: float, base: float | None) -> str:
    return "" if base is None else f"{value / base:.2f}"


def about(device: str, precision: str, repetitions: int) -> str:
    """Types, machine and number of turns."""
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        count = torch.get_num_threads()
        machine = f"{processor()} with {count} thread{'s' if count > 1 else ''}"
    return f"{precision}, {machine}, medians of {repetitions}"


def processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name: Linux keeps it in a file, other systems tell Python."""
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def write(path: Path, text: str) -> None:
    """Puts a text in its place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(text + "\n")
    os.replace(path.with_suffix(".tmp"), path)
