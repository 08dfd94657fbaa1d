"""Spectra: what a fit changed of each weight, as a table and a picture."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from ..adapters import SpectraReport, Spectrum, adapter_names, spectra, trainable_parameters
from ..adapters.quantized import first_quantized
from ..adapters.replacing import write_csv
from ..adapters.spectra import INTRUDERS_AMONG
from ..adapters.targets import head_names, is_inside
from ._files import log_dir, publish

if TYPE_CHECKING:  # a task imports its callbacks, not they the task
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..module import TuningModule

# Of the largest singular value; what is below is rounding in float32.
NOISE = 1e-6


class Spectra(Callback):
    """Writes ``spectra.csv`` and ``spectra.png`` into the log folder at the end of a fit.

    The table has a line for each weight that was adapted or has changed: the effective rank of each
    mode of dW at 90 % of its squared energy, ||dW|| / ||W||, and the intruder dimensions (see
    `litflora.adapters.spectra`). The picture also goes to every logger that takes figures or
    images. It shows the weights of the last step, under EMA their average. Where the base itself
    trained, it is read again at the end; nothing is kept during the run.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises if no process will hold the weights whole."""
        if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
            raise ValueError(
                "Spectra are of whole weights, and the processes share the model out: take "
                "trainer.strategy ddp, or leave Spectra out"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: TuningModule) -> None:
        """Finds the run's folder; raises if there will be nothing to compare with."""
        self.folder = log_dir(trainer)
        if quantized := first_quantized(pl_module):
            raise ValueError(
                f"Spectra needs the values of {quantized}, which is quantised: leave it out"
            )
        alone = adapter_names(pl_module) and not _trains_in_place(pl_module)
        if pl_module.weights is None and not alone:
            raise ValueError(
                "Spectra compares with the base, which weights null does not keep: give weights, "
                "or leave Spectra out"
            )
        if find_spec("matplotlib") is None:
            rank_zero_warn("no spectra are drawn: pip install 'litflora[plots]'")

    def teardown(self, trainer: Trainer, pl_module: TuningModule, stage: str) -> None:
        """Measures, writes and draws, once the adapter is saved: it can take minutes, and fail."""
        if stage != "fit" or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        assert self.folder is not None
        report = measure(pl_module)
        _write(report, self.folder / "spectra.csv")
        changed = any(row.relative_norm > 0 for row in report.rows)
        if changed and find_spec("matplotlib") is not None:
            publish(trainer, draw(report), self.folder / "spectra.png", "spectra")


def measure(module: TuningModule) -> SpectraReport:
    """What a module's tuning changed of its base, which is read again if it trained itself."""
    if adapter_names(module) and not _trains_in_place(module):
        return spectra(module.net)
    with torch.random.fork_rng(devices=[]):
        base = module.anew().build()
    return spectra(module.net, base.state_dict())


def _trains_in_place(module: TuningModule) -> bool:
    """Whether a weight of the base trains itself, besides those of heads."""
    assert module.net is not None
    heads = head_names(module.net)
    trained = trainable_parameters(module.net)["other"].items()
    return any(p.ndim > 1 and not is_inside(name, heads) for name, p in trained)


def _write(report: SpectraReport, path: Path) -> None:
    head = ("weight", "kind", "shape", "rank", "relative_norm", "intruders")
    write_csv(path, [head, *map(_cells, report.rows)])


def _cells(row: Spectrum) -> tuple[object, ...]:
    shape, ranks = ("x".join(map(str, sizes)) for sizes in (row.shape, row.ranks()))
    return row.name, row.kind, shape, ranks, f"{row.relative_norm:.6g}", row.intruders


def draw(report: SpectraReport) -> Figure:
    """Draws the spectra of the (out, rest) matrices, and three figures of each weight.

    Weights are coloured by the last word of their layer's name, and stand in the model's order.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    families = list(dict.fromkeys(map(_family, report.rows)))
    colors = {name: colormaps["tab20"](n % 20) for n, name in enumerate(families)}
    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
    axes = figure.subplot_mosaic([["values", "rank"], ["values", "norm"], ["values", "intruders"]])
    for row in report.rows:
        values = row.values[row.out_dim]
        seen = [value for value in values if value > NOISE * values[0]]
        axes["values"].plot(range(1, len(seen) + 1), seen, color=colors[_family(row)], lw=0.8)
    axes["values"].set(xlabel="index", ylabel="singular value of dW", yscale="log", xscale="log")
    _scatter(axes["rank"], report, colors, "effective rank", lambda row: row.ranks()[row.out_dim])
    _scatter(axes["norm"], report, colors, "||dW|| / ||W||", lambda row: row.relative_norm)
    _scatter(axes["intruders"], report, colors, "intruders", lambda row: row.intruders)
    axes["intruders"].set(xlabel="weight, from input to output", ylim=(-0.5, INTRUDERS_AMONG + 0.5))
    for name in ("rank", "norm", "intruders"):
        axes[name].xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes["rank"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=8)
    return figure


def _family(row: Spectrum) -> str:
    """The last part of a layer's name that is no number."""
    parts = (row.layer if row.param == "weight" else row.name).split(".")
    return next((part for part in reversed(parts) if not part.isdigit()), row.name)


def _scatter(
    axis: Axes,
    report: SpectraReport,
    colors: dict[str, Any],
    title: str,
    figure_of: Callable[[Spectrum], float],
) -> None:
    for name, color in colors.items():
        points = [(n, figure_of(row)) for n, row in enumerate(report.rows) if _family(row) == name]
        axis.scatter(*zip(*points, strict=True), color=color, s=12, label=name)
    axis.set(ylabel=title, ylim=(0, None))
