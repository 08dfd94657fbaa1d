"""A metric against a cost, with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .svg import BOTTOM, HEIGHT, TOP, chart, focusable, frame, horizontal, marker, number, vertical

# Left, top, right and bottom.
Box = tuple[float, float, float, float]


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
    marks: Sequence[Mark],
    x_name: str,
    y_name: str,
    low_x: bool = True,
    low_y: bool = False,
    base: float | None = None,
) -> str:
    """Draws the marks; a ring and a line show the front.

    Args:
        marks: At least one.
        x_name: The cost.
        y_name: The metric.
        low_x: Whether little of x is good.
        low_y: Whether little of y is good.
        base: What x is before tuning, as a vertical line.
    """
    x = horizontal([*(mark.x for mark in marks), *([] if base is None else [base])])
    y = vertical([v for mark in marks for v in (mark.y - mark.spread, mark.y + mark.spread)])
    best = front(marks, low_x, low_y)
    steps = [f"{'M' if n == 0 else 'L'}{x(m.x):.1f} {y(m.y):.1f}" for n, m in enumerate(best)]
    parts = [frame(x, y, x_name, y_name), f'<path class="front" d="{"".join(steps)}"/>']
    if base is not None:
        parts.append(f'<path class="base" d="M{x(base):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    places = [(x(mark.x), y(mark.y)) for mark in marks]
    tags = _tags([mark.tag for mark in marks], places)
    for mark, (across, up), tag in zip(marks, places, tags, strict=True):
        drawn = marker(mark.series, across, up)
        if mark in best:
            drawn = f'<circle class="ring" cx="{across:.1f}" cy="{up:.1f}" r="10"/>{drawn}'
        if mark.spread:
            ends = y(mark.y - mark.spread), y(mark.y + mark.spread)
            drawn = f'<path class="bar" d="M{across:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>{drawn}'
        drawn += tag
        said = f"{mark.label}: {mark.y:.4g} at {number(mark.x)}"
        parts.append(focusable(said, drawn, mark.series))
    told = f"On the front: {', '.join(mark.label for mark in best)}."
    body = chart(f"{y_name} against {x_name}", told, parts)
    caption = escape(f"{y_name} against {x_name}. {told}")
    return f"<figure>{body}<figcaption>{caption}</figcaption></figure>"


def _tags(tags: Sequence[str], places: Sequence[tuple[float, float]]) -> list[str]:
    """What is written beside each mark, where there is room; nothing where there is none."""
    taken = [(x - 9, y - 9, x + 9, y + 9) for x, y in places]
    found = []
    for tag, (x, y) in zip(tags, places, strict=True):
        width = 7 * len(tag)
        starts = [(left, low) for low in (y - 7, y + 16) for left in (x + 10, x - 10 - width)]
        boxes = [(left, low - 10, left + width, low) for left, low in starts]
        free = [box for box in boxes if not any(_meet(box, other) for other in taken)]
        if not tag or not free:
            found.append("")
            continue
        taken.append(free[0])
        left, _, _, low = free[0]
        found.append(f'<text class="tag" x="{left:.1f}" y="{low:.1f}">{tag}</text>')
    return found


def _meet(one: Box, other: Box) -> bool:
    """Whether two boxes overlap."""
    return all(one[n] < other[n + 2] and other[n] < one[n + 2] for n in (0, 1))
