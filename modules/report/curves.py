"""Learning curves: the mean over seeds, and a band from the least to the greatest."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

from .logged import band
from .points import Point
from .svg import COLOURS, chart, focusable, frame, horizontal, vertical

# Of the ranks of a tuning, in the order that they stand in.
_DASHES = ("none", "7 3", "2 3", "9 3 2 3")


def dashes(points: Sequence[Point], series: dict[str, int]) -> dict[str, str]:
    """How the line of each point is dashed, by label: no two of a colour alike, of the first."""
    found, drawn = {}, dict.fromkeys(range(COLOURS), 0)
    for point in points:
        colour = series[point.tuning] % COLOURS
        found[point.label] = _DASHES[drawn[colour] % len(_DASHES)]
        drawn[colour] += 1
    return found


def curves(points: Sequence[Point], series: dict[str, int]) -> str:
    """Draws the validation metric of every point; all have logged it."""
    found = [(point, band(point.folders, point.val_metric)) for point in points]
    everything = [value for _, values in found for each in values.values() for value in each]
    steps = sorted({step for _, values in found for step in values})
    x = horizontal([0, *steps])
    y = vertical(everything)
    name = found[0][0].val_metric
    parts = [frame(x, y, "step", name)]
    dashed = dashes(points, series)
    for point, values in found:
        lows = [f"{x(s):.1f} {y(min(v)):.1f}" for s, v in values.items()]
        highs = [f"{x(s):.1f} {y(max(v)):.1f}" for s, v in values.items()]
        means = [(x(s), y(statistics.mean(v))) for s, v in values.items()]
        line = "L".join(f"{across:.1f} {up:.1f}" for across, up in means)
        dots = (f'<circle class="dot" cx="{a:.1f}" cy="{up:.1f}" r="2.5"/>' for a, up in means)
        drawn = (
            f'<path class="band" d="M{"L".join([*lows, *reversed(highs)])}Z"/>'
            f'<path class="curve" stroke-dasharray="{dashed[point.label]}" d="M{line}"/>'
            f"{''.join(dots)}"
        )
        last = statistics.mean(list(values.values())[-1])
        parts.append(focusable(f"{point.label}: ends at {last:.4g}", drawn, series[point.tuning]))
    ends = [f"{p.label} {statistics.mean(list(v.values())[-1]):.4g}" for p, v in found]
    told = f"At the end: {', '.join(ends)}."
    body = chart(f"{name} over the steps", told, parts)
    return f'<figure class="wide">{body}<figcaption>{escape(told)}</figcaption></figure>'
