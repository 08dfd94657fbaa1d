"""The page as a whole: what stands on it, and in which order."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from html import escape

from .. import __version__
from . import pictures, tables
from .curves import DASHES, curves, logged
from .points import Point, Report, deviation, over, spread
from .scatter import Mark, scatter
from .style import STYLE
from .svg import COLOURS, marker

_COSTS = {
    "parameters that train": lambda point: point.parameters,
    "seconds of training": lambda point: point.seconds,
    "MiB kept for backward": lambda point: point.saved_bytes / 2**20,
}
# A browser holds the page to what it promises.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SOURCE = "source/acc"  # what a run logs of the data that its base came from


def page(report: Report) -> str:
    """The HTML of a compare; it needs no other file and no network."""
    title = f"{', '.join(dict.fromkeys(p.tuning for p in report.points))} on {report.recipe}"
    title = title if report.points else f"A compare on {report.recipe}"
    series = {name: n for n, name in enumerate(dict.fromkeys(p.tuning for p in report.points))}
    sections = [_opening(title, report), *map(_section, *_sections(report, series))]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"</head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _sections(report: Report, series: dict[str, int]) -> tuple[list[str], list[str]]:
    """Headings, and what stands below each; what is empty is left out."""
    points, tested = report.points, [point for point in report.points if point.whole]
    found = {
        "Results": tables.results(points) if points else "",
        "What it costs": _costs(tested, series),
        "Learning curves": _curves(points, series),
        "Learning rates": tables.sweeps(report.sweeps, _swept_metric(points)),
        "Classes": tables.classes(points),
        "Learnt and forgotten": _forgetting(tested, series),
        "Pictures of the runs": _pictures(points),
        "Commands": f"<pre>{escape(report.command)}</pre>{''.join(map(_commands, points))}",
        "Failed runs": _errors(report.errors),
    }
    shown = {heading: body for heading, body in found.items() if body}
    return list(shown), list(shown.values())


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{heading}</h2>{body}</section>"


def _opening(title: str, report: Report) -> str:
    budget = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in [*report.budget, ("litflora", __version__)]
    )
    undone = f"<p>{report.undone} runs are still to be done.</p>" if report.undone else ""
    return (
        f'<header><p class="soft">litflora compare</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(_lead(report.points))}</p>{undone}'
        f'<p class="soft">All runs had the same data and steps:</p><dl class="budget">{budget}</dl>'
        "</header>"
    )


def _lead(points: Sequence[Point]) -> str:
    """What came out, and how: the best by validation, for the best by the test would flatter."""
    tested = [point for point in points if point.whole]
    if not tested:
        return "No run has been tested yet."
    low = tested[0].val_metric.endswith("loss")
    best = (min if low else max)(tested, key=lambda p: statistics.mean(p.val))
    return (
        f"{best.label} has the best {best.val_metric}, and comes to {best.test_metric} "
        f"{spread(best.test)} {over(len(best.seeds))}. Each learning rate was chosen on the "
        "validation data alone, and the test data were read for the chosen one only."
    )


def _swept_metric(points: Sequence[Point]) -> str:
    return points[0].val_metric if points else "validation metric"


def _marks(points: Sequence[Point], series: dict[str, int], cost: str) -> list[Mark]:
    return [
        Mark(
            point.label,
            "" if point.rank is None else str(point.rank),
            series[point.tuning],
            _COSTS[cost](point),
            statistics.mean(point.test),
            deviation(point.test),
        )
        for point in points
    ]


def _costs(points: Sequence[Point], series: dict[str, int]) -> str:
    if not points:
        return ""
    metric = points[0].test_metric
    draw = partial(scatter, y_name=metric, low_y=metric.endswith("loss"))
    charts = "".join(draw(_marks(points, series, cost), cost) for cost in _COSTS)
    said = (
        "Numbers beside the marks are ranks, bars are the standard deviation over seeds. Rings "
        "and the dashed line are the front: nothing else is better at no greater cost."
    )
    names = "".join(_key(name, marker(n, 17, 8), n) for name, n in series.items())
    key = f'<ul class="key">{names}</ul>'
    return f'<p class="soft">{said}</p>{key}<div class="grid-of">{charts}</div>'


def _key(name: str, drawn: str, series: int) -> str:
    """A line of a legend."""
    label = escape(name)
    svg = f'<svg viewBox="0 0 34 16" class="s{series % COLOURS}" role="img" aria-label="{label}">'
    return f"<li>{svg}<title>{label}</title>{drawn}</svg>{label}</li>"


def _curves(points: Sequence[Point], series: dict[str, int]) -> str:
    drawn = curves(points, series)
    if not drawn:
        return ""
    names = []
    for point in points:
        same = [other.label for other in points if other.tuning == point.tuning]
        dash = DASHES[same.index(point.label) % len(DASHES)]
        line = f'<path class="curve" stroke-dasharray="{dash}" d="M0 8H34"/>'
        names.append(_key(point.label, line, series[point.tuning]))
    said = "Lines are means over the seeds, bands go from the least to the greatest."
    return f'<p class="soft">{said}</p><ul class="key">{"".join(names)}</ul>{drawn}'


def _forgetting(points: Sequence[Point], series: dict[str, int]) -> str:
    """What was learnt against what is left of the source task, where runs have logged it."""
    marks = []
    for point in points:
        kept = [list(log.values())[-1] for f in point.folders if (log := logged(f, SOURCE))]
        if kept:
            tag = "" if point.rank is None else str(point.rank)
            learnt = statistics.mean(point.test), deviation(point.test)
            left = statistics.mean(kept)
            marks.append(Mark(point.label, tag, series[point.tuning], left, *learnt))
    if not marks:
        return ""
    metric = points[0].test_metric
    said = "To the right less is forgotten, and upwards more is learnt."
    drawn = scatter(marks, SOURCE, metric, low_x=False, low_y=metric.endswith("loss"))
    return f'<p class="soft">{said}</p><div class="grid-of">{drawn}</div>'


def _pictures(points: Sequence[Point]) -> str:
    found = "".join(map(pictures.pictures, points))
    return f'<div class="grid-of">{found}</div>' if found else ""


def _commands(point: Point) -> str:
    lines = "\n".join(map(escape, [*point.commands, *point.tests]))
    return f"<details><summary>{escape(point.label)}</summary><pre>{lines}</pre></details>"


def _errors(errors: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<li><strong>{escape(n)}</strong>: {escape(why)}</li>" for n, why in errors)
    return f"<ul>{rows}</ul>" if rows else ""
