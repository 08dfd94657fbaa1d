"""Accuracy of tunings on a CIFAR-10 kept as image folders, over seeds, through the command line.

    python benchmarks/cifar10.py --root CIFAR10 --weights vit_tiny_patch16_224.safetensors

Each run is `litflora fit` with the recipe `classification/cifar10_vit_tiny`, then `litflora test`
from the saved adapter folder alone, in a new process. With --choose it compares settings instead,
on a fifth of the training images held out: the test images are not read, and the seeds are others.
A finished run is not done again, so an interrupted benchmark goes on where it was. The table goes
to the screen and to a file in --out.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
from pathlib import Path
from typing import Any

from quality import at_once, last, litflora, newest, once, options, spread, write

RECIPE = "classification/cifar10_vit_tiny"
TUNINGS = ["flora", "lora"]
# What --choose tries, one thing at a time: learning rate, warm-up and smallest crop.
TRIALS = [
    ("flora", 2e-3, 0.1, 0.8),
    ("flora", 5e-3, 0.1, 0.8),
    ("flora", 1e-2, 0.1, 0.8),
    ("flora", 5e-3, 0.3, 0.8),
    ("flora", 5e-3, 0.1, 0.5),
    ("flora", 5e-3, 0.3, 0.5),
    ("lora", 1e-3, 0.3, 0.8),
    ("lora", 3e-3, 0.3, 0.8),
    ("lora", 1e-3, 0.3, 0.5),
]


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    text = choose(args) if args.choose else measure(args)
    print(text)
    write(args.out / ("choice.md" if args.choose else "table.md"), text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folders train/ and test/")
    parser.add_argument("--weights", type=Path, required=True, help="an ImageNet ViT-Tiny")
    parser.add_argument("--choose", action="store_true", help="compare settings on held-out images")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=None, help="0 1 2; to choose 100 101 102"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_cifar10"))
    args = parser.parse_args()
    args.seeds = args.seeds or ([100, 101, 102] if args.choose else [0, 1, 2])
    return args


def measure(args: argparse.Namespace) -> str:
    """Test accuracy of each tuning as its recipe has it."""
    runs = list(itertools.product(TUNINGS, args.seeds))
    results = at_once(args.jobs, lambda run: test_accuracy(args, *run), runs)
    lines = ["| tuning | test accuracy | each seed | adapter folder |", "|---|---|---|---|"]
    for tuning in TUNINGS:
        rows = [result for (of, _), result in zip(runs, results, strict=True) if of == tuning]
        size = max(row["bytes"] for row in rows) / 1e6
        lines.append(f"| {tuning} | {spread([row['acc'] for row in rows])} | {size:.2f} MB |")
    return "\n".join([about(args), "", *lines])


def choose(args: argparse.Namespace) -> str:
    """Held-out accuracy of each tuning with other learning rates, warm-ups and crops."""
    runs = list(itertools.product(TRIALS, args.seeds))
    results = at_once(args.jobs, lambda run: held_out_accuracy(args, *run), runs)
    lines = ["| tuning | learning rate | warm-up | smallest crop | held-out accuracy | each seed |"]
    lines += ["|---|---|---|---|---|---|"]
    for trial in TRIALS:
        acc = [result["acc"] for (of, _), result in zip(runs, results, strict=True) if of == trial]
        lines.append(f"| {' | '.join(map(str, trial))} | {spread(acc)} |")
    return "\n".join([about(args), "", *lines])


def test_accuracy(args: argparse.Namespace, tuning: str, seed: int) -> dict[str, float]:
    """Fits, then tests from the adapter's folder alone, in a new process."""

    def go(folder: Path) -> dict[str, float]:
        adapter = fit(args, tuning, seed, folder, {})
        there = {"trainer.default_root_dir": folder / "test"}
        litflora(args.jobs, folder, "test", "--adapter", adapter, *options(there))
        size = sum(file.stat().st_size for file in adapter.iterdir())
        return {"acc": last(folder / "test", "test/acc"), "bytes": size}

    return once(args.out / f"{tuning}-{seed}", go)


def held_out_accuracy(
    args: argparse.Namespace, trial: tuple[str, float, float, float], seed: int
) -> dict[str, float]:
    """Fits on four fifths of the training images; accuracy on the others."""
    tuning, rate, warmup, crop = trial
    settings = {
        "model.init_args.optimizer": "torch.optim.AdamW",
        "model.init_args.optimizer.init_args.lr": rate,
        "model.init_args.lr_scheduler": "litflora.optim.OneCycle",
        "model.init_args.lr_scheduler.init_args.warmup": warmup,
        "data.init_args.min_crop": crop,
        "data.init_args.val_fraction": 0.2,
        "trainer.check_val_every_n_epoch": 3,
    }

    def go(folder: Path) -> dict[str, float]:
        fit(args, tuning, seed, folder, settings)
        return {"acc": last(folder / "fit", "val/acc")}

    return once(args.out / f"choose-{'-'.join(map(str, trial))}-{seed}", go)


def fit(
    args: argparse.Namespace, tuning: str, seed: int, folder: Path, settings: dict[str, Any]
) -> Path:
    """Runs `litflora fit`; returns the adapter's folder."""
    recipe = ["--config", RECIPE, "--config", f"tuning/{tuning}"]
    here = {
        "seed_everything": seed,
        "trainer.default_root_dir": folder / "fit",
        "data.init_args.root": args.root,
        "model.init_args.weights": args.weights,
    }
    litflora(args.jobs, folder, "fit", *recipe, *options({**here, **settings}))
    return newest(folder / "fit", "adapter_config.json").parent


def about(args: argparse.Namespace) -> str:
    seeds = ", ".join(map(str, args.seeds))
    return f"{RECIPE}, seeds {seeds}, {platform.processor() or 'CPU'}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
