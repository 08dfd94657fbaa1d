"""`litflora compare`: methods beside each other at equal budgets, each at its own best rate."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = (
    "Any option of fit may follow, and holds for all runs: --trainer.max_epochs 3, for one. Each "
    "method's rate is the one with the best validation metric, as a mean over the seeds; the test "
    "data are read for that one alone. A compare that was cut short goes on by the same command."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe and the axes; what else is said is kept as overrides of the recipe."""
    parser.add_argument("recipe", metavar="RECIPE", help="recipe or YAML file")
    tunings = "classes of litflora.adapters, as FLoRA, or recipes, as tuning/full"
    parser.add_argument("--tunings", nargs="+", metavar="NAME", required=True, help=tunings)
    ranks = "ranks of the methods that have one (default: each one's own)"
    parser.add_argument("--ranks", nargs="+", metavar="R", default=[], help=ranks)
    rates = "learning rates; NAME=RATE is one for that tuning alone (default: each one's own)"
    parser.add_argument("--lrs", nargs="+", metavar="RATE", default=[], help=rates)
    parser.add_argument("--seeds", nargs="+", metavar="N", default=["0"], help="(default: 0)")
    out = "folder to write to, new or of the same compare"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=out)
    parser.epilog = EPILOG


def run(args: argparse.Namespace) -> None:
    """Runs what is not done yet, and writes the tables and the page."""
    from . import axes

    chosen = axes.read(args)

    from .. import run_lock
    from . import data, folder, plan, running

    folder.check(args.out, chosen.recipe)
    cells, sizes = plan.cells(chosen, args.out)
    figures = running.prepare(cells, args.out)
    with run_lock.released():
        folder.take(args.out, chosen.recipe)
        if line := data.told(sizes, cells[0].all_runs[0].settings["trainer"]):
            print(line)
        running.run_all(cells, args.out, axes.command(args), figures)
