"""What only a GPU can show: sharded runs on one device, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from safetensors.torch import load_file
from tiny import trainer

from litflora import ClassificationModule
from litflora.adapters import FLoRA
from litflora.callbacks import AdapterFolder
from litflora.datamodules import ShapesDataModule
from litflora.strategies import FSDP1, FSDP2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def fit(folder: Path, strategy: Any, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The last loss, and the adapter that is left."""
    seed_everything(0)
    own = {"activation_checkpointing": options.pop("checkpointing", "none")}
    made = ClassificationModule(
        "convnext_shapes", 10, weights="embedded", tuning=FLoRA(rank=4), **own
    )
    data = ShapesDataModule(train_samples=200, val_samples=50, batch_size=20)
    device = {"accelerator": "gpu", "devices": 1, "strategy": strategy}
    run = trainer(folder, callbacks=[AdapterFolder()], **device, **options)
    run.fit(made, data)
    left = load_file(folder / "adapter" / "adapter_model.safetensors")
    return float(run.callback_metrics["train/loss"]), left


@pytest.mark.parametrize("strategy", [FSDP1, FSDP2])
def test_a_sharded_run_on_one_device_is_the_plain_one(strategy: Any, tmp_path: Path) -> None:
    loss, plain = fit(tmp_path / "plain", "auto")
    other, sharded = fit(tmp_path / "sharded", strategy())
    assert other == pytest.approx(loss, rel=1e-3)
    assert sharded.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(sharded[key], value, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("strategy", [FSDP1, FSDP2])
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_mixed_precision_learns(strategy: Any, checkpointing: str, tmp_path: Path) -> None:
    options = {"precision": "bf16-mixed", "max_epochs": 3, "checkpointing": checkpointing}
    loss, left = fit(tmp_path, strategy(), **options)
    assert loss < 2.3
    assert all(value.isfinite().all() for value in left.values())
