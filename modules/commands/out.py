"""The file that a command writes, and when it may."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_force(parser: argparse.ArgumentParser) -> None:
    """Adds the option that lets a file be overwritten."""
    parser.add_argument("--force", action="store_true", help="overwrite FILE")


def check(out: Path, force: bool) -> None:
    """Raises if the file cannot be written, or is there and must not be overwritten."""
    if not out.name or out.is_dir():
        raise IsADirectoryError(f"--out {str(out)!r} is no file name: give one that is free")
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists already: give another name, or --force")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write to: make it first")
