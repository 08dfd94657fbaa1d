"""What a compare of the study has come to, as tables and a picture."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

SPLITS = "val", "test"


@dataclass(frozen=True)
class Result:
    """A tuning at its chosen rate; metrics in percent, a value for each seed.

    Attributes:
        name: Of the tuning.
        rate: Learning rate, of which the head has its own.
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


@dataclass(frozen=True)
class Try:
    """One rate of a tuning, with the first seed; in percent and in points.

    Attributes:
        name: Of the tuning.
        rate: Learning rate.
        val: Validation metric.
        forgotten: Of the source accuracy; None if it was not asked for.
        chosen: Whether it validates best.
    """

    name: str
    rate: float
    val: float
    forgotten: float | None
    chosen: bool


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
            f"{float(result.rate):g}" if result.parameters > head else "",
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


def tries(path: Path, out: Path) -> list[Try]:
    """The rates in a table of a compare whose folder is, or was, ``out``."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["lr"]]
    val = next(key for key in rows[0] if key.startswith("val/"))
    return [
        Try(
            name=_name(row["tuning"]),
            rate=float(row["lr"]),
            val=100 * float(row[val] or "nan"),
            forgotten=next((100 * lost for lost in _forgotten(out, row)), None),
            chosen=row["chosen"] == "1",
        )
        for row in rows
    ]


def tried(found: Sequence[Try]) -> str:
    """The validation metric at each rate, and what was forgotten; the chosen one is bold."""
    rates = sorted({each.rate for each in found})
    lines = [f"| tuning | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines.append("|---" * (len(rates) + 1) + "|")
    for name, group in groupby(found, lambda each: each.name):
        cells = {each.rate: _cell(each) for each in group}
        lines.append(f"| {name} | {' | '.join(cells.get(rate, '') for rate in rates)} |")
    return "\n".join(lines)


def _cell(one: Try) -> str:
    mark = "**" if one.chosen else ""
    lost = "" if one.forgotten is None else f" ({one.forgotten:.1f})"
    return f"{mark}{one.val:.1f}{mark}{lost}"


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def draw(found: Sequence[Result], rates: Sequence[Try]) -> Figure:
    """The test metric against parameters and forgetting; learning and forgetting at every rate."""
    head = min(result.parameters for result in found)
    forgets = [each for each in rates if each.forgotten is not None and isfinite(each.val)]
    figure = Figure(figsize=(15 if forgets else 8, 4.8), dpi=100, layout="constrained")
    axes = figure.subplots(1, 3 if forgets else 1, squeeze=False)[0]
    looks = {result.name: _look(number) for number, result in enumerate(found)}
    for result in found:
        _point(axes[0], result, [float(result.parameters - head) or 1e3], looks[result.name])
        if forgets and result.forgotten:
            _point(axes[1], result, result.forgotten, looks[result.name])
    axes[0].set(xscale="log", xlabel="parameters that train, without the head (Probe: none)")
    axes[0].set_ylabel("test metric, %: mean and deviation over the seeds")
    if forgets:
        axes[1].sharey(axes[0])
        axes[1].set(xscale="symlog", xlabel="points of source accuracy forgotten")
        _tradeoffs(axes[2], forgets, looks)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _look(number: int) -> dict[str, str]:
    """A colour and a marker that no other of the first thirty has together."""
    return {"color": f"C{number % 10}", "marker": "osv"[number // 10]}


def _point(axis: Axes, result: Result, x: Sequence[float], look: Mapping[str, str]) -> None:
    at, up = statistics.mean(x), statistics.mean(result.test)
    errors = [statistics.stdev(of) if len(of) > 1 else None for of in (result.test, x)]
    axis.errorbar(at, up, *errors, ls="", ms=6, lw=0.8, label=result.name, **look)


def _tradeoffs(axis: Axes, rates: Sequence[Try], looks: Mapping[str, Mapping[str, str]]) -> None:
    """A line for each tuning from its lowest rate to its highest; the chosen one is larger."""
    for name, group in groupby(rates, lambda each: each.name):
        line = sorted(group, key=lambda each: each.rate)
        lost, val = [each.forgotten for each in line], [each.val for each in line]
        sizes = [80 if each.chosen else 20 for each in line]
        axis.plot(lost, val, lw=0.7, color=looks[name]["color"])
        axis.scatter(lost, val, s=sizes, **looks[name])
    axis.set(xscale="symlog", xlabel="points of source accuracy forgotten, at each rate")
    chosen = [each.val for each in rates if each.chosen]
    margin = max(chosen) - min(chosen) + 0.5
    axis.set_ylim(min(chosen) - margin, max(chosen) + margin / 4)  # the table has the ruined, too
    axis.set_ylabel("validation metric, %, first seed; chosen rates are large")


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
        forgotten=[100 * lost for row in rows for lost in _forgotten(out, row)],
        ranks=[_median(int(line["rank"].split("x")[0]) for line in of) for of in spectra if of],
        norms=[_median(float(line["relative_norm"]) for line in of) for of in spectra if of],
        intruders=[sum(int(line["intruders"]) for line in of) for of in spectra if of],
    )


def _name(tuning: str) -> str:
    return tuning.removesuffix(".yaml").removeprefix("tuning/")


def _forgotten(out: Path, row: Mapping[str, str]) -> list[float]:
    """What a run has logged last, if it was asked for and has come to an end."""
    val = next(row[key] for key in row if key.startswith("val/"))
    if not isfinite(float(val or "nan")):
        return []
    lines = _lines(out / row["folder"] / "metrics.csv")
    lost = [line.get("source/forgotten") for line in lines]
    return [float(value) for value in lost if value][-1:]


def _lines(path: Path) -> Iterator[dict[str, str]]:
    if path.is_file():
        with path.open(newline="") as file:
            yield from csv.DictReader(file)


def _median(values: Iterator[float]) -> float:
    return float(statistics.median(values))
