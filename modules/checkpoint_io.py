"""AtomicCheckpointIO: checkpoints that are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .adapters.replacing import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to a temporary file, which then takes its name.

    A run that is killed while it saves, or whose disk is full, keeps the checkpoint of before.
    Lightning's own way holds the whole file in memory first, and does not wait for the disk.

    ``Trainer(plugins=[AtomicCheckpointIO()])`` uses it; the command line does so always.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes the file; what is not on this machine's disks, as ``s3://``, is Lightning's."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with replacing(Path(path)) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's, of a disk that is full
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
