"""Times the computing paths of a model's layers, for "auto" to follow where they were timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .delta import COMPUTED, Delta, Path
from .errors import AdapterError
from .layers import Adapted, watched
from .measured import Table, check_writable, write_timed
from .paths import by_size, forced, possible
from .summary import text_table, untouched

# How often each path is timed, in turns with the others.
TURNS = 7

# From this ratio of a slow turn to a fast one on, the machine is doing something else, too.
BUSY = 1.5


@dataclass
class Timing:
    """What the paths of one kind of layer take.

    Attributes:
        key: The kind of layer: its weight, rank and computing type.
        rows: Positions that it maps.
        rule: The path that the rule takes.
        layers: Names of the model's layers of this kind.
        turns: Seconds of each forward and backward, by path.
    """

    key: str
    rows: int
    rule: str
    layers: list[str] = field(default_factory=list)
    turns: dict[str, list[float]] = field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """The median time of each path."""
        return {path: statistics.median(turns) for path, turns in self.turns.items()}

    @property
    def path(self) -> str:
        """The fastest path; the rule's own unless three turns in four show another to be faster."""
        seconds = self.seconds
        fastest = min(seconds, key=lambda path: seconds[path])
        clearly = self._quartiles(fastest)[1] < self._quartiles(self.rule)[0]
        return fastest if clearly else self.rule

    @property
    def spread(self) -> float:
        """A slow turn's time divided by a fast one's, where that is the largest."""
        return max(slow / fast for fast, slow in map(self._quartiles, self.turns))

    def _quartiles(self, path: str) -> tuple[float, float]:
        first, _, third = statistics.quantiles(self.turns[path], n=4)
        return first, third


class Timings(list[Timing]):
    """A timing for each kind of layer; ``print`` shows a table."""

    def __str__(self) -> str:
        heads = ("weight", "rows", "layers", *(f"{p} ms" for p in COMPUTED), "rule", "here")
        return "\n".join([*text_table(heads, [_cells(each) for each in self]), "", *self._notes()])

    def _notes(self) -> Iterator[str]:
        by_rule = sum(each.seconds[each.rule] * len(each.layers) for each in self)
        here = sum(each.seconds[each.path] * len(each.layers) for each in self)
        total = f"{1000 * by_rule:.1f} ms by the rule, {1000 * here:.1f} ms here"
        yield f"adapted layers, forward and backward: {total}"
        spread = max((each.spread for each in self), default=1.0)
        if spread > BUSY:
            yield f"! some turns took {spread:.1f} times as long as others: is the machine idle?"


def _cells(timing: Timing) -> tuple[str, ...]:
    taken = (timing.seconds.get(path) for path in COMPUTED)
    cells = ("-" if seconds is None else f"{1000 * seconds:.2f}" for seconds in taken)
    rows, layers = str(timing.rows), str(len(timing.layers))
    return (timing.key, rows, layers, *cells, timing.rule, timing.path)


@dataclass
class _Probe:
    """A layer as a forward met it."""

    layer: nn.Module
    leaves: list[Delta]
    x: Tensor
    timing: Timing


def calibrate(
    model: nn.Module, *inputs: Any, progress: Callable[[list[Any]], Iterable[Any]] = iter
) -> Timings:
    """Times every path of every kind of layer, and writes down the fastest (see `measured`).

    Call it with a batch like those of training, and under the autocast of training. The model is
    left as it was.

    Args:
        model: An adapted model, on the device that it will train on.
        inputs: What its forward takes.
        progress: Shows the progress over a list, such as `rich.progress.track`.

    Returns:
        A timing for each kind of layer that leaves a choice; the file has them, too.

    Raises:
        AdapterError: No layer leaves a choice, or the file cannot be written.
    """
    check_writable()
    probes = _probes(model, inputs)
    if not probes:
        raise AdapterError(
            "there is nothing to time: no layer of this model leaves the path to be chosen (there "
            "is no delta that trains, or they have dropout, half precision or a path asked for)"
        )
    for probe in progress(probes):
        _time(probe)
    found: Table = {}
    for probe in probes:
        found.setdefault(probe.timing.key, {})[probe.timing.rows] = probe.timing.path
    write_timed(probes[0].x.device, found)
    return Timings(probe.timing for probe in probes)


def _probes(model: nn.Module, inputs: tuple[Any, ...]) -> list[_Probe]:
    """One layer of each kind that leaves a choice, with an input of the right shape."""
    probes: dict[tuple[str, int], _Probe] = {}

    def look(name: str, layer: Adapted, x: Tensor) -> None:
        total = layer.known_sum()
        trained = total is not None and any(t.requires_grad for t in (x, *total.tensors()))
        if total is None or not trained:
            return
        choice = layer.choice(total, x, grad=True)
        if forced(choice) is not None or choice.rows < 1:
            return
        kind = choice.key(), choice.rows
        if kind not in probes:
            like = torch.randn_like(x).requires_grad_(x.requires_grad)
            rule = possible(by_size(choice), choice.info)
            probes[kind] = _Probe(layer, choice.leaves, like, Timing(*kind, rule))
        probes[kind].timing.layers.append(name)

    with watched(model, look), untouched(model), torch.enable_grad():
        model(*inputs)
    return list(probes.values())


def _time(probe: _Probe) -> None:
    """Times each path by turns, after one turn that does not count."""
    asked = [leaf.path for leaf in probe.leaves]
    times: dict[Path, list[float]] = {
        path: [] for path in COMPUTED if possible(path, probe.leaves[0].info) == path
    }
    try:
        for turn in range(TURNS + 1):
            for path in list(times)[:: 1 if turn % 2 == 0 else -1]:
                for leaf in probe.leaves:
                    leaf.path = path
                times[path].append(_seconds(probe))
    finally:
        for leaf, path in zip(probe.leaves, asked, strict=True):
            leaf.path = path
    for path, taken in times.items():
        probe.timing.turns[path] = taken[1:]


def _seconds(probe: _Probe) -> float:
    """Time of one forward and backward of a layer; of its own forward, without any hooks."""
    wanted: list[Tensor] = [p for p in probe.layer.parameters() if p.requires_grad]
    wanted += [probe.x] if probe.x.requires_grad else []
    _wait_for(probe.x.device)
    start = time.perf_counter()
    with torch.enable_grad():
        y = probe.layer.forward(probe.x)
        torch.autograd.grad(y, wanted, y.detach(), allow_unused=True)
    _wait_for(probe.x.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
