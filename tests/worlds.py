"""Several processes on this machine, started as torchrun would: Lightning finds them ready."""

import faulthandler
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(work: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """Calls ``work(*args)`` in each of ``world`` processes, and gives what each returns, by rank.

    A process takes seconds to start: one call had better do the work of many tests.

    Args:
        work: A function of a module that can be imported; a Trainer in it gets
            ``accelerator="cpu", devices=world``.
        args: What it takes; can be pickled, as what it returns.
        world: Number of processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, (world, _free_port(), folder, work, args), nprocs=world)
        return [torch.load(_file(folder, rank), weights_only=False) for rank in range(world)]


def _start(
    rank: int, world: int, port: int, folder: str, work: Callable[..., Any], args: Any
) -> None:
    faulthandler.enable()  # a process that is aborted says where it was
    torch.set_num_threads(1)
    own = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0}
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": "test"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in {**own, **shared, **where}.items()})
    torch.save(work(*args), _file(folder, rank))
    if dist.is_initialized():
        dist.destroy_process_group()


def _file(folder: str, rank: int) -> Path:
    return Path(folder, f"{rank}.pt")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
