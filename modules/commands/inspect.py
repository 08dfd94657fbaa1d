"""`litflora inspect`: what a recipe would adapt, or a saved adapter does, and what it costs."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..module import TuningModule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe or folder; what else is said is kept as overrides of the recipe."""
    parser.add_argument("what", metavar="RECIPE_OR_ADAPTER", help="recipe, YAML file or folder")
    parser.add_argument("--weights", help="base weights in place of those named")
    parser.epilog = "Any option of fit may follow a recipe: --config tuning/lora, for one."


def run(args: argparse.Namespace) -> None:
    """Prints the table of deltas, the number of parameters and the bytes kept for backward."""
    adapter = Path(args.what).is_dir()
    model, data = _saved(args) if adapter else _composed(args)

    import torch

    from ..adapters import summary

    size = data.get("img_size") or model.img_size or model.net.pretrained_cfg["input_size"][-1]
    images = torch.zeros(data.get("batch_size", 1), 3, size, size)  # blank: no data is read
    print(summary(model.net, model.normalize(images)))
    print(f"for one batch of {len(images)} images of {size} x {size} pixels")
    if adapter:
        for file in sorted(Path(args.what).iterdir()):
            print(f"{file.stat().st_size:>12,} bytes  {file}")


def _composed(args: argparse.Namespace) -> tuple[TuningModule, dict[str, Any]]:
    """The model of a recipe, and the settings of its data."""
    from .train import build

    weights = ["--model.init_args.weights", args.weights] if args.weights else []
    model, data = build(["--config", args.what, *args.overrides, *weights])
    if model.weights == "pretrained":  # shapes are enough: nothing is fetched
        model.weights = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="weights is null")
        model.configure_model()
    return model, dict(data.hparams)


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
