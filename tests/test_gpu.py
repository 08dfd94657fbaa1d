"""What only a GPU can show: sharded runs on one device, and what they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
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


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Adds one."""
        self.seen.append(float(outputs["loss"]))


def fit(folder: Path, strategy: Any, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of all steps, and the adapter that is left."""
    seed_everything(0)
    own = {"activation_checkpointing": options.pop("checkpointing", "none")}
    made = ClassificationModule(
        "convnext_shapes", 10, weights="embedded", tuning=FLoRA(rank=4), **own
    )
    data = ShapesDataModule(train_samples=200, val_samples=50, batch_size=20)
    device = {"accelerator": "gpu", "devices": 1, "strategy": strategy}
    losses = Losses()
    run = trainer(folder, callbacks=[AdapterFolder(), losses], **device, **options)
    run.fit(made, data)
    left = load_file(folder / "adapter" / "adapter_model.safetensors")
    return losses.seen, left


@pytest.mark.parametrize("strategy", [FSDP1, FSDP2])
def test_a_sharded_run_on_one_device_is_the_plain_one(strategy: Any, tmp_path: Path) -> None:
    losses, plain = fit(tmp_path / "plain", "auto")
    others, sharded = fit(tmp_path / "sharded", strategy())
    assert others == pytest.approx(losses, rel=1e-3)
    assert sharded.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(sharded[key], value, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("strategy", [FSDP1, FSDP2])
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_mixed_precision_learns(strategy: Any, checkpointing: str, tmp_path: Path) -> None:
    """The mean loss of the last epoch is well below that of the first."""
    options = {"precision": "bf16-mixed", "max_epochs": 3, "checkpointing": checkpointing}
    losses, left = fit(tmp_path, strategy(), **options)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert all(value.isfinite().all() for value in left.values())
