"""`litflora calibrate`: which computing path is the fastest, here and for this model."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from . import composed

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe; what else is said is kept as overrides of it."""
    parser.add_argument("what", metavar="RECIPE", help="recipe or YAML file")
    parser.epilog = (
        "Any option of fit may follow: --data.init_args.batch_size 64, for one. The fastest paths "
        "are noted in ~/.cache/litflora/paths.json, which later fits follow; delete it to undo "
        "that. The environment variable LITFLORA_PATHS names another file."
    )


def run(args: argparse.Namespace) -> None:
    """Times the paths of every kind of layer, prints them, and writes the fastest to a file."""
    made = composed.of(args.what, args.overrides)

    from rich.console import Console
    from rich.progress import track

    from ..adapters import calibrate
    from ..adapters.measured import device_name, paths_file

    trainer = _trainer(made.trainer)
    device, plugin = trainer.strategy.root_device, trainer.precision_plugin
    net = plugin.convert_module(made.model.net).to(device)
    images = plugin.convert_input(composed.blank(made.model, made.data).to(device))
    show = partial(track, description="timing", console=Console(stderr=True))
    with plugin.forward_context():
        timings = calibrate(net, *made.model.example(images), progress=show)
    print(timings)
    print(f"timed on {device_name(device)}, for batches of {len(images)} images")
    print(f"{paths_file()}: every fit on this device follows it; delete it to go by the rule again")


def _trainer(settings: dict[str, Any]) -> Trainer:
    """Lightning's own, for the device and precision of the recipe: one process, no files."""
    from lightning.pytorch import Trainer

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    chosen = {key: settings[key] for key in ("accelerator", "precision")}
    return Trainer(devices=1, enable_model_summary=False, **chosen, **quiet)
