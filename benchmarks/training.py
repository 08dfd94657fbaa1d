"""What a training step costs: time, and bytes kept for backward."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import report
import torch
from checks import check_gradients
from models import Model
from report import ratio
from rich.progress import track
from timing import Stepper, alternate
from variants import VARIANTS


@dataclass
class Costs:
    """What was measured of each variant, by its name.

    Attributes:
        trained: Parameters that train.
        saved: Bytes kept for backward.
        times: Seconds of a step.
        peaks: Bytes allocated at most; empty where the device does not say.
    """

    trained: dict[str, int]
    saved: dict[str, int]
    times: dict[str, float]
    peaks: dict[str, int]


def compare(model: Model, variants: list[str], device: str, repetitions: int) -> Costs:
    """Checks, then measures."""
    for name in track(variants, description="checking"):
        if VARIANTS[name].exact:
            check_gradients(model, VARIANTS[name])
    steppers = build(model, variants, device)
    return Costs(
        trained={
            name: sum(p.numel() for p in stepper.model.parameters() if p.requires_grad)
            for name, stepper in steppers.items()
        },
        saved={name: stepper.saved() for name, stepper in steppers.items()},
        times=alternate({name: s.step for name, s in steppers.items()}, device, repetitions),
        peaks={name: s.peak() for name, s in steppers.items()} if device == "cuda" else {},
    )


def build(model: Model, variants: list[str], device: str) -> dict[str, Stepper]:
    """Each variant of the same network, on the same batch."""
    torch.manual_seed(0)
    base = model.build()
    steppers = {}
    for name in track(variants, description="building"):
        torch.manual_seed(0)
        net = VARIANTS[name](deepcopy(base)).to(device)
        x = model.example().to(device).requires_grad_(VARIANTS[name].reaches_input)
        steppers[name] = Stepper(net, x, model.autocast(device))
    return steppers


def table(costs: Costs) -> str:
    """The figures, and their ratios to those of full tuning, of PEFT and of the floor."""
    bases = {"/ full": "full", "/ PEFT": "PEFT LoRA, linear", "/ floor": "floor"}
    memory = {head: bases[head] for head in ("/ full", "/ PEFT")}
    heads = ["variant", "trained", "ms", *bases, "saved MiB", *memory]
    rows = []
    for name, time in costs.times.items():
        cells = [name, f"{costs.trained[name] / 1e6:.2f} M", f"{1000 * time:.0f}"]
        cells += [ratio(time, costs.times.get(base)) for base in bases.values()]
        cells += [f"{costs.saved[name] / 2**20:.1f}"]
        cells += [ratio(costs.saved[name], costs.saved.get(base)) for base in memory.values()]
        if costs.peaks:
            peak, other = costs.peaks[name], costs.peaks.get(bases["/ PEFT"])
            cells += [f"{peak / 2**20:.1f}", ratio(peak, other)]
        rows.append(cells)
    return report.table(heads + (["peak MiB", "/ PEFT"] if costs.peaks else []), rows)


def draw(costs: Costs, title: str, path: Path) -> None:
    """Two bars for each variant, relative to full tuning; nothing where that was left out."""
    times, saved = costs.times, costs.saved
    if "full" not in times:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.5 + 0.4 * len(times)), layout="constrained")
    axes, places = figure.subplots(), range(len(times))
    for shift, label, values in ((-0.2, "time", times), (0.2, "bytes kept for backward", saved)):
        heights = [values[name] / values["full"] for name in times]
        axes.barh([place + shift for place in places], heights, 0.38, label=label)
    if "floor" in times:
        axes.axvline(times["floor"] / times["full"], color="grey", linestyle=":", linewidth=1)
    axes.set(yticks=list(places), yticklabels=list(times), title=f"{title}, full tuning = 1")
    axes.invert_yaxis()
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
