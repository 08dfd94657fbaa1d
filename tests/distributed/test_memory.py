"""What memory a process needs that holds a half of a model, measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import worlds

from .memory import save_random, sharded_memory

GIANT = "vit_giant_patch14_224"


@pytest.mark.xdist_group("distributed")
def test_saving_gathers_what_is_trained(two: Any) -> None:
    for rank in two:
        found = rank["memory"]
        assert found["adapter"] < found["base"] / 2
        assert found["checkpoint"] < found["base"] / 4
    # The same count of what gathers all shows that it would be seen.
    assert two[0]["memory"]["everything"] > 0.9 * two[0]["memory"]["base"]


@pytest.mark.xdist_group("distributed")
def test_no_process_builds_the_whole_model(two: Any) -> None:
    for rank in two:
        assert rank["memory"]["build"] < 0.6 * rank["memory"]["base"]


@pytest.mark.slow
def test_a_billion_parameters(tmp_path: Path) -> None:
    """A ViT-giant in two processes: neither needs 60 % of it to be built, nor half to be saved."""
    if shutil.disk_usage(tmp_path).free < 6e9:
        pytest.skip("needs 6 GB of disk")
    file = tmp_path / "giant.safetensors"
    save_random(GIANT, file)
    for rank in worlds.run(_work, file, tmp_path):
        print({key: f"{count / 1e6:,.0f} MB" for key, count in rank.items()})
        assert rank["base"] > 4e9
        assert rank["build"] < 0.6 * rank["base"]
        assert max(rank["adapter"], rank["checkpoint"]) < rank["base"] / 2


def _work(file: Path, folder: Path) -> dict[str, int]:
    return sharded_memory(GIANT, file, folder, side=28)
