"""What a process holds of a tensor that is shared out by rows, also where they do not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import worlds
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from litflora.adapters.sharded import part_of, rows_of

SIZES = tuple(range(1, 9))


def parts() -> dict[int, Any]:
    """By number of rows: what torch gives this process, where we say that it lies, and ours."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for size in SIZES:
        layer = nn.Linear(2, size, bias=False)
        layer.weight.data = torch.arange(size * 2.0).view(size, 2)
        fully_shard(layer, mesh=mesh)
        weight: Any = layer.weight
        ours = part_of(torch.arange(size * 2.0).view(size, 2), weight)
        found[size] = weight.to_local(), rows_of(weight), ours.to_local(), ours.full_tensor()
    return found


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_are_those_that_torch_shares_out(world: int) -> None:
    for found in worlds.run(parts, world=world):
        for size, (held, (first, count), ours, whole) in found.items():
            rows = torch.arange(size * 2.0).view(size, 2)
            assert torch.equal(rows[first : first + count], held)
            assert torch.equal(ours, held)
            assert torch.equal(whole, rows)
