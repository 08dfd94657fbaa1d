"""Mean IoU of tunings on CamVid in SegNet's layout, over seeds, through the command line.

    python benchmarks/camvid.py --root CamVid --vit vit_tiny_patch16_224.safetensors

Each run is `litflora fit` with the recipe `segmentation/camvid_vit_tiny` and a tuning; with
--convnext also `segmentation/camvid_convnext_atto`. The mean IoU is that of the validation images
after the last epoch. A finished run is not done again, so an interrupted benchmark goes on where it
was. The table goes to the screen and to a file in --out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import time
from pathlib import Path

from quality import at_once, last, litflora, newest, once, options, spread, write
from safetensors import safe_open

TUNINGS = ["probe", "lora", "flora", "full"]


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {"camvid_vit_tiny": args.vit, "camvid_convnext_atto": args.convnext}
    recipes = [recipe for recipe, path in weights.items() if path]
    runs = list(itertools.product(recipes, args.tunings, args.seeds))
    results = at_once(args.jobs, lambda run: fit(args, weights[run[0]], *run), runs)
    seeds = ", ".join(map(str, args.seeds))
    heading = ("recipe", "tuning", "numbers saved", "val mIoU", "each seed", "seconds", "folder")
    rates = "".join(f"{key} {rate:g}, " for key, rate in given_rates(args).items())
    lines = [
        f"{rates}seeds {seeds}, {os.cpu_count()} cores, {args.jobs} runs at a time.",
        "",
        f"| {' | '.join(heading)} |",
        "|---" * len(heading) + "|",
    ]
    for recipe, tuning in itertools.product(recipes, args.tunings):
        rows = [r for run, r in zip(runs, results, strict=True) if run[:2] == (recipe, tuning)]
        seconds = statistics.mean(row["seconds"] for row in rows)
        lines.append(
            f"| {recipe} | {tuning} | {rows[0]['saved']:,} | "
            f"{spread([row['miou'] for row in rows])} | {seconds:.0f} | "
            f"{rows[0]['bytes'] / 1e6:.2f} MB |"
        )
    write(args.out / "table.md", "\n".join(lines))
    print("\n".join(lines))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folders train/, trainannot/, ...")
    parser.add_argument("--vit", type=Path, help="weights of an ImageNet ViT-Tiny")
    parser.add_argument("--convnext", type=Path, help="weights of a ConvNeXt-Atto")
    parser.add_argument("--tunings", nargs="+", default=TUNINGS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lr", type=float, help="in place of each tuning's own")
    parser.add_argument("--head-lr", type=float, help="of the head, in place of the tuning's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_camvid"))
    args = parser.parse_args()
    if not (args.vit or args.convnext):
        parser.error("give --vit, --convnext, or both")
    return args


def given_rates(args: argparse.Namespace) -> dict[str, float]:
    """The learning rates that replace those of recipe and tuning, by their options."""
    rates = {"lr": args.lr, "head_lr": args.head_lr}
    return {key: rate for key, rate in rates.items() if rate is not None}


def fit(
    args: argparse.Namespace, weights: Path, recipe: str, tuning: str, seed: int
) -> dict[str, float]:
    """Fits once; what came out, and what it took."""
    here = {
        "seed_everything": seed,
        "trainer.check_val_every_n_epoch": 20,
        "data.init_args.root": args.root,
        "model.init_args.weights": weights,
    }
    rates = given_rates(args)
    here |= {f"model.init_args.{key}": rate for key, rate in rates.items()}
    recipes = ["--config", f"segmentation/{recipe}", "--config", f"tuning/{tuning}"]

    def go(folder: Path) -> dict[str, float]:
        begin = time.perf_counter()
        there = {"trainer.default_root_dir": folder / "fit"}
        litflora(args.jobs, folder, "fit", *recipes, *options({**here, **there}))
        seconds = time.perf_counter() - begin
        adapter = newest(folder / "fit", "adapter_config.json").parent
        return {
            "miou": last(folder / "fit", "val/miou"),
            "seconds": seconds,
            "bytes": sum(file.stat().st_size for file in adapter.iterdir()),
            "saved": saved_numbers(adapter / "adapter_model.safetensors"),
        }

    named = [recipe, tuning, seed, *(f"{key}{rate:g}" for key, rate in rates.items())]
    return once(args.out / "-".join(map(str, named)), go)


def saved_numbers(path: Path) -> int:
    """How many numbers a file holds: trained weights, and the statistics of batch norms."""
    with safe_open(path, "pt") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118


if __name__ == "__main__":
    main()
