"""Two processes reach what one reaches, whether they share the batch (DDP) or the model (FSDP2)."""

from __future__ import annotations

import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from tiny import save_base

from litflora.adapters import FLoRA, LoRA
from litflora.classification import ClassificationModule

from . import runs

pytestmark = pytest.mark.xdist_group("strategies")

TUNINGS = {"LoRA": LoRA(rank=4), "FLoRA": FLoRA(rank=4)}
BACKBONES = ("test_vit", "convnext_shapes")
CASES = list(product(BACKBONES, TUNINGS))
STEPS = 20


def module(backbone: str, tuning: str, base: Path, **options: Any) -> ClassificationModule:
    vit = {"weights": str(base), "img_size": 32}
    own = vit if backbone == "test_vit" else {"weights": "embedded"}
    return ClassificationModule(backbone, 10, tuning=TUNINGS[tuning], **own, **options)


def work(base: Path) -> dict[Any, Any]:
    """Everything that these tests look at, in one start of processes."""
    found = {}
    for backbone, tuning in CASES:
        for strategy in ("ddp", "fsdp2"):
            with tempfile.TemporaryDirectory() as folder:
                made = module(backbone, tuning, base)
                found[backbone, tuning, strategy], _ = runs.fit(made, strategy, Path(folder))
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def two(base: Path) -> list[dict[Any, Any]]:
    return worlds.run(work, base)


@pytest.mark.parametrize(("backbone", "tuning"), CASES)
def test_two_processes_train_as_one(
    backbone: str, tuning: str, base: Path, two: Any, tmp_path: Path
) -> None:
    one, _ = runs.fit(module(backbone, tuning, base), "single", tmp_path)
    assert len(one.losses) == STEPS
    for strategy in ("ddp", "fsdp2"):
        first, second = (left[backbone, tuning, strategy] for left in two)
        assert first.losses == pytest.approx(one.losses, rel=1e-5), strategy
        assert first.start.keys() == one.start.keys()
        for name, value in one.start.items():
            assert torch.equal(first.start[name], value), name  # the same base, head and deltas
        assert first.moved == first.trained == one.trained
        for name, value in first.end.items():
            assert torch.equal(value, second.end[name]), name
            torch.testing.assert_close(value, one.end[name], atol=1e-4, rtol=1e-3)
