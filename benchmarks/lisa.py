"""What LISA saves, and what it costs: a step beside full tuning and LoRA of rank 16.

    python benchmarks/lisa.py
    python benchmarks/lisa.py --models convnext_tiny --batch 8 --active 4

All variants of a model live in one process and take turns, as in step.py. State and gradients are
those of AdamW, saved is what autograd keeps for backward; of LISA each is the most of a few draws,
for blocks are drawn anew at every step. A run keeps them for an interval, and spares the time.
Memory that DDP keeps for the gradients of all parameters is not counted. The table goes to the
screen and to --out.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from models import Vision
from report import about, ratio, table, write
from timing import Stepper, alternate
from torch import Tensor, nn

from litflora.adapters import LoRA, inject
from litflora.backbones import with_targets
from litflora.callbacks._units import (
    SAMPLINGS,
    choose,
    find_units,
    forget,
    rest,
    size_of,
    state_sizes,
    wake,
)
from litflora.heads import classifier_names

MODELS = ("vit_tiny_patch16_224", "convnext_atto")
HEADS = ("tuning", "state, MB", "gradients, MB", "saved, MB", "together, MB", "step")
RANK = 16


class Tuned(Stepper):
    """Takes down the bytes of state and gradients in its steps."""

    def __init__(self, model: nn.Module, x: Tensor, autocast: torch.autocast) -> None:
        super().__init__(model, x, autocast)
        self.state = self.gradients = 0
        self.optimizer.register_step_post_hook(self._take_down)

    def _take_down(self, *_: object) -> None:
        parameters = self.model.parameters()
        gradients = size_of(p.grad for p in parameters if p.grad is not None)
        self.gradients = max(self.gradients, gradients)
        self.state = max(self.state, state_sizes([self.optimizer])[0])


class Sampled(Tuned):
    """Draws blocks anew for each step, as LISA does for each period."""

    def __init__(self, model: nn.Module, x: Tensor, active: int, sampling: str) -> None:
        super().__init__(model, x, plainly(x))
        self.units, self.active, self.sampling = find_units(model), active, sampling
        self.random = random.Random(0)
        self._draw()

    def _draw(self) -> None:
        order = self.random.sample(self.units, len(self.units))
        drawn = choose(order, self.active, self.sampling)
        self.resting = [unit for unit in self.units if unit not in drawn]

    def step(self) -> None:
        """A step of new blocks."""
        self._draw()
        forget(self.resting, [self.optimizer])
        norms = rest(self.resting)
        super().step()
        wake(self.units, norms)

    def saved(self) -> int:
        """The most that is kept for backward, of as many draws as there are blocks."""
        found = []
        for _ in self.units:
            self._draw()
            norms = rest(self.resting)
            found.append(super().saved())
            wake(self.units, norms)
        return max(found)


@dataclass(frozen=True)
class Cost:
    """What a tuning costs: bytes, and the seconds of a step."""

    state: int
    gradients: int
    saved: int
    seconds: float


def plainly(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda")


def steppers(model: Vision, device: str, active: int) -> dict[str, Tuned]:
    """What takes the steps of each tuning, from the same weights."""
    x, nets = model.example().to(device), []
    for _ in range(2 + len(SAMPLINGS)):
        torch.manual_seed(0)
        nets.append(model.build())
    full, lora, *others = nets
    inject(lora, with_targets(lora, LoRA(rank=RANK)), train=classifier_names(lora))
    found: dict[str, Tuned] = {
        "full": Tuned(full.to(device), x, plainly(x)),
        f"LoRA, rank {RANK}": Tuned(lora.to(device), x, plainly(x)),
    }
    for sampling, net in zip(SAMPLINGS, others, strict=True):
        found[f"LISA, {active}, {sampling}"] = Sampled(net.to(device), x, active, sampling)
    return found


def measure(model: Vision, device: str, active: int, repetitions: int) -> dict[str, Cost]:
    """The costs of each tuning."""
    found = steppers(model, device, active)
    seconds = alternate({name: each.step for name, each in found.items()}, device, repetitions)
    return {
        name: Cost(each.state, each.gradients, each.saved(), seconds[name])
        for name, each in found.items()
    }


def rows(costs: dict[str, Cost]) -> Iterator[list[str]]:
    """One a tuning; times in parts of full tuning's."""
    first = next(iter(costs.values())).seconds
    for name, cost in costs.items():
        sizes = (cost.state, cost.gradients, cost.saved)
        told = [f"{size / 1e6:,.1f}" for size in (*sizes, sum(sizes))]
        yield [name, *told, ratio(cost.seconds, first)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="names of timm's")
    parser.add_argument("--active", type=int, default=2, help="blocks that train at a time")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--repetitions", type=int, default=21)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_lisa"))
    args = parser.parse_args()
    for name in args.models:
        model = Vision(args.batch, args.size, name)
        costs = measure(model, args.device, args.active, args.repetitions)
        where = about(args.device, model.precision(args.device), args.repetitions)
        text = f"{name}, {model}, {where}\n\n{table(HEADS, rows(costs))}"
        print(text)
        write(args.out / f"{name}_{args.device}.md", text)


if __name__ == "__main__":
    main()
