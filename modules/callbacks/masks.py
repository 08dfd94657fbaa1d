"""MaskWriter: predicted masks, as pictures that are data."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from ..adapters.replacing import replacing
from ._files import log_dir, picture_path


class MaskWriter(Callback):
    """Writes ``predictions/<image>.png`` into the log folder: ``a.jpg.png`` is the mask of a.jpg.

    A mask is a palette PNG of the image's own size. Its values are the classes' places in
    ``class_names``, from 0, whatever ids the data's own masks have; a viewer shows the data's
    colours. Folders below ``predict_root``, or else below the data's ``root``, are kept.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the folder, which all processes have to do together."""
        self.folder = log_dir(trainer)

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
        data = trainer.datamodule
        palette = getattr(data, "palette", [])
        if trainer.fast_dev_run:
            return
        for name, ids in zip(outputs["names"], outputs["ids"], strict=True):
            with replacing(picture_path(data, self.folder, name), durable=False) as temporary:
                picture(ids, palette).save(temporary)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says where the masks are."""
        if trainer.is_global_zero and not trainer.fast_dev_run:
            print(f"masks are in {self.folder / 'predictions'}")


def picture(ids: Tensor, palette: list[tuple[int, int, int]]) -> Image.Image:
    """A palette image of class ids ``[H, W]``, each below 256; grey ones without a palette."""
    image = Image.fromarray(ids.cpu().numpy().astype(np.uint8), mode="P")
    colours = palette or [(grey, grey, grey) for grey in range(256)]
    image.putpalette([value for colour in colours for value in colour])
    return image
