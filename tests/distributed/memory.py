"""The memory of processes that share a model out, as Linux counts it, mapped files included."""

from __future__ import annotations

import ctypes
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from litflora.adapters import LoRA, save
from litflora.classification import ClassificationModule
from litflora.datamodules import ShapesDataModule

from . import runs

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


class Growth:
    """Bytes that the process needed at the most, above what it had when it began to count."""

    peak: int = 0


@contextmanager
def growth() -> Iterator[Growth]:
    """Counts what is needed inside."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free counts when it is used again
    RESET.write_text("5")  # forgets the highest so far
    before, found = _bytes("VmRSS"), Growth()
    yield found
    found.peak = max(0, _bytes("VmHWM") - before)


def _bytes(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def sharded_memory(name: str, file: Path, folder: Path, side: int = 224) -> dict[str, int]:
    """Builds a model from a file, takes a step, and saves it, under FSDP2.

    Args:
        name: A timm model.
        file: Its weights.
        folder: Where it is saved.
        side: Side of the images in pixels.

    Returns:
        The bytes of the file, and what memory grew by.
    """
    watch = _Saving()
    made = _Watched(name, 10, tuning=LoRA(rank=4), weights=str(file))
    data = ShapesDataModule(img_size=side, batch_size=1, train_samples=2, val_samples=2)
    runs.fit(made, "fsdp2", folder, data, callbacks=[watch], keep=False)
    return {"base": file.stat().st_size, "build": made.grown, **watch.grown}


class _Watched(ClassificationModule):
    grown = 0

    def configure_model(self) -> None:
        with growth() as building:
            super().configure_model()
        self.grown = building.peak


class _Saving(Callback):
    def __init__(self) -> None:
        self.grown: dict[str, int] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        with growth() as adapter:
            save(pl_module.net, folder / "adapter")
        with growth() as checkpoint:
            trainer.save_checkpoint(folder / "all.ckpt")
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        with growth() as everything:  # what Lightning's own strategy gathers
            get_model_state_dict(pl_module, options=options)
        named = {"adapter": adapter, "checkpoint": checkpoint, "everything": everything}
        self.grown = {key: found.peak for key, found in named.items()}


def save_random(name: str, file: Path) -> None:
    """Writes random weights of a timm model, tensor by tensor: a large one fits into no memory."""
    with torch.device("meta"):
        state: dict[str, Any] = timm.create_model(name).state_dict()
    header, end = {}, 0
    for key, value in state.items():
        start, end = end, end + value.numel() * 4
        header[key] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for value in state.values():
            numbers = torch.randn(value.shape, generator=generator) * 0.02
            out.write(numbers.numpy().tobytes())
