"""Charts as SVG: scales, ticks, a frame, and marks that the keyboard reaches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import count

# One unit is about one pixel on a phone, so that text stays legible there.
WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 30, 44
COLOURS = 8
_ids = count()


@dataclass(frozen=True)
class Scale:
    """Maps values to places.

    Attributes:
        low: The value at ``start``.
        high: The value at ``end``.
        start: A place.
        end: The other.
        log: Whether by logarithm.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values within the range, at most about six."""
        if not self.log:
            return _linear_ticks(self.low, self.high)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**power for power in powers for step in steps]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) <= 6:
                break
        return found


def horizontal(values: Sequence[float]) -> Scale:
    """A scale from left to right, by logarithm if the values differ much."""
    log = min(values) > 0 and max(values) / min(values) > 8
    return Scale(*_room(values, log), LEFT, WIDTH - RIGHT, log)


def vertical(values: Sequence[float]) -> Scale:
    """A scale from below to above."""
    return Scale(*_room(values, False), HEIGHT - BOTTOM, TOP)


def _room(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The range of values with a margin."""
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** 0.08
        return low / margin, high * margin
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _linear_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def number(value: float) -> str:
    """A short number: 1.5k, 20M, 0.25."""
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"


def frame(x: Scale, y: Scale, x_name: str, y_name: str) -> str:
    """Grid lines with their values, and the names of the axes."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>']
    for tick in x.ticks():
        place = f"{x(tick):.1f}"
        parts.append(f'<path class="grid" d="M{place} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{place}" y="{bottom + 17}" class="mid">{number(tick)}</text>')
    for tick in y.ticks():
        place = f"{y(tick):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {place}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place}" dy="4" class="end">{number(tick)}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="mid name">{escape(x_name)}</text>')
    parts.append(f'<text x="4" y="14" class="name">{escape(y_name)}</text>')
    return "".join(parts)


def chart(title: str, description: str, parts: Iterable[str]) -> str:
    """An SVG with its text alternative."""
    key = f"chart{next(_ids)}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-labelledby="{key}t {key}d">'
        f'<title id="{key}t">{escape(title)}</title><desc id="{key}d">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def focusable(said: str, drawn: str, series: int) -> str:
    """What says its figures, above the chart, where a pointer or the keyboard is on it."""
    return (
        f'<g class="mark s{series % COLOURS}" tabindex="0" role="img" aria-label="{escape(said)}">'
        f'{drawn}<text class="tip end" x="{WIDTH - RIGHT}" y="14">{escape(said)}</text></g>'
    )


def marker(series: int, x: float, y: float, size: float = 5.5) -> str:
    """A shape for each series, so that colour alone tells nothing.

    There is one shape less than there are colours: both together come again late.
    """
    shapes = (
        "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0 -1 0Z",
        "M-.9 -.9H.9V.9H-.9Z",
        "M0 -1.25L1.25 0L0 1.25L-1.25 0Z",
        "M0 -1.15L1.1 .85H-1.1Z",
        "M0 1.15L1.1 -.85H-1.1Z",
        "M-.4 -1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
        "M-1.2 -.6H1.2V.6H-1.2Z",
    )
    shape = shapes[series % len(shapes)]
    return f'<path class="dot" transform="translate({x:.1f} {y:.1f}) scale({size})" d="{shape}"/>'
