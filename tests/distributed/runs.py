"""Short fits on drawn shapes, by one process or several, and what they leave."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from litflora.adapters.sharded import whole
from litflora.datamodules import ShapesDataModule
from litflora.strategies import FSDP2

from .fsdp1 import OnCPU

STRATEGIES = {
    "single": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "fsdp2": lambda: FSDP2("gloo"),
    "fsdp1": OnCPU,
}


@dataclass
class Left:
    """What a fit leaves.

    Attributes:
        losses: The loss of each step, averaged over processes.
        start: The parameters before it.
        end: The parameters after it, whole.
        trained: Names of those that train.
    """

    losses: list[float] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)

    @property
    def moved(self) -> set[str]:
        return {
            name for name, value in self.end.items() if not torch.equal(value, self.start[name])
        }


class Watch(Callback):
    """Takes down what is left."""

    def __init__(self) -> None:
        self.left = Left()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.left.start = parameters(pl_module)
        self.left.trained = {n for n, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any
    ) -> None:
        loss = outputs["loss"].detach().double().clone()
        if trainer.world_size > 1:
            dist.all_reduce(loss)
        self.left.losses.append(float(loss) / trainer.world_size)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.left.end = parameters(pl_module)


def parameters(module: LightningModule) -> dict[str, Tensor]:
    """Every parameter, whole; all processes must ask for them."""
    return {name: whole(p).clone() for name, p in module.named_parameters()}


def fit(
    module: LightningModule,
    strategy: str,
    folder: Path,
    data: Any = None,
    keep: bool = True,
    **options: Any,
) -> tuple[Left, Trainer]:
    """Fits a module on a CPU, by as many processes as there are.

    Args:
        module: The module.
        strategy: One of `STRATEGIES`.
        folder: Where it leaves files.
        data: A datamodule; None are drawn shapes.
        keep: Take down all parameters before and after.
        options: Of the Trainer, and ``ckpt_path``.
    """
    seed_everything(0, verbose=False)
    watch = Watch()
    world = 1 if strategy == "single" else dist_world()
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": world,
        "strategy": STRATEGIES[strategy](),
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    callbacks = [*([watch] if keep else []), *options.pop("callbacks", [])]
    ckpt_path = options.pop("ckpt_path", None)
    trainer = Trainer(callbacks=callbacks, **{**settings, **options})
    trainer.fit(module, data or shapes(world), ckpt_path=ckpt_path)
    return watch.left, trainer


def shapes(world: int, steps: int = 20, batch: int = 8) -> ShapesDataModule:
    """As many scenes as a number of steps needs, in global batches of one size."""
    sizes = {"train_samples": steps * batch, "val_samples": 19, "test_samples": 19}
    return ShapesDataModule(domain="shifted", img_size=32, batch_size=batch // world, **sizes)


def dist_world() -> int:
    import os

    return int(os.environ.get("WORLD_SIZE", 1))
