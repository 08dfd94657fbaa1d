"""The table of a compare in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .points import Report, averaged, table_of
from .told import notes


def markdown(report: Report) -> str:
    """The table of results, what to know of it, and the commands."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterable[str]:
    if report.progress:
        yield f"{report.progress}\n"
    head, body = table_of(report.points)
    yield _row(head)
    yield f"|{'---|' * len(head)}"
    yield from map(_row, body)
    said = [averaged(len(point.seeds)) + "." for point in report.points[:1]]
    said += ["Rates are chosen by validation alone.", *map(_text, notes(report))]
    yield f"\n{' '.join(said)}\n"
    for line in (report.command, *(each for point in report.points for each in point.tests)):
        yield re.sub("^", "    ", line, flags=re.MULTILINE)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_text, cells))} |"


def _text(text: str) -> str:
    """A text on one line, in which nothing is markup."""
    return re.sub(r"([\\|`<*\[&])", r"\\\1", " ".join(text.splitlines()))
