"""Times the computing paths of a model's layers, for "auto" to follow where they were timed."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta, Path
from .errors import AdapterError
from .functions import compute_dtype
from .layers import Adapted, watched
from .measured import Table, check_writable, write
from .ops import rows
from .paths import Choice, by_size, forced, possible
from .summary import untouched

PATHS: tuple[Path, ...] = ("side", "rebuilt", "merged")

# Another path than the rule's must be faster by more than timing is uncertain.
CLEARLY = 0.97


@dataclass
class Timing:
    """What the paths of one kind of layer take.

    Attributes:
        key: The kind of layer: its weight, rank and computing type.
        rows: Positions that it maps.
        rule: The path that the rule takes.
        layers: Names of the model's layers of this kind.
        seconds: Median time of a forward and backward, by path.
    """

    key: str
    rows: int
    rule: str
    layers: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The fastest path; the rule's own if no other is clearly faster."""
        fastest = min(self.seconds, key=lambda path: self.seconds[path])
        clearly = self.seconds[fastest] < CLEARLY * self.seconds[self.rule]
        return fastest if clearly else self.rule


@dataclass
class _Met:
    """A layer as a forward met it."""

    layer: nn.Module
    leaves: list[Delta]
    x: Tensor
    timing: Timing


def calibrate(model: nn.Module, *inputs: Any, repetitions: int = 7) -> list[Timing]:
    """Times every path of every kind of layer, and writes down the fastest (see `measured`).

    Call it with a batch like those of training, and under the autocast of training. The model is
    left as it was.

    Args:
        model: An adapted model, on the device that it will train on.
        inputs: What its forward takes.
        repetitions: How often each path is timed, in turns with the others.

    Returns:
        A timing for each kind of layer that leaves a choice; the file has them, too.

    Raises:
        AdapterError: No layer leaves a choice, or the file cannot be written.
    """
    from rich.console import Console  # the engine as such needs torch alone
    from rich.progress import track

    check_writable()
    met = _meet(model, inputs)
    if not met:
        raise AdapterError(
            "there is nothing to time: no layer of this model leaves the path to be chosen (they "
            "have dropout, weights in half precision, a path that was asked for, or no delta)"
        )
    for each in track(met, description="timing", console=Console(stderr=True)):
        _time(each, repetitions)
    found: Table = {}
    for each in met:
        found.setdefault(each.timing.key, {})[each.timing.rows] = each.timing.path
    write(met[0].x.device, found)
    return [each.timing for each in met]


def _meet(model: nn.Module, inputs: tuple[Any, ...]) -> list[_Met]:
    """One layer of each kind that leaves a choice, with an input of the right shape."""
    met: dict[tuple[str, int], _Met] = {}

    def look(name: str, layer: Adapted, x: Tensor) -> None:
        total = layer.adapters.applied().get("weight")
        if total is None or layer._litflora_op is None:
            return
        weight = layer.get_parameter("weight")
        count = rows(layer, x, total.terms[0][0])
        choice = Choice(total, count, weight, layer.training, True, compute_dtype(x))
        if forced(choice) is None:
            timing = Timing(choice.key(), count, possible(by_size(choice), choice.info))
            like = torch.randn_like(x).requires_grad_(x.requires_grad)
            found = met.setdefault((timing.key, count), _Met(layer, choice.leaves, like, timing))
            found.timing.layers.append(name)

    with watched(model, look), untouched(model), torch.enable_grad():
        model(*inputs)
    return list(met.values())


def _time(met: _Met, repetitions: int) -> None:
    """Times each path by turns, after one turn that does not count."""
    asked = [leaf.path for leaf in met.leaves]
    times: dict[Path, list[float]] = {
        path: [] for path in PATHS if possible(path, met.leaves[0].info) == path
    }
    try:
        for turn in range(repetitions + 1):
            for path in list(times)[:: 1 if turn % 2 == 0 else -1]:
                for leaf in met.leaves:
                    leaf.path = path
                times[path].append(_seconds(met))
    finally:
        for leaf, path in zip(met.leaves, asked, strict=True):
            leaf.path = path
    for path, taken in times.items():
        met.timing.seconds[path] = statistics.median(taken[1:])


def _seconds(met: _Met) -> float:
    """Time of one forward and backward of a layer."""
    wanted: list[Tensor] = [p for p in met.layer.parameters() if p.requires_grad]
    wanted += [met.x] if met.x.requires_grad else []
    _wait_for(met.x.device)
    start = time.perf_counter()
    y = met.layer(met.x)
    torch.autograd.grad(y, wanted, y.detach())
    _wait_for(met.x.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
