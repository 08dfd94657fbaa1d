"""A metric against a cost, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .svg import chart, focusable, frame, horizontal, marker, number, vertical


@dataclass(frozen=True)
class Mark:
    """A point of the chart.

    Attributes:
        label: What it is.
        tag: What is written beside it.
        series: Decides its colour and shape.
        x: The cost.
        y: The metric.
        spread: Standard deviation of the metric.
    """

    label: str
    tag: str
    series: int
    x: float
    y: float
    spread: float


def front(marks: Sequence[Mark], low_x: bool, low_y: bool) -> list[Mark]:
    """The marks that none other beats in both, by x.

    Args:
        marks: All marks.
        low_x: Whether little of x is good.
        low_y: Whether little of y is good.
    """
    sign_x, sign_y = 1 if low_x else -1, 1 if low_y else -1
    found: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (sign_x * m.x, sign_y * m.y)):
        last = found[-1] if found else None
        tie = last is not None and (mark.x, mark.y) == (last.x, last.y)
        if last is None or tie or sign_y * mark.y < sign_y * last.y:
            found.append(mark)
    return found


def scatter(
    marks: Sequence[Mark], x_name: str, y_name: str, low_x: bool = True, low_y: bool = False
) -> str:
    """Draws the marks; a ring and a line show the front.

    Args:
        marks: At least one.
        x_name: The cost.
        y_name: The metric.
        low_x: Whether little of x is good.
        low_y: Whether little of y is good.
    """
    x = horizontal([mark.x for mark in marks])
    y = vertical([v for mark in marks for v in (mark.y - mark.spread, mark.y + mark.spread)])
    best = front(marks, low_x, low_y)
    steps = [f"{'M' if n == 0 else 'L'}{x(m.x):.1f} {y(m.y):.1f}" for n, m in enumerate(best)]
    parts = [frame(x, y, x_name, y_name), f'<path class="front" d="{"".join(steps)}"/>']
    for mark in marks:
        across, up = x(mark.x), y(mark.y)
        drawn = marker(mark.series, across, up)
        if mark in best:
            drawn = f'<circle class="ring" cx="{across:.1f}" cy="{up:.1f}" r="10"/>{drawn}'
        if mark.spread:
            ends = y(mark.y - mark.spread), y(mark.y + mark.spread)
            drawn = f'<path class="bar" d="M{across:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>{drawn}'
        drawn += f'<text class="tag" x="{across + 9:.1f}" y="{up - 7:.1f}">{mark.tag}</text>'
        said = f"{mark.label}: {mark.y:.4g} at {number(mark.x)}"
        parts.append(focusable(said, drawn, mark.series))
    told = f"On the front: {', '.join(mark.label for mark in best)}."
    body = chart(f"{y_name} against {x_name}", told, parts)
    caption = escape(f"{y_name} against {x_name}. {told}")
    return f"<figure>{body}<figcaption>{caption}</figcaption></figure>"
