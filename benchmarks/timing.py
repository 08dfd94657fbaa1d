"""Time and memory: the median of many turns, which the contestants take one after the other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from models import CLASSES
from rich.progress import track
from torch import Tensor, nn

from litflora.adapters.summary import measure

Run = Callable[[], object]


class Stepper:
    """Takes training steps of one model on one batch."""

    def __init__(self, model: nn.Module, x: Tensor, autocast: torch.autocast) -> None:
        self.model, self.x, self.autocast = model.train(), x, autocast
        self.y = torch.arange(len(x)).to(x.device) % CLASSES
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def loss(self) -> Tensor:
        """The forward."""
        with self.autocast:
            return F.cross_entropy(self.model(self.x).float(), self.y)

    def step(self) -> None:
        """Forward, backward and optimizer."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.x.grad = None

    def saved(self) -> int:
        """Bytes that autograd keeps for backward, parameters left out."""
        with self.autocast:
            return measure(self.model, self.x)[0]

    def peak(self) -> int:
        """Bytes that a step allocates at most beyond what lives between steps; CUDA alone says."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        return torch.cuda.max_memory_allocated() - before


def seconds(run: Run, device: str) -> float:
    """Time of one run: of the processor on a CPU, which others share; of the stream on a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.process_time()
    run()
    return time.process_time() - begin


def alternate(runs: dict[str, Run], device: str, repetitions: int) -> dict[str, float]:
    """The median time of each, taken in turns, up and down the list."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for repetition in track(range(repetitions), description="repetitions"):
        order = list(runs)[:: 1 if repetition % 2 == 0 else -1]
        for name in order:
            times[name].append(seconds(runs[name], device))
    return {name: statistics.median(values) for name, values in times.items()}
