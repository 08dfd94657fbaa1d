"""What a run depends on besides its config: files, libraries, the device."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ... import __version__

_LIBRARIES = ("torchvision", "timm", "lightning")


def environment(accelerator: str | None) -> dict[str, Any]:
    """The libraries that compute a run, and the device.

    Args:
        accelerator: The trainer's.
    """
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else platform.machine()
    # torch's own version says which CUDA it was built for, too.
    libraries = {"torch": torch.__version__, **{name: version(name) for name in _LIBRARIES}}
    return {"litflora": __version__, "libraries": libraries, "device": device}


class Versions:
    """The version of every file and folder that configs name: the data, the base's weights.

    Of a file it is its contents. Of a folder it is names, sizes and times: what is in a large data
    set would take longer to read than to train on. Each is looked at once.

    Args:
        out: The folder that the compare writes to, which is left out.
    """

    def __init__(self, out: Path) -> None:
        self._out = out.resolve()
        self._known: dict[str, str] = {}

    def of(self, config: Any) -> dict[str, str]:
        """By name, the version of what a config names and what is there."""
        named = {value for value in values(config) if isinstance(value, str)}
        there = (name for name in sorted(named) if os.path.exists(os.path.expanduser(name)))
        return {name: self._version(name) for name in there}

    def _version(self, name: str) -> str:
        if name not in self._known:
            path = Path(name).expanduser()
            self._known[name] = self._folder(path) if path.is_dir() else _file(path)
        return self._known[name]

    def _folder(self, folder: Path) -> str:
        digest = hashlib.sha256()
        for file in sorted(self._below(folder)):
            try:
                status = os.stat(file)
            except OSError:  # a link to nothing, or just removed
                continue
            line = f"{os.path.relpath(file, folder)} {status.st_size} {status.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()[:12]

    def _below(self, folder: Path) -> Iterator[Path]:
        """All files but hidden ones and the compare's own."""
        for root, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if self._counts(Path(root, name))]
            yield from (Path(root, name) for name in names if not name.startswith("."))

    def _counts(self, folder: Path) -> bool:
        return not folder.name.startswith(".") and folder.resolve() != self._out


def _file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except OSError:
        return "unreadable"


def values(config: Any) -> Iterator[Any]:
    """All values of a config, however deep."""
    if isinstance(config, dict | list):
        for value in config.values() if isinstance(config, dict) else config:
            yield from values(value)
    else:
        yield config
