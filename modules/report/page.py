"""The page as a whole: what stands on it, and in which order."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from html import escape

from .. import __version__
from ..monitored import lower_is_better
from . import pictures, tables
from .curves import curves, dashes
from .logged import SOURCE, band, logged
from .points import Point, Report, deviation
from .scatter import Mark, scatter
from .style import STYLE
from .svg import COLOURS, marker
from .told import lead

_COSTS = {
    "parameters that train": lambda point: point.parameters,
    "seconds of training": lambda point: point.seconds,
    "MiB kept for backward": lambda point: point.saved_bytes / 2**20,
}
_MARKS = (
    "Numbers beside the marks are ranks, bars are the standard deviation over seeds. Rings and the "
    "dashed line are the front:"
)
# A browser holds the page to what it promises.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(report: Report) -> str:
    """The HTML of a compare; it needs no other file and no network."""
    title = f"{', '.join(report.tunings)} on {report.recipe}"
    series = {name: n for n, name in enumerate(report.tunings)}
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
        "Results": tables.results(report) if points else "",
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
    progress = f"<p>{escape(report.progress)}</p>" if report.progress else ""
    return (
        f'<header><p class="soft">litflora compare</p><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(lead(report))}</p>{progress}'
        f'<p class="soft">All runs had the same data and steps:</p><dl class="budget">{budget}</dl>'
        "</header>"
    )


def _swept_metric(points: Sequence[Point]) -> str:
    return points[0].val_metric if points else "validation metric"


def _mark(point: Point, series: dict[str, int], x: float) -> Mark:
    tag = "" if point.rank is None else str(point.rank)
    learnt = statistics.mean(point.test), deviation(point.test)
    return Mark(point.label, tag, series[point.tuning], x, *learnt)


def _costs(points: Sequence[Point], series: dict[str, int]) -> str:
    if not points:
        return ""
    metric = points[0].test_metric
    draw = partial(scatter, y_name=metric, low_y=lower_is_better(metric))
    charts = "".join(
        draw([_mark(point, series, cost(point)) for point in points], name)
        for name, cost in _COSTS.items()
    )
    said = f"{_MARKS} nothing else is better at no greater cost."
    key = f'<ul class="key">{_names(points, series)}</ul>'
    return f'<p class="soft">{said}</p>{key}<div class="grid-of charts">{charts}</div>'


def _names(points: Sequence[Point], series: dict[str, int]) -> str:
    """The lines of a legend of tunings."""
    names = dict.fromkeys(point.tuning for point in points)
    return "".join(_key(name, marker(series[name], 17, 8), series[name]) for name in names)


def _key(name: str, drawn: str, series: int) -> str:
    """A line of a legend."""
    label = escape(name)
    svg = f'<svg viewBox="0 0 34 16" class="s{series % COLOURS}" role="img" aria-label="{label}">'
    return f"<li>{svg}<title>{label}</title>{drawn}</svg>{label}</li>"


def _curves(points: Sequence[Point], series: dict[str, int]) -> str:
    points = [point for point in points if band(point.folders, point.val_metric)]
    if not points:
        return ""
    dashed, names = dashes(points, series), ""
    for point in points:
        line = f'<path class="curve" stroke-dasharray="{dashed[point.label]}" d="M0 8H34"/>'
        names += _key(point.label, line, series[point.tuning])
    said = "Lines are means over the seeds, bands go from the least to the greatest."
    key = f'<ul class="key">{names}</ul>'
    return f'<p class="soft">{said}</p>{key}{curves(points, series)}'


def _forgetting(points: Sequence[Point], series: dict[str, int]) -> str:
    """What was learnt against what is left of the source task, where runs have logged it."""
    points = [point for point in points if point.source]
    if not points:
        return ""
    metric = points[0].test_metric
    logs = [logged(folder, SOURCE) for point in points for folder in point.folders]
    base = next((log[0] for log in logs if 0 in log), None)
    marks = [_mark(point, series, statistics.mean(point.source)) for point in points]
    drawn = scatter(marks, SOURCE, metric, low_x=False, low_y=lower_is_better(metric), base=base)
    less = "To the right less is forgotten, and upwards more is learnt."
    said = f"{less} {_MARKS} nothing else has learnt more and forgotten no more."
    names = _names(points, series)
    if base is not None:
        names += _key("the base, before tuning", '<path class="base" d="M17 0V16"/>', 0)
    key = f'<ul class="key">{names}</ul>'
    return f'<p class="soft">{said}</p>{key}<div class="grid-of charts">{drawn}</div>'


def _pictures(points: Sequence[Point]) -> str:
    found = "".join(map(pictures.pictures, points))
    return f'<div class="grid-of">{found}</div>' if found else ""


def _commands(point: Point) -> str:
    lines = "\n".join(map(escape, [*point.commands, *point.tests]))
    return f"<details><summary>{escape(point.label)}</summary><pre>{lines}</pre></details>"


def _errors(errors: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<li><strong>{escape(n)}</strong>: {escape(why)}</li>" for n, why in errors)
    return f"<ul>{rows}</ul>" if rows else ""
