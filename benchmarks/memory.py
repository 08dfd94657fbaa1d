"""What precision and activation checkpointing save: time and memory of a step with FLoRA.

    python benchmarks/memory.py --model vit_large_patch16_224 --batch 32     # on a GPU
    python benchmarks/memory.py --model vit_small_patch16_224 --size 112     # on a CPU

All variants live in one process and take turns, as in step.py. Bytes saved are what autograd keeps
for backward; the peak, on a GPU, is what a step allocates beyond what lives between steps. The
table goes to the screen and to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from models import Vision
from report import about, ratio, table, write
from timing import Stepper, alternate

from litflora.adapters import FLoRA, inject
from litflora.backbones import with_targets
from litflora.backbones.blocks import checkpoint_activations
from litflora.heads import classifier_names
from litflora.precision import hold_base

RANK = 8
PRECISIONS = ("32-true", "bf16-mixed", "bf16-mixed, bf16 base", "bf16-true")
CHECKPOINTING = ("none", "every-2", "blocks")


@dataclass(frozen=True)
class Cost:
    """What a variant costs.

    Attributes:
        seconds: Of a step.
        weights: Bytes of all parameters.
        saved: Bytes kept for backward.
        peak: Bytes that a step needs besides; None on a CPU.
    """

    seconds: float
    weights: int
    saved: int
    peak: int | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224", help="a name of timm's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="pixels of a side")
    parser.add_argument("--repetitions", type=int, default=7)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_memory"))
    args = parser.parse_args()
    model = Vision(args.batch, args.size, args.model)
    costs = measure(model, args.device, args.repetitions)
    where = about(args.device, "FLoRA", args.repetitions)
    text = f"{args.model}, {model}, rank {RANK}, {where}\n\n{as_table(costs)}"
    print(text)
    write(args.out / f"{args.model}_{args.device}.md", text)


def measure(model: Vision, device: str, repetitions: int) -> dict[tuple[str, str], Cost]:
    """The costs of each precision with each kind of checkpointing."""
    steppers = {
        variant: stepper(model, device, *variant) for variant in product(PRECISIONS, CHECKPOINTING)
    }
    runs = {", ".join(variant): each.step for variant, each in steppers.items()}
    seconds = alternate(runs, device, repetitions)
    return {
        variant: Cost(
            seconds[", ".join(variant)],
            sum(p.numel() * p.element_size() for p in each.model.parameters()),
            each.saved(),
            each.peak() if device == "cuda" else None,
        )
        for variant, each in steppers.items()
    }


def stepper(model: Vision, device: str, precision: str, checkpointing: str) -> Stepper:
    """Takes steps of the model as a run with these settings does."""
    torch.manual_seed(0)
    net, x = model.build(), model.example()
    tuning = with_targets(net, FLoRA(rank=RANK))
    inject(net, tuning, train=classifier_names(net))
    if precision.endswith("bf16 base"):
        hold_base(net, torch.bfloat16)
    checkpoint_activations(net, checkpointing)
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision.startswith("bf16-mixed"))
    if precision == "bf16-true":
        net, x = net.bfloat16(), x.bfloat16()
    return Stepper(net.to(device), x.to(device), autocast)


def as_table(costs: dict[tuple[str, str], Cost]) -> str:
    """One line a variant; times in parts of the first one's."""
    peaks = any(cost.peak is not None for cost in costs.values())
    heads = ["precision", "checkpointing", "step", "weights, MB", "saved, MB"]
    return table([*heads, "peak, MB"] if peaks else heads, _rows(costs))


def _rows(costs: dict[tuple[str, str], Cost]) -> Iterator[list[str]]:
    first = next(iter(costs.values())).seconds
    for (precision, checkpointing), cost in costs.items():
        sizes = (cost.weights, cost.saved, cost.peak)
        told = [f"{size / 1e6:,.0f}" for size in sizes if size is not None]
        yield [precision, checkpointing, ratio(cost.seconds, first), *told]


if __name__ == "__main__":
    main()
