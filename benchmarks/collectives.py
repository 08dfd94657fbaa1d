"""Bytes that two processes hold and exchange, counted: tensors, collectives, and sockets.

Payloads are the tensors handed to collectives: what is reduced, or what is gathered, whole. Every
collective goes through the dispatcher as an operation of c10d, those of DDP's reducer, too, which
is C++. What goes over the wire the kernel counts for each TCP socket.
"""

from __future__ import annotations

import os
import socket
import struct
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from models import Vision
from sharding import STRATEGIES, Sizes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from variants import VARIANTS

from litflora.precision import hold_base
from litflora.sharding import shard

STEPS = 3  # the first makes DDP's buckets, the second the optimizer's state
RANKS = 2
# Operations of c10d, and which of their arguments is the whole of what is exchanged.
COLLECTIVES = {
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "broadcast_": ("broadcast", 0),
}


class Measured(NamedTuple):
    """What a rank has counted, beside the sizes that the formulas take."""

    sizes: Sizes
    counted: dict[str, int]


class Payloads(TorchDispatchMode):
    """Counts the bytes that are handed to collectives while it is entered.

    Attributes:
        bytes: By kind of collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func._opname != "barrier":
            kind, which = COLLECTIVES[func._opname]
            self.bytes[kind] += sum(t.nbytes for t in tree_leaves(args[which]))
        return func(*args, **(kwargs or {}))


def received() -> int:
    """Bytes that this process's TCP sockets have received, headers left out."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        if entry.is_symlink() and os.readlink(entry).startswith("socket:"):
            with socket.socket(fileno=os.dup(int(entry.name))) as found:
                if found.type == socket.SOCK_STREAM and found.family != socket.AF_UNIX:
                    info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, 128)[0]  # tcpi_bytes_received
    return total


def local_bytes(tensors: Any) -> int:
    """Bytes of what this process has of some tensors."""
    own = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.nbytes for t in own)


def spread(net: nn.Module, strategy: str) -> nn.Module:
    """The network over all ranks."""
    if strategy == "DDP":
        return DistributedDataParallel(net)
    shard(net, init_device_mesh("cpu", (dist.get_world_size(),)))
    return net


def counted(net: nn.Module, x: Tensor, strategy: str) -> dict[str, int]:
    """Bytes that this rank holds after a step, and that it exchanges in one."""
    model = spread(net, strategy)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for _ in range(STEPS):
        dist.barrier()
        before, payloads = received(), Payloads()
        with payloads, torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), torch.arange(len(x)))
        with payloads:
            loss.backward()
        dist.barrier()
        wire = received() - before
        optimizer.step()
        gradients = local_bytes(p.grad for p in trained)
        optimizer.zero_grad()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    return {
        "weights": local_bytes(model.parameters()),
        "gradients": gradients,
        "optimizer": local_bytes(moments),
        **payloads.bytes,
        "wire": wire,
    }


def measure(model: Vision, tunings: dict[str, str]) -> dict[tuple[str, str], Measured]:
    """Runs every tuning under both strategies in two processes of gloo.

    Args:
        model: The network.
        tunings: Names of variants by name of the tuning; one whose name ends in "bf16 base" has its
            frozen layers held so.

    Returns:
        By tuning and strategy, what rank 0 counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (model, tunings, folder), nprocs=RANKS)
        return torch.load(Path(folder, "counted.pt"), weights_only=False)


def _work(rank: int, model: Vision, tunings: dict[str, str], folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found = {}
    for tuning, variant in tunings.items():
        for strategy in STRATEGIES:
            net = VARIANTS[variant](model.build())
            if tuning.endswith("bf16 base"):
                hold_base(net, torch.bfloat16)
            sizes = Sizes.of(net, RANKS if strategy == "FSDP2" else 1)
            found[tuning, strategy] = Measured(sizes, counted(net, model.example(), strategy))
    if rank == 0:
        torch.save(found, Path(folder, "counted.pt"))
    dist.destroy_process_group()
