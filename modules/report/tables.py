"""Tables of the page."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ..monitored import lower_is_better
from .logged import UNREADABLE
from .points import Point, Report, Sweep, averaged, rate_text, shown, table_of
from .told import notes

MOST_CLASSES = 30


def table(caption: str, head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is wider than the page; the first column heads rows.

    Cells are HTML.
    """
    heads = "".join(f'<th scope="col">{each}</th>' for each in head)
    rows = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in body
    )
    said = escape(caption)
    return (
        f'<p class="soft">{said}.</p>'  # no <caption>: it would scroll with the table
        f'<div class="scroll" tabindex="0" role="region" aria-label="{said}">'
        f'<table aria-label="{said}"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
        "</div>"
    )


def results(report: Report) -> str:
    """A row for each tuning and rank; the best mean of the test metric over all seeds is marked."""
    points = report.points
    metric = points[0].test_metric
    head, body = table_of(points)
    means = [statistics.mean(p.test) if p.whole else math.nan for p in points]
    finite = [mean for mean in means if math.isfinite(mean)]
    best = (min if lower_is_better(metric) else max)(finite) if finite else math.nan
    rows = []
    for cells, mean in zip(body, means, strict=True):
        first, test, *rest = map(escape, cells)
        bold = shown(mean) == shown(best) and math.isfinite(mean)
        rows.append([first, f"<strong>{test}</strong>" if bold else test, *rest])
    caption = f"{averaged(len(points[0].seeds))}; the best {metric} is bold"
    below = escape(" ".join(notes(report)))
    return f'{table(caption, list(map(escape, head)), rows)}<p class="soft">{below}</p>'


def sweeps(found: Sequence[Sweep], metric: str) -> str:
    """The validation metric at each rate, the chosen one marked, and which lie at an end.

    Nothing if none was to choose, and all have come to a number.
    """
    several = [sweep for sweep in found if len(sweep.values) > 1]
    if not several and all(sweep.chosen for sweep in found):
        return ""
    tried = {rate for sweep in found for rate in sweep.values}
    rates = [*sorted(rate for rate in tried if rate is not None), *({None} & tried)]
    body = [[escape(sweep.label), *(_swept(sweep, rate) for rate in rates)] for sweep in found]
    caption = f"Mean {metric} at each rate; the chosen rate is bold"
    ends = [s.label for s in several if {min(s.values), max(s.values)} & set(s.chosen)]
    told = (
        '<p class="soft">Chosen at the end of what was tried, so that a rate beyond it may be '
        f"better: {escape(', '.join(ends))}.</p>"
    )
    return table(caption, ["tuning", *map(rate_text, rates)], body) + (told if ends else "")


def _swept(sweep: Sweep, rate: float | None) -> str:
    value = sweep.values.get(rate, "")
    text = value if isinstance(value, str) else shown(value)
    return f"<strong>{text}</strong> (chosen)" if rate in sweep.chosen else text


def classes(points: Sequence[Point]) -> str:
    """The score of each class, those that the points differ on first; nothing without tables."""
    found = {point.label: _class_scores(point) for point in points}
    found = {label: scores for label, scores in found.items() if scores}
    if not found:
        return ""
    names = list(dict.fromkeys(name for scores in found.values() for name in scores))
    rows = {name: [scores.get(name, math.nan) for scores in found.values()] for name in names}
    order = sorted(rows, key=lambda name: -_range(rows[name]))
    body = [
        [escape(name), *map(_scored, rows[name]), f"{_range(rows[name]):.3f}"]
        for name in order[:MOST_CLASSES]
    ]
    more = len(order) - MOST_CLASSES
    kind = next(p.stem.partition("_")[2] for point in points for p in _class_files(point))
    caption = f"Test {kind} of each class, mean over seeds" + (f"; {more} more" if more > 0 else "")
    return table(caption, ["class", *map(escape, found), "difference"], body)


def _class_files(point: Point) -> list[Path]:
    return [path for folder in point.folders for path in folder.glob("test/class_*.csv")]


def _class_scores(point: Point) -> dict[str, float]:
    """The mean over seeds of each class's score."""
    found: dict[str, list[float]] = {}
    for path in _class_files(point):
        for name, score in _scores_in(path):
            found.setdefault(name, []).append(score)
    return {name: statistics.mean(scores) for name, scores in found.items()}


def _scores_in(path: Path) -> list[tuple[str, float]]:
    """Classes and their scores; nothing of a file that is no such table."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [(name, float(score)) for name, score in list(csv.reader(file))[1:]]
    except UNREADABLE:
        return []


def _range(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return max(finite) - min(finite) if finite else 0.0


def _scored(score: float) -> str:
    """A score with a bar as long as it is high."""
    if not math.isfinite(score):
        return "–"
    return f'<span class="score" style="--share:{100 * score:.0f}%">{score:.3f}</span>'
