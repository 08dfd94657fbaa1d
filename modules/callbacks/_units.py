"""Units: the blocks of a network that take turns in training."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Literal, get_args

from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..adapters.targets import is_inside, match_names, nearest
from ..backbones.blocks import blocks

Sampling = Literal["uniform", "stage", "param_budget"]
SAMPLINGS = get_args(Sampling)
DRAWS = 1000


@dataclass(frozen=True, eq=False)
class Unit:
    """What is frozen and trained as one.

    Attributes:
        name: Its name in the network; of several modules, the last one's.
        modules: They and all in them, by name.
    """

    name: str
    modules: dict[str, nn.Module]

    @property
    def stage(self) -> str:
        """The list that it lies in: blocks of a hierarchical backbone lie in one for each stage."""
        return self.name.rpartition(".")[0]

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters, by their names in the network."""
        return {
            f"{name}.{own}": parameter
            for name, module in self.modules.items()
            for own, parameter in module.named_parameters()
        }

    @cached_property
    def size(self) -> int:
        """Bytes of its parameters."""
        return size_of(self.parameters.values())


def find_units(net: nn.Module, patterns: Sequence[str] | None = None) -> list[Unit]:
    """The units of a network, in its order.

    They are timm's layers of blocks: a downsampling is one with the block that follows it.

    Args:
        net: A timm model, or a network with a ``group_matcher`` like theirs.
        patterns: Globs of names of modules that are a unit each, in place of the blocks.

    Raises:
        ValueError: There are none, or a pattern matches none.
    """
    if patterns is not None:
        return [Unit(name, {name: net.get_submodule(name)}) for name in _named(net, patterns)]
    try:
        found = blocks(net)
    except ValueError as error:
        raise ValueError(f"{error}, or name LISA's units: {_lists(net)}") from error
    layers = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    units: dict[int, dict[str, nn.Module]] = {}
    for name, module in found.items():
        first, _ = next(module.named_parameters(prefix=name))
        units.setdefault(layers[first], {})[name] = module
    return [Unit(list(modules)[-1], modules) for modules in units.values()]


def check_whole(units: list[Unit], optimizers: list[Optimizer]) -> None:
    """Raises ValueError if a unit has a parameter that does not train, or in no optimizer."""
    grouped = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    for unit in units:
        for name, parameter in unit.parameters.items():
            if not parameter.requires_grad:
                raise ValueError(
                    f"LISA is for blocks that train whole, and {name} is frozen: take "
                    "litflora.adapters.Full there, or name other blocks in LISA.units"
                )
            if id(parameter) not in grouped:
                raise ValueError(
                    f"{name} is in no group of the optimizer and would never train: "
                    "configure_optimizers must take all parameters, LISA freezes them itself"
                )


def _named(net: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The outermost modules that patterns match."""
    modules = net.named_modules()
    names = [name for name, m in modules if name and next(m.parameters(), None) is not None]
    hits: set[str] = set()
    for pattern in patterns:
        matched = match_names(pattern, names)
        if not matched:
            raise ValueError(
                f"LISA.units: {pattern!r} matches no module. {nearest(pattern, names)}"
            )
        hits.update(matched)
    chosen: list[str] = []
    for name in names:
        if name in hits and not is_inside(name, chosen):
            chosen.append(name)
    return chosen


def _lists(net: nn.Module) -> str:
    """What might be meant: patterns of the modules that list others."""
    kinds = (nn.ModuleList, nn.Sequential)
    named = ((name, m) for name, m in net.named_modules() if name and isinstance(m, kinds))
    return ", ".join(f"{name}.*" for name, module in named if len(module) > 1)


def choose(order: Sequence[Unit], active: int, sampling: Sampling) -> list[Unit]:
    """The units that train, of all in a random order.

    ``uniform`` takes the first ones. ``stage`` does too, but no second one of a stage before each
    other stage has had as many. ``param_budget`` takes the first one, and then as many as together
    have no more bytes than ``active`` units have on average.

    Args:
        order: All units.
        active: How many train, or the budget in units of average size.
        sampling: One of `SAMPLINGS`.
    """
    if sampling == "stage":
        order = _in_turns(order)
    if sampling != "param_budget":
        return list(order[:active])
    chosen, taken, whole = [order[0]], order[0].size, sum(unit.size for unit in order)
    for unit in order[1:]:
        taken += unit.size
        if taken * len(order) > active * whole:
            break
        chosen.append(unit)
    return chosen


def _in_turns(order: Iterable[Unit]) -> list[Unit]:
    """First a unit of each stage, then a second one of each, and so on."""
    seen: Counter[str] = Counter()
    turns: list[tuple[int, Unit]] = []
    for unit in order:
        turns.append((seen[unit.stage], unit))
        seen[unit.stage] += 1
    return [unit for _, unit in sorted(turns, key=lambda turn: turn[0])]


def choice_sizes(units: Sequence[Unit], active: int, sampling: Sampling) -> tuple[float, int]:
    """Bytes of chosen units: the mean of many choices, and what none has more of."""
    generator = random.Random(0)
    orders = (generator.sample(units, len(units)) for _ in range(DRAWS))
    sizes = [sum(unit.size for unit in choose(order, active, sampling)) for order in orders]
    descending = sorted(units, key=lambda unit: -unit.size)
    if sampling == "param_budget":
        budget = active * sum(unit.size for unit in units) // len(units)
        return fmean(sizes), max(descending[0].size, budget)
    return fmean(sizes), sum(unit.size for unit in choose(descending, active, sampling))


def rest(units: Iterable[Unit]) -> list[_BatchNorm]:
    """Freezes units: none of their gradients is left to be stepped by, no statistics run on.

    Returns:
        The norms whose statistics ran.
    """
    running: list[_BatchNorm] = []
    for unit in units:
        for parameter in unit.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        inside = (m for module in unit.modules.values() for m in module.modules())
        running += [norm for norm in inside if isinstance(norm, _BatchNorm) and norm.training]
    for norm in running:
        norm.eval()
    return running


def wake(units: Iterable[Unit], norms: Iterable[_BatchNorm]) -> None:
    """Undoes `rest`: everything requires a gradient, and what statistics ran run again."""
    for unit in units:
        for parameter in unit.parameters.values():
            parameter.requires_grad_(True)
    for norm in norms:
        norm.train()


def forget(units: Iterable[Unit], optimizers: Iterable[Optimizer]) -> None:
    """Drops what optimizers keep of units."""
    parameters = [p for unit in units for p in unit.parameters.values()]
    for optimizer in optimizers:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def lower_rates(optimizer: Optimizer, share: Callable[[], float]) -> None:
    """Has an optimizer step by a share of its rates, which its schedule does not see."""
    rates: list[Any] = []

    def before(*_: Any) -> None:
        rates[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * share()

    def after(*_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def state_sizes(optimizers: Iterable[Optimizer]) -> tuple[int, int]:
    """Bytes of optimizer state, and of the parameters that have any."""
    state, parameters = 0, 0
    for optimizer in optimizers:
        for parameter, kept in optimizer.state.items():
            state += size_of(value for value in kept.values() if isinstance(value, Tensor))
            parameters += size_of([parameter])
    return state, parameters


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
