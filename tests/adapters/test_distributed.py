"""Two processes that share a batch, or a model, take the steps that one process takes."""

from __future__ import annotations

import json
import socket
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from litflora.adapters import FLoRA, inject

from .cases import randomize

WORLD, STEPS, SHARE = 2, 3, 4


def build() -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    inject(net, FLoRA(rank=2, targets="linear"), train=["head"])
    randomize(net)
    return net


def spread(net: Any, kind: str) -> Any:
    if kind == "ddp":
        return DistributedDataParallel(net)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def steps(model: Any, owner: nn.Module, rank: int | None) -> list[Tensor]:
    optimizer = torch.optim.SGD([p for p in owner.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        x = torch.randn(SHARE * WORLD, 3, 32, 32)
        x = x if rank is None else x[rank * SHARE : (rank + 1) * SHARE]
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def work(rank: int, kind: str, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD)
    net = build()
    expected = steps(single := deepcopy(net), single, None)
    model = spread(net, kind)
    found = torch.stack(steps(model, model, rank))
    dist.all_reduce(found)
    if rank == 0:
        both = [(found / WORLD).tolist(), torch.stack(expected).tolist()]
        Path(folder, "losses.json").write_text(json.dumps(both))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(kind: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (kind, port, str(tmp_path)), nprocs=WORLD)
    found, expected = json.loads((tmp_path / "losses.json").read_text())
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-2)
