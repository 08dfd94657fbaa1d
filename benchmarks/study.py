"""All methods on one target, each at its own learning rate, as tables and a picture.

    python benchmarks/study.py camvid_convnext_atto --data DATA

DATA holds `CamVid/`, `cifar10/`, `PennFudanPed/` and `weights/`. Everything is done by `litflora
compare`, whose folders in --out keep what has run: an interrupted study goes on where it was.

1. The head's learning rate is the one at which a frozen backbone validates best; all have it.
2. With the first seed, each method's rate is chosen on the validation data, among half decades:
   rates are added until the best one has been tried with both of its neighbours.
3. At that rate it runs with all seeds, and is tested.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import study_tables
import yaml
from quality import write

HERE = Path(__file__).resolve().parent / "study"
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
HEADS = {"Probe": (3e-3, 1e-2)}
# Where the search begins; a name that is no class is a recipe, here or of litflora.
RATES: dict[str, tuple[float, ...]] = {
    "BitFit": (3e-3, 1e-2),
    "Full": (1e-4, 3e-4),
    "tuning/lisa": (3e-4, 1e-3),
    "LoRA": (1e-3, 3e-3),
    "DoRA": (1e-3, 3e-3),
    "tuning/adalora": (3e-3, 1e-2),
    "FLoRA": (3e-3, 1e-2),
    "flora_r2": (3e-3, 1e-2),
    "flora_quarter": (3e-3, 1e-2),
    "flora_times_4": (1e-3, 3e-3),
}
KERNELS: dict[str, tuple[float, ...]] = {
    "lora_conv": (1e-3, 3e-3),
    "flora_pointwise": (3e-3, 1e-2),
}


@dataclass(frozen=True)
class Target:
    """What is learnt, from which weights, and what they are asked for again.

    Attributes:
        recipe: A recipe of litflora.
        root: Folder of the data, inside DATA.
        weights: File in `DATA/weights`.
        options: For all runs.
        rates: What is tried, by tuning.
        source: Size in pixels of the images of CIFAR-10, and the head that judges them; None to
            measure no forgetting.
    """

    recipe: str
    root: str
    weights: str
    options: Mapping[str, object]
    rates: Mapping[str, Sequence[float]] = field(default_factory=lambda: RATES)
    source: tuple[int, str] | None = None


SHORT = {
    "data.init_args.val_fraction": 0.2,
    "trainer.max_epochs": 12,
    "trainer.check_val_every_n_epoch": 4,
}
VIT, ATTO = "vit_tiny_patch16_224.safetensors", "convnext_atto_cifar10.safetensors"
TARGETS = {
    "cifar10_vit_tiny": Target(
        "classification/cifar10_vit_tiny",
        "cifar10",
        VIT,
        {"data.init_args.val_fraction": 0.2, "trainer.check_val_every_n_epoch": 3},
    ),
    "camvid_vit_tiny": Target(
        "segmentation/camvid_vit_tiny", "CamVid", VIT, SHORT, source=(96, "probe")
    ),
    "camvid_convnext_atto": Target(
        "segmentation/camvid_convnext_atto",
        "CamVid",
        ATTO,
        SHORT,
        rates={**RATES, **KERNELS},
        source=(64, "original"),
    ),
    "pennfudan_convnext_atto": Target(
        "detection/pennfudan_convnext_atto",
        "PennFudanPed",
        ATTO,
        {**SHORT, "data.init_args.test_fraction": 0.3},
        rates={**RATES, **KERNELS},
        source=(64, "original"),
    ),
}


def main() -> None:
    args = parse_args()
    target, out = TARGETS[args.target], args.out.resolve() / args.target
    out.mkdir(parents=True, exist_ok=True)
    options = common(target, args.data.resolve(), out)
    alone = {**options, "model.init_args.head_lr": "null"}  # the rate that is tried is the head's
    probe = partial(compare, target, out=out / "head", options=alone)
    head_lr = search(HEADS, args.seeds, out / "head", probe)["Probe"]
    options = {**options, "model.init_args.head_lr": head_lr}
    overlays = ["trainer/spectra"]
    if target.source:
        overlays.append(str(forgetting(target.source, args.data.resolve(), out)))
    methods = out / "methods"
    run = partial(compare, target, out=methods, options=options, overlays=overlays)
    best = search(target.rates, args.seeds, methods, run)
    shutil.copyfile(methods / "results.csv", out / "rates.csv")  # the seeds' replaces it
    rates = {name: (rate,) for name, rate in best.items()}
    run({"Probe": (), **rates}, args.seeds)
    show(methods, out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--data", type=Path, required=True, help="folder of data and weights")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    return parser.parse_args()


def common(target: Target, data: Path, out: Path) -> dict[str, object]:
    """The options of all runs of a target."""
    root = data / target.root
    return {
        "data.init_args.root": tested(root, out / "CamVid") if target.root == "CamVid" else root,
        "model.init_args.weights": data / "weights" / target.weights,
        **target.options,
    }


def tested(camvid: Path, there: Path) -> Path:
    """CamVid whose validation split tests, so that the rates are chosen on training images."""
    there.mkdir(exist_ok=True)
    for name, of in {"train": "train", "test": "val"}.items():
        for end in ("", "annot"):
            link = there / f"{name}{end}"
            if not link.exists():
                link.symlink_to(camvid / f"{of}{end}", target_is_directory=True)
    return there


def forgetting(source: tuple[int, str], data: Path, out: Path) -> Path:
    """A recipe that asks for CIFAR-10 during the runs."""
    size, head = source
    images = {"root": str(data / "cifar10"), "img_size": size}
    monitor = {
        "data": {
            "class_path": "litflora.datamodules.ImageFolderDataModule",
            "init_args": images,
        },
        "head": head,
        "limit": 1000,
        "every_n_epochs": 4,
    }
    callback = {"class_path": "litflora.callbacks.SourceMonitor", "init_args": monitor}
    path = out / "forgetting.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    return path


def search(
    rates: Mapping[str, Sequence[float]], seeds: Sequence[int], out: Path, run: Callable[..., None]
) -> dict[str, float]:
    """The rate of each method that validates best with the first seed; `run` writes to `out`."""
    while True:
        run(rates, seeds[:1])
        best = chosen(out)
        if lost := rates.keys() - best.keys():
            raise SystemExit(f"{', '.join(sorted(lost))}: no rate that was tried has ended well")
        wider = {name: with_neighbours(tried, best[name]) for name, tried in rates.items()}
        if wider == {name: tuple(tried) for name, tried in rates.items()}:
            return best
        rates = wider


def with_neighbours(tried: Sequence[float], best: float) -> tuple[float, ...]:
    """The rates that were tried, and those beside the best."""
    at = LADDER.index(best)
    return tuple(sorted({*tried, *LADDER[max(at - 1, 0) : at + 2]}))


def compare(
    target: Target,
    rates: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    out: Path,
    options: Mapping[str, object],
    overlays: Sequence[str] = (),
) -> None:
    """Runs `litflora compare`; without rates a tuning has the head's alone."""
    named = {tuning(name): of_name for name, of_name in rates.items()}
    lrs = [f"{name}={rate:g}" for name, of_name in named.items() for rate in of_name]
    words = ["compare", target.recipe, "--tunings", *named, "--lrs", *lrs]
    words += ["--seeds", *seeds, "--out", out]
    words += [word for path in overlays for word in ("--config", path)]
    words += [word for key, value in options.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "litflora", *map(str, words)]
    subprocess.run(command, check=True, cwd=HERE, env={"OMP_NUM_THREADS": "1", **os.environ})


def tuning(name: str) -> str:
    """The class or the recipe of a name."""
    own = f"{name}.yaml"
    return own if (HERE / own).is_file() else name


def chosen(out: Path) -> dict[str, float]:
    """The rates that a compare has chosen, by name."""
    with (out / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["chosen"] == "1"]
    names = {tuning(name): name for name in {**RATES, **KERNELS, "Probe": ()}}
    return {names[row["tuning"]]: float(row["lr"]) for row in rows if row["lr"]}


def show(methods: Path, out: Path) -> None:
    """Prints and writes the tables, and draws the picture."""
    found = study_tables.results(methods)
    heads = study_tables.tries(out / "head" / "results.csv", out / "head")
    rates = heads + study_tables.tries(out / "rates.csv", methods)
    text = f"{study_tables.table(found)}\n\n{study_tables.tried(rates)}"
    print(text)
    write(out / "table.md", text)
    study_tables.draw(found, rates).savefig(out / "study.png")


if __name__ == "__main__":
    main()
