"""What is said in words: which tuning comes out best, and what to know of the figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from ..monitored import lower_is_better
from .points import Point, Report, deviation, over, shown, spread


def lead(report: Report) -> str:
    """What came out, and how: the best by validation, for the best by the test would flatter."""
    tested = [point for point in report.points if point.whole]
    lost = "".join(f" {point.label} {point.lost}." for point in report.points if point.lost)
    if not tested:
        return f"No run has been tested{' yet' if report.progress else ''}.{lost}"
    return (
        f"{_best(tested, ' so far' if report.progress else '')} Each learning rate was chosen on "
        f"the validation data alone, and the test data were read for the chosen one only.{lost}"
    )


def _best(points: Sequence[Point], so_far: str) -> str:
    """Names the best by validation: all of them if the table shows them equal."""
    metric, seeds = points[0].val_metric, len(points[0].seeds)
    means = {point.label: statistics.mean(point.val) for point in points}
    order = sorted(points, key=lambda p: means[p.label], reverse=not lower_is_better(metric))
    best = [p for p in order if shown(means[p.label]) == shown(means[order[0].label])]
    close = ""
    for other in order[len(best) :][:1]:
        gap = abs(means[best[0].label] - means[other.label])
        widest = max(deviation(point.val) for point in (*best, other))
        if gap < widest:
            close = (
                f", {shown(gap)} ahead of {other.label} and so within the spread over seeds of "
                f"{shown(widest)}"
            )
    has, comes = ("has", "comes") if len(best) == 1 else ("have", "come")
    names, tests = _listed([p.label for p in best]), _listed([spread(p.test) for p in best])
    return (
        f"{names} {has} the best {metric}{so_far}{close}, and {comes} to {points[0].test_metric} "
        f"{tests} {over(seeds)}{', which has no spread' if seeds == 1 else ''}."
    )


def _listed(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def notes(report: Report) -> list[str]:
    """What to know of the table of results, as sentences."""
    costs = "Parameters and bytes are those of the start of training"
    later = ", ".join(f"{tuning} ({by})" for tuning, by in report.changing.items())
    found = [
        _tries(report.tunings),
        f"{costs}{f', and change later for {later}' if later else ''}.",
    ]
    if any(point.forgotten for point in report.points):
        found.append("Forgotten is the accuracy on the source data that the base had and lost.")
    return [sentence for sentence in found if sentence]


def _tries(tunings: Mapping[str, int]) -> str:
    """How many rates each tuning was tried at, if they differ: more tries may find a better one."""
    names: dict[int, list[str]] = {}
    for tuning, count in sorted(tunings.items(), key=lambda item: item[1]):
        names.setdefault(count, []).append(tuning)
    if len(names) < 2:
        return ""
    told = [
        f"{'one rate only' if count == 1 else f'{count} rates'} for {', '.join(of_count)}"
        for count, of_count in names.items()
    ]
    return f"Tries differ: {'; '.join(told)}."
