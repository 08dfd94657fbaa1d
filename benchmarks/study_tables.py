"""What a compare of the study has come to, as a table and a picture."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

SPLITS = "val", "test"


@dataclass(frozen=True)
class Result:
    """A tuning at its chosen rate; metrics in percent, a value for each seed.

    Attributes:
        name: Of the tuning.
        rate: Learning rate.
        parameters: That train, the head with them.
        val: Validation metric.
        test: Test metric.
        forgotten: Of the source accuracy, in points; empty if it was not asked for.
        ranks: Effective rank of dW along its outputs, median over the weights.
        norms: ||dW|| / ||W||, median over the weights.
        intruders: Intruder dimensions of all weights together.
    """

    name: str
    rate: str
    parameters: int
    val: list[float]
    test: list[float]
    forgotten: list[float]
    ranks: list[float]
    norms: list[float]
    intruders: list[float]


def results(out: Path) -> list[Result]:
    """The chosen tunings of a compare, in its order."""
    with (out / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["chosen"] == "1"]
    return [_result(out, list(group)) for _, group in groupby(rows, lambda row: row["tuning"])]


def table(found: Sequence[Result]) -> str:
    """A row for each tuning; parameters without the head's, which the probe has alone."""
    head = min(result.parameters for result in found)
    titles = ("tuning", "lr", "parameters", "val", "test", "each seed", "forgotten")
    titles += ("rank of dW", "norm of dW", "intruders")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for result in found:
        cells = (
            result.name,
            f"{float(result.rate):g}" if result.rate else "",
            f"{result.parameters - head:,}",
            spread(result.val),
            spread(result.test),
            ", ".join(f"{value:.1f}" for value in result.test),
            spread(result.forgotten),
            *(f"{statistics.mean(v):.3g}" if v else "" for v in (result.ranks, result.norms)),
            f"{statistics.mean(result.intruders):.0f}" if result.intruders else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def tried(path: Path) -> str:
    """The validation metric of the first seed at each rate, in percent; the chosen one is bold."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["lr"]]
    rates = sorted({float(row["lr"]) for row in rows})
    val = next(key for key in rows[0] if key.startswith("val/"))
    lines = [f"| tuning | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines.append("|---" * (len(rates) + 1) + "|")
    for name, group in groupby(rows, lambda row: row["tuning"]):
        cells = dict.fromkeys(rates, "")
        for row in group:
            mark = "**" if row["chosen"] == "1" else ""
            cells[float(row["lr"])] = f"{mark}{100 * float(row[val] or 'nan'):.1f}{mark}"
        lines.append(f"| {_name(name)} | {' | '.join(cells.values())} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def draw(found: Sequence[Result]) -> Figure:
    """The test metric against parameters, and against what was forgotten if that was asked for."""
    head = min(result.parameters for result in found)
    forgets = any(result.forgotten for result in found)
    figure = Figure(figsize=(12 if forgets else 6.5, 4.8), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2 if forgets else 1, squeeze=False, sharey=True)[0]
    for result in found:
        _point(axes[0], result, [float(result.parameters - head) or 1e3])
        if result.forgotten:
            _point(axes[1], result, result.forgotten)
    axes[0].set(xscale="log", xlabel="parameters that train, without the head (probe: none)")
    axes[0].set_ylabel("test metric, %")
    if forgets:
        axes[1].set(xscale="symlog", xlabel="points of source accuracy forgotten")
        axes[1].axvline(0, color="grey", lw=0.8)
    return figure


def _point(axis: Axes, result: Result, x: Sequence[float]) -> None:
    at, up = statistics.mean(x), statistics.mean(result.test)
    several = len(result.test) > 1
    axis.errorbar(
        at,
        up,
        yerr=statistics.stdev(result.test) if several else None,
        xerr=statistics.stdev(x) if len(x) > 1 else None,
        fmt="o",
        ms=4,
        lw=0.8,
    )
    axis.annotate(result.name, (at, up), xytext=(4, 4), textcoords="offset points", fontsize=8)


def _result(out: Path, rows: list[dict[str, str]]) -> Result:
    first = rows[0]
    val, test = (next(key for key in first if key.startswith(f"{split}/")) for split in SPLITS)
    folders = [out / row["folder"] for row in rows]
    spectra = [list(_lines(folder / "spectra.csv")) for folder in folders]
    return Result(
        name=_name(first["tuning"]),
        rate=first["lr"],
        parameters=int(first["parameters"]),
        val=[100 * float(row[val]) for row in rows],
        test=[100 * float(row[test]) for row in rows if row[test]],
        forgotten=[100 * lost for folder in folders for lost in _forgotten(folder)],
        ranks=[_median(int(line["rank"].split("x")[0]) for line in of) for of in spectra if of],
        norms=[_median(float(line["relative_norm"]) for line in of) for of in spectra if of],
        intruders=[sum(int(line["intruders"]) for line in of) for of in spectra if of],
    )


def _name(tuning: str) -> str:
    return tuning.removesuffix(".yaml").removeprefix("tuning/")


def _forgotten(folder: Path) -> list[float]:
    lost = [line["source/forgotten"] for line in _lines(folder / "metrics.csv")]
    return [float(value) for value in lost if value][-1:]


def _lines(path: Path) -> Iterator[dict[str, str]]:
    if path.is_file():
        with path.open(newline="") as file:
            yield from csv.DictReader(file)


def _median(values: Iterator[float]) -> float:
    return float(statistics.median(values))
