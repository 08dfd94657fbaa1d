"""FSDP1 on a CPU, which Lightning keeps for GPUs, so that its numbers can be looked at here."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from litflora.strategies import FSDP1


class OnCPU(FSDP1):
    """FSDP1 that tells torch to stay on the CPU, where Lightning gives it the number of a GPU."""

    def _setup_model(self, model: Any) -> Any:
        made = FullyShardedDataParallel.__init__

        def on_cpu(self: Any, *args: Any, **options: Any) -> None:
            made(self, *args, **{**options, "device_id": torch.device("cpu")})

        with patch.object(FullyShardedDataParallel, "__init__", on_cpu):
            return super()._setup_model(model)
