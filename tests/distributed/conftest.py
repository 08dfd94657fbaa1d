from pathlib import Path
from typing import Any

import pytest
import worlds
from tiny import save_base

from . import work
from .memory import save_random


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes leave their files."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="session")
def two(base: Path, folder: Path) -> list[dict[str, Any]]:
    """What two processes found, by rank."""
    save_random("vit_base_patch16_224", folder / "big.safetensors")
    return worlds.run(work.everything, base, folder)
