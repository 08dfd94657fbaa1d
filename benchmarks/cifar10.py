"""Accuracy of tunings on a CIFAR-10 kept as image folders, over seeds, through the command line.

    python benchmarks/cifar10.py --root CIFAR10 --weights vit_tiny_patch16_224.safetensors

Each run is `litflora fit` with the recipe `classification/cifar10_vit_tiny`, then `litflora test`
from the saved adapter folder alone, in a new process. A finished run is not done again, so an
interrupted benchmark goes on where it was. The table goes to the screen and to --out.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.progress import track

RECIPE = "classification/cifar10_vit_tiny"


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [(tuning, seed) for tuning in args.tunings for seed in args.seeds]
    results: dict[str, list[dict[str, float]]] = {tuning: [] for tuning in args.tunings}
    for tuning, seed in track(runs, description="runs"):
        results[tuning].append(run(args, tuning, seed))
    text = table(results, args.seeds)
    print(text)
    temporary = args.out / "table.md.tmp"
    temporary.write_text(text + "\n")
    os.replace(temporary, args.out / "table.md")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folders train/ and test/")
    parser.add_argument("--weights", type=Path, required=True, help="an ImageNet ViT-Tiny")
    parser.add_argument("--tunings", nargs="+", default=["flora", "lora"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_cifar10"))
    return parser.parse_args()


def run(args: argparse.Namespace, tuning: str, seed: int) -> dict[str, float]:
    """Fits and tests one seed of one tuning; returns what was measured."""
    folder = args.out / f"{tuning}-{seed}"
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())
    here = ["--trainer.default_root_dir"]
    fit = ["fit", "--config", RECIPE, "--config", f"tuning/{tuning}", "--seed_everything", seed]
    fit += ["--data.init_args.root", args.root, "--model.init_args.weights", args.weights]
    start = time.perf_counter()
    litflora(*fit, *here, folder / "fit", log=args.out / f"{tuning}-{seed}.log")
    seconds = time.perf_counter() - start
    adapter = newest(folder / "fit", "adapter_config.json").parent
    litflora("test", "--adapter", adapter, *here, folder / "test", log=args.out / "test.log")
    result = {
        "acc": metric(newest(folder / "test", "metrics.csv"), "test/acc"),
        "seconds": seconds,
        "bytes": sum(file.stat().st_size for file in adapter.iterdir()),
    }
    done.write_text(json.dumps(result))
    return result


def litflora(*args: object, log: Path) -> None:
    command = [sys.executable, "-m", "litflora", *map(str, args)]
    with log.open("a") as file:
        subprocess.run(command, check=True, stdout=file, stderr=subprocess.STDOUT)


def newest(folder: Path, name: str) -> Path:
    return max(folder.rglob(name), key=lambda path: path.stat().st_mtime)


def metric(path: Path, name: str) -> float:
    with path.open() as file:
        values = [row[name] for row in csv.DictReader(file) if row.get(name)]
    return float(values[-1])


def table(results: dict[str, list[dict[str, float]]], seeds: list[int]) -> str:
    lines = [
        f"{RECIPE}, seeds {', '.join(map(str, seeds))}, {platform.processor() or 'CPU'}, "
        f"{os.cpu_count()} cores",
        "",
        "| tuning | test accuracy | each seed | adapter folder | seconds a run |",
        "|---|---|---|---|---|",
    ]
    for tuning, rows in results.items():
        acc = [100 * row["acc"] for row in rows]
        spread = f"{statistics.mean(acc):.2f} ± {statistics.stdev(acc) if len(acc) > 1 else 0:.2f}"
        each = ", ".join(f"{value:.1f}" for value in acc)
        size = f"{rows[0]['bytes'] / 1e6:.2f} MB"
        seconds = f"{statistics.mean(row['seconds'] for row in rows):.0f}"
        lines.append(f"| {tuning} | {spread} | {each} | {size} | {seconds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
