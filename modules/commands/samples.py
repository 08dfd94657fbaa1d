"""`litflora inspect data`: training samples with their truth, as a picture, before any training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import copy
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import composed, out

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..drawing import Drawing

COLUMNS = 4
MOST = 100  # more give no picture that a viewer opens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the recipe and the picture; what else is said is kept as overrides of the recipe."""
    parser.add_argument("recipe", metavar="RECIPE", help="recipe or YAML file")
    shown = f"training samples to draw, 1 to {MOST} (default: 8)"
    parser.add_argument("--samples", type=int, metavar="N", default=8, help=shown)
    file = {"type": Path, "metavar": "FILE", "default": Path("samples.png")}
    parser.add_argument("--out", **file, help="PNG file to write (default: samples.png)")
    out.add_force(parser)
    parser.epilog = (
        "Any option of fit may follow a recipe: --data.init_args.root photos, for one. The first "
        "samples of the first epoch are drawn, each as it is and as it comes to training."
    )


def run(args: argparse.Namespace) -> None:
    """Draws samples of the training split, and prints what the data hold."""
    _check(args)
    made = composed.built(args.recipe, args.overrides)
    model, data = made.model, made.datamodule
    if not hasattr(data, "datasets") or not hasattr(model, "drawing"):
        what = f"{type(model).__name__} with {type(data).__name__}"
        raise ValueError(
            f"{what} cannot be shown: a model needs `drawing`, and its data `datasets`, as those "
            "of litflora have"
        )
    if hasattr(model, "encoder"):
        data.encoder = model.encoder
    data.prepare_data()
    data.setup("fit")

    from ..adapters.replacing import replacing

    drawing = model.drawing(data.class_names, getattr(data, "palette", ()))
    keys = list(islice(data.train_dataloader().sampler, args.samples))
    figure = sheet(drawing, _trained_on(model, data.datasets["train"]), keys)
    with replacing(args.out) as temporary:
        figure.savefig(temporary, bbox_inches="tight")
    print(f"data     {data.contents()}\nsamples  {args.out}")


def _trained_on(model: Any, dataset: Any) -> Any:
    """The samples as they come to training: conversations do so in tokens."""
    if not hasattr(model, "encoder"):
        return dataset
    from ..language.shown import as_trained

    shown = copy(dataset)
    shown.transform = partial(as_trained, model.encoder)
    return shown


def _check(args: argparse.Namespace) -> None:
    if not 1 <= args.samples <= MOST:
        raise ValueError(f"--samples must be 1 to {MOST}, not {args.samples}")
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {str(args.out)!r} is no PNG file: give a name that ends in .png")
    out.check(args.out, args.force)
    if find_spec("matplotlib") is None:
        raise ImportError("matplotlib draws the samples: pip install 'litflora[plots]'")


def sheet(drawing: Drawing, dataset: Any, keys: Sequence[int]) -> Figure:
    """Draws samples as they are beside what comes to training.

    Args:
        drawing: How the task draws them.
        dataset: A `SeededDataset`.
        keys: Those of the samples.
    """
    from torchvision.transforms import v2

    from ..drawing.base import grid, legend

    plain = copy(dataset)
    plain.transform = v2.ToImage()
    drawn = []
    for key in keys:
        image, target, name = drawing.shown(plain[key])
        trained, its_target, _ = drawing.shown(dataset[key])
        drawn += [(image, target, _short(name)), (trained, its_target, "in training")]
    columns = min(COLUMNS, len(drawn) * drawing.parts)
    in_row = columns // drawing.parts
    shares = [image.shape[-2] / image.shape[-1] for image, *_ in drawn]
    heights = [max(shares[start : start + in_row]) for start in range(0, len(drawn), in_row)]
    figure, axes = grid(heights, columns, alike=False)
    places = axes.reshape(-1, drawing.parts)
    entries = set()
    for place, (image, target, title) in zip(places, drawn, strict=False):
        entries |= drawing.sample(place, image, target)
        place[0].set_title(title, fontsize=9)
    for axis in places[len(drawn) :].flat:
        axis.set_axis_off()
    legend(figure, entries)
    return figure


def _short(name: str) -> str:
    """The end of a name, as long as there is room for above a picture."""
    return name if len(name) <= 36 else f"…{name[-35:]}"
