from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from filelock import FileLock
from tiny import save_base

from . import work
from .memory import save_random


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where two processes leave their files, for all of pytest's workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "two"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def two(folder: Path) -> list[dict[str, Any]]:
    """What two processes found, by rank; they are started by the worker that asks first."""
    found = folder / "found.pt"
    with FileLock(folder / "lock"):
        if not found.is_file():
            save_random("vit_base_patch16_224", folder / "big.safetensors")
            torch.save(worlds.run(work.everything, save_base(folder), folder), found)
    return torch.load(found, weights_only=False)


@pytest.fixture(scope="session")
def base(folder: Path, two: Any) -> Path:
    """The weights that they had."""
    return folder / "test_vit.safetensors"
