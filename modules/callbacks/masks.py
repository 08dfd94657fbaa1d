"""MaskWriter: predicted masks, as pictures that are data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from ..adapters.replacing import replacing
from ._files import log_dir


class MaskWriter(Callback):
    """Writes ``predictions/<image>.png`` into the log folder, a mask for each image.

    A mask is a palette PNG of the image's own size: its values are class ids, and a viewer shows
    them in the data's colours. Folders below ``predict_root`` are kept.
    """

    def __init__(self) -> None:
        self.written: set[Path] = set()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets earlier predictions."""
        self.written = set()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the masks of a batch."""
        folder, data = log_dir(trainer) / "predictions", trainer.datamodule
        root, palette = getattr(data, "predict_root", None), getattr(data, "palette", [])
        if trainer.fast_dev_run:
            return
        for name, ids in zip(outputs["names"], outputs["ids"], strict=True):
            path = folder / self._free(_relative(name, root))
            with replacing(path) as temporary:
                picture(ids, palette).save(temporary)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says where the masks are."""
        if self.written and trainer.is_global_zero:
            print(f"masks are in {log_dir(trainer) / 'predictions'}")

    def _free(self, name: Path) -> Path:
        """The name of an image's mask: ``a.jpg`` and ``a.png`` may lie in one folder."""
        short = name.with_suffix(".png")
        path = name.with_name(f"{name.name}.png") if short in self.written else short
        self.written.add(path)
        return path


def picture(ids: Tensor, palette: list[tuple[int, int, int]]) -> Image.Image:
    """A palette image of class ids ``[H, W]``, each below 256; grey ones without a palette."""
    image = Image.fromarray(ids.cpu().numpy().astype(np.uint8), mode="P")
    colours = palette or [(grey, grey, grey) for grey in range(256)]
    image.putpalette([value for colour in colours for value in colour])
    return image


def _relative(name: str, root: str | None) -> Path:
    """A name inside ``root``, or the last part of any other."""
    inside = root is not None and Path(name).is_relative_to(root)
    return Path(os.path.relpath(name, root)) if inside else Path(Path(name).name)
