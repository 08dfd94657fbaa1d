"""Learning curves: the mean over seeds, and a band from the least to the greatest."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .points import Point
from .svg import chart, focusable, frame, horizontal, vertical

# Of the ranks of a tuning, in the order that they stand in.
DASHES = ("none", "7 3", "2 3", "9 3 2 3")


def logged(folder: Path, metric: str) -> dict[int, float]:
    """What a run has logged of a metric, by step; what is no number is left out."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(metric)]
    found = {int(row["step"]): float(row[metric]) for row in rows}
    return {step: value for step, value in found.items() if math.isfinite(value)}


def band(folders: Sequence[Path], metric: str) -> dict[int, list[float]]:
    """The values of all seeds at each step that all of them have logged."""
    runs = [logged(folder, metric) for folder in folders]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return {step: [run[step] for run in runs] for step in steps}


def curves(points: Sequence[Point], series: dict[str, int]) -> str:
    """Draws the validation metric of every point; nothing if none was logged."""
    found = [(point, band(point.folders, point.val_metric)) for point in points]
    found = [(point, values) for point, values in found if values]
    if not found:
        return ""
    everything = [value for _, values in found for each in values.values() for value in each]
    steps = sorted({step for _, values in found for step in values})
    x = horizontal([0, *steps])
    y = vertical(everything)
    name = found[0][0].val_metric
    parts = [frame(x, y, "step", name)]
    for point, values in found:
        same = [other for other, _ in found if other.tuning == point.tuning]
        dash = DASHES[same.index(point) % len(DASHES)]
        lows = [f"{x(s):.1f} {y(min(v)):.1f}" for s, v in values.items()]
        highs = [f"{x(s):.1f} {y(max(v)):.1f}" for s, v in values.items()]
        means = [f"{x(s):.1f} {y(statistics.mean(v)):.1f}" for s, v in values.items()]
        drawn = (
            f'<path class="band" d="M{"L".join([*lows, *reversed(highs)])}Z"/>'
            f'<path class="curve" stroke-dasharray="{dash}" d="M{"L".join(means)}"/>'
        )
        last = statistics.mean(list(values.values())[-1])
        parts.append(focusable(f"{point.label}: ends at {last:.4g}", drawn, series[point.tuning]))
    ends = [f"{p.label} {statistics.mean(list(v.values())[-1]):.4g}" for p, v in found]
    told = f"At the end: {', '.join(ends)}."
    body = chart(f"{name} over the steps", told, parts)
    return f'<figure class="wide">{body}<figcaption>{escape(told)}</figcaption></figure>'
