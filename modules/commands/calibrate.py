"""`litflora calibrate`: which computing path is the fastest, here and for this model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import composed

if TYPE_CHECKING:
    import torch

    from ..adapters.calibration import Timing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe; what else is said is kept as overrides of it."""
    parser.add_argument("what", metavar="RECIPE", help="recipe or YAML file")
    parser.epilog = "Any option of fit may follow: --data.init_args.batch_size 64, for one."


def run(args: argparse.Namespace) -> None:
    """Times the paths of every kind of layer, prints them, and writes the fastest to a file."""
    made = composed.of(args.what, args.overrides)

    import torch

    from ..adapters.calibration import calibrate
    from ..adapters.measured import device_name, file

    device, precision = _device(made.trainer["accelerator"]), str(made.trainer["precision"])
    dtype = _half(precision)
    net, images = made.model.net.to(device), composed.blank(made.model, made.data).to(device)
    if dtype is not None and precision.endswith("-true"):  # as Lightning does
        net, images = net.to(dtype), images.to(dtype)
    mixed = dtype is not None and precision.endswith("-mixed")
    with torch.autocast(device.type, dtype, enabled=mixed):
        timings = calibrate(net, images)
    print(*_table(timings), sep="\n")
    print(f"\ntimed on {device_name(device)}, for batches of {len(images)} images")
    print(f"{file()}: every fit on this device follows it; delete it to go by the rule again")


def _device(accelerator: str) -> torch.device:
    import torch

    if accelerator == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found


def _half(precision: str) -> torch.dtype | None:
    """The half-precision type that the trainer's precision names, if it names one."""
    import torch

    types = {"bf16": torch.bfloat16, "16": torch.float16}
    return types.get(precision.partition("-")[0])


def _table(timings: list[Timing]) -> list[str]:
    from ..adapters.calibration import PATHS
    from ..adapters.summary import table

    body = []
    for each in timings:
        taken = (each.seconds.get(path) for path in PATHS)
        cells = ("-" if seconds is None else f"{1000 * seconds:.2f}" for seconds in taken)
        rows, layers = str(each.rows), str(len(each.layers))
        body.append((each.key, rows, layers, *cells, each.rule, each.path))
    heads = (f"{path} ms" for path in PATHS)
    return table(("weight", "rows", "layers", *heads, "rule", "here"), body)
