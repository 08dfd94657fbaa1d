"""Bytes that a rank holds and sends in a step: on paper for large models, counted for a small one.

    python benchmarks/scaling.py

The formulas are in sharding.py. A ViT-Ti is trained with each tuning, under DDP and FSDP2, in two
processes of gloo; tensors, collectives and sockets are counted, which collectives.py explains. No
time is measured. The tables go to the screen and to --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from collectives import RANKS, measure
from models import MODELS, Model, Vision
from report import table, write
from sharding import GLOO, Sizes, held, payloads, sent
from variants import RANK, VARIANTS

TUNINGS = {"full": "full", "LoRA": "LoRA auto, linear", "FLoRA": "FLoRA auto, all"}
COUNTED = {**TUNINGS, "FLoRA, bf16 base": TUNINGS["FLoRA"]}
KNOWN = MODELS["cpu"]
PAPER: dict[str, Model] = {
    "ViT-S": KNOWN["vit_small_patch16_224"],
    "ViT-L": KNOWN["vit_large_patch14_clip_224"],
    "ConvNeXt-L": KNOWN["convnext_large"],
    "LLaMA-7B's layers": replace(KNOWN["llama_7b_stack"], layers=32),
}
SMALL = Vision(batch=2, size=32, name="vit_tiny_patch16_224")
MANY = (2, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_scaling"))
    args = parser.parse_args()
    text = f"{paper()}\n\n{beside()}"
    print(text)
    write(args.out / "scaling.md", text)


def paper() -> str:
    """What the formulas give for models that are not run."""
    at = [f"{what}, n = {n}" for what in ("holds", "sends") for n in MANY]
    heads = ["model", "tuning", "F", "T", "holds alone or by DDP"]
    heads += [f"DDP sends, n = {n}" for n in MANY] + [f"FSDP2 {each}" for each in at]
    return f"MB, rank {RANK}\n\n{table(heads, rows())}"


def rows() -> Iterator[list[str]]:
    """A row for each model and tuning."""
    for name, model in PAPER.items():
        for tuning, variant in TUNINGS.items():
            with torch.device("meta"):
                net = VARIANTS[variant](model.build())
            if tuning == "full":  # trained, a half-precision base is kept in float32
                net.float()
            sizes, shards = Sizes.of(net), {n: Sizes.of(net, n) for n in MANY}
            cells = [sizes.frozen, sizes.trained, sum(held(sizes, "DDP", 1).values())]
            cells += [sent(payloads(sizes, "DDP"), n) for n in MANY]
            cells += [sum(held(shards[n], "FSDP2", n).values()) for n in MANY]
            cells += [sent(payloads(shards[n], "FSDP2"), n) for n in MANY]
            yield [name, tuning, *map(megabytes, cells)]


def beside() -> str:
    """What is counted in two processes, beside what the formulas say."""
    heads = ["tuning", "strategy", "bytes", "formula", "counted", "counted / formula"]
    lines = [
        [*key, kind, f"{formula:,.0f}", f"{counted:,}", f"{counted / formula:.4f}"]
        for key, (sizes, found) in measure(SMALL, COUNTED).items()
        for kind, formula, counted in compared(sizes, key[1], found)
    ]
    return f"{SMALL.name}, {SMALL}, {RANKS} processes of gloo\n\n{table(heads, lines)}"


def compared(
    sizes: Sizes, strategy: str, counted: dict[str, int]
) -> Iterator[tuple[str, float, int]]:
    """Names, formulas and counts."""
    payload = payloads(sizes, strategy)
    formulas = {**held(sizes, strategy, RANKS), **payload, "wire": sent(payload, RANKS, GLOO)}
    assert formulas.keys() == counted.keys(), counted
    for name, formula in formulas.items():
        yield name, formula, counted[name]


def megabytes(value: float) -> str:
    """Three digits, or all those of whole megabytes."""
    return f"{value / 1e6:,.{max(0, 3 - len(str(int(value / 1e6))))}f}"


if __name__ == "__main__":
    main()
