"""`litflora inspect`: what a recipe would adapt, or a saved adapter does, and what it costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import composed

if TYPE_CHECKING:
    from ..module import TuningModule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe or folder; what else is said is kept as overrides of the recipe."""
    parser.add_argument("what", metavar="RECIPE_OR_ADAPTER", help="recipe, YAML file or folder")
    parser.add_argument("--weights", help="base weights in place of those named")
    parser.add_argument(
        "--spectra", action="store_true", help="also what a saved adapter changed, weight by weight"
    )
    parser.epilog = (
        "Any option of fit may follow a recipe: --config tuning/lora, for one. "
        "`litflora inspect data RECIPE` draws training samples."
    )


def run(args: argparse.Namespace) -> None:
    """Prints the table of deltas, the number of parameters and the bytes kept for backward."""
    adapter = Path(args.what).is_dir()
    if args.spectra and not adapter:
        raise ValueError("--spectra shows what was trained: give the folder of a saved adapter")
    model, data = _saved(args) if adapter else _composed(args)

    from ..adapters import summary

    images = composed.blank(model, data)
    print(summary(model.net, model.example(images)))
    print(f"for one batch of {len(images)} images of {composed.pixels(images)} pixels")
    if args.spectra:
        from ..callbacks.spectra import measure

        print(measure(model))
    if adapter:
        for file in sorted(Path(args.what).iterdir()):
            print(f"{file.stat().st_size:>12,} bytes  {file}")


def _composed(args: argparse.Namespace) -> tuple[TuningModule, dict[str, Any]]:
    """The model of a recipe, and the settings of its data."""
    made = composed.of(args.what, args.overrides, args.weights)
    return made.model, made.data


def _saved(args: argparse.Namespace) -> tuple[TuningModule, dict[str, Any]]:
    """The model of a saved adapter, and the settings of the data it was trained with."""
    from ..adapters import read_config
    from ..module import from_adapter

    if args.overrides:
        raise ValueError(
            f"a saved adapter is shown as it is: leave out {' '.join(args.overrides)}\n"
            "--weights alone may be given, if its base has moved"
        )
    model = from_adapter(args.what, **({"weights": args.weights} if args.weights else {}))
    model.configure_model()
    return model, read_config(args.what)["metadata"].get("data", {}).get("init_args", {})
