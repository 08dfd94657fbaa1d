"""A budget of rank, spent where it matters (AdaLoRA, Zhang et al., arXiv 2303.10512).

What is counted are slices. One of AdaLoRA's is a triplet ``(P[:, i], E[i], Q[i])``. One of FLoRA's,
by analogy, is index j of one mode: ``core[..., j, ...]`` with the column ``A_n[:, j]``; the budget
counts those of all modes that carry a factor, and each mode keeps one at least.

    allocator = RankAllocator(model)
    schedule = BudgetSchedule(allocator.size, last=40, steps=1000, warmup=150, final=500)
    for step in range(1, 1001):
        ...                                # forward and backward
        if step < schedule.end:
            allocator.update()
        optimizer.step()
        if schedule.due(step):
            allocator.allocate(schedule(step))
        if schedule.due(step) or step > schedule.end:
            allocator.mask()

A slice that is masked has E[i], or its slice of the core, set to zero, and nothing else. As its
gradient is not zero it moves on, and competes when the budget is allocated again; after the end of
the schedule it is masked at every step. Files leave out slices that are zero (see `smaller`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta, RankMode
from .errors import AdapterError


@dataclass(frozen=True)
class BudgetSchedule:
    """A budget that falls with the cube of the time that is left (AdaLoRA, section 3.3).

    Attributes:
        first: Slices at the start.
        last: Slices at the end.
        steps: Steps of the optimizer in all.
        warmup: Steps before the budget falls.
        final: Steps after it has fallen.
        interval: Steps from one allocation to the next.
    """

    first: int
    last: int
    steps: int
    warmup: int = 0
    final: int = 0
    interval: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.end <= self.steps:
            raise AdapterError(
                f"{self.warmup} steps of warm-up and {self.final} at the end leave none of "
                f"{self.steps} for the budget to fall in"
            )
        if self.interval < 1 or not 0 < self.last <= self.first:
            raise AdapterError(
                f"a budget falls from {self.first} to {self.last} slices every {self.interval} "
                "steps: it cannot"
            )

    @property
    def end(self) -> int:
        """The step after which the budget is the last one, and spent."""
        return self.steps - self.final

    def __call__(self, step: int) -> int:
        """The budget after a step; the first is 1."""
        if step <= self.warmup:
            return self.first
        left = max(0.0, 1 - (step - self.warmup) / (self.end - self.warmup))
        return int(self.last + (self.first - self.last) * left**3)

    def due(self, step: int) -> bool:
        """Whether the budget is allocated after a step."""
        return step == self.end or (self.warmup < step < self.end and step % self.interval == 0)


@dataclass(frozen=True)
class _Slices:
    """The slices of one mode of a delta."""

    name: str
    delta: Delta
    mode: RankMode

    def tensors(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Full name, parameter and dimension of what the slices run through."""
        for name, dim in self.mode.tensors:
            yield f"{self.name}.{name}", self.delta.get_parameter(name), dim

    def __len__(self) -> int:
        return self.delta.ranks()[self.mode.place]


class RankAllocator:
    """Scores the slices of a model's deltas, and keeps the best of them all.

    Attributes:
        kept: For each mode of each delta, which of its slices are kept.
        budget: How many are kept.
    """

    def __init__(self, model: nn.Module, beta1: float = 0.85, beta2: float = 0.85) -> None:
        """Finds the slices.

        Args:
            model: A model with AdaLoRA or FLoRA that trains.
            beta1: Share of the smoothed sensitivity that a step keeps.
            beta2: The same for the uncertainty.

        Raises:
            AdapterError: There are no such deltas, or a beta does not lie in (0, 1).
        """
        check_betas(beta1, beta2)
        self._slices = list(_slices_of(model))
        if not self._slices:
            raise AdapterError(
                "a rank budget is for AdaLoRA or FLoRA, and no delta of theirs trains here"
            )
        self._betas = beta1, beta2
        self._parameters = {
            name: parameter
            for slices in self._slices
            for name, parameter, _ in slices.tensors()
            if parameter.requires_grad
        }
        self._sensitivity = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self._uncertainty = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self.kept: list[Tensor] = []
        for slices in self._slices:
            slices.delta.budgeted = True
            _, gate, _ = next(slices.tensors())
            self.kept.append(torch.ones(len(slices), dtype=torch.bool, device=gate.device))
        self.budget = self.size

    @property
    def size(self) -> int:
        """How many slices there are, masked or not."""
        return sum(map(len, self._slices))

    @property
    def least(self) -> int:
        """How many have to stay."""
        return sum(slices.mode.least for slices in self._slices)

    @property
    def modes(self) -> int:
        """How many modes the slices are of: one for each weight with AdaLoRA."""
        return len(self._slices)

    @torch.no_grad()
    def update(self, scale: float = 1.0) -> None:
        """Takes the gradients of a step into account (section 3.2, equations 8 to 10).

        Args:
            scale: What the gradients are a multiple of, as a gradient scaler makes them.
        """
        beta1, beta2 = self._betas
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            now = (parameter * parameter.grad).abs_() / scale
            mean = self._sensitivity[name].mul_(beta1).add_(now, alpha=1 - beta1)
            self._uncertainty[name].mul_(beta2).add_((now - mean).abs_(), alpha=1 - beta2)

    def allocate(self, budget: int) -> None:
        """Keeps as many slices as the budget has, the best of the whole model.

        Of equals the first in the model stay.

        Raises:
            AdapterError: The budget is less than what has to stay, or more than there is.
        """
        if not self.least <= budget <= self.size:
            raise AdapterError(
                f"the budget must lie between the {self.least} slices that have to stay and the "
                f"{self.size} that there are, not be {budget}"
            )
        scores = [self._scores(slices).cpu() for slices in self._slices]
        for slices, own in zip(self._slices, scores, strict=True):
            own[own.argsort(descending=True, stable=True)[: slices.mode.least]] = torch.inf
        order = torch.cat(scores).argsort(descending=True, stable=True)
        kept = torch.zeros(self.size, dtype=torch.bool)
        kept[order[:budget]] = True
        parts = kept.split([len(slices) for slices in self._slices])
        self.kept = [new.to(old.device) for old, new in zip(self.kept, parts, strict=True)]
        self.budget = budget

    def _scores(self, slices: _Slices) -> Tensor:
        """The sum over its tensors of a slice's mean score (equation 7, with equation 11's s)."""
        total = torch.zeros(len(slices))
        for name, _, dim in slices.tensors():
            if name in self._parameters:
                score = self._sensitivity[name] * self._uncertainty[name]
                means = score.movedim(dim, 0).reshape(len(slices), -1).mean(1)
                total = total.to(means) + means
        return total

    @torch.no_grad()
    def mask(self) -> None:
        """Sets to zero what is not kept."""
        for gate, dropped in self._gates():
            gate.masked_fill_(dropped, 0.0)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Sets to zero the gradients of what is not kept: it is as if that were not there."""
        for gate, dropped in self._gates():
            if gate.grad is not None:
                gate.grad.masked_fill_(dropped, 0.0)

    def _gates(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What is set to zero, and where."""
        for slices, kept in zip(self._slices, self.kept, strict=True):
            _, gate, dim = next(slices.tensors())
            yield gate, ~kept.view([-1 if n == dim else 1 for n in range(gate.ndim)])

    def state_dict(self) -> dict[str, Any]:
        """Averages by the name of their parameter, and what is kept."""
        averages = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty}
        kept = {"kept": list(self.kept), "budget": self.budget}
        return {**{key: dict(own) for key, own in averages.items()}, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a state over."""
        for own, key in ((self._sensitivity, "sensitivity"), (self._uncertainty, "uncertainty")):
            for name, value in own.items():
                value.copy_(state[key][name])
        self.kept = [new.to(old.device) for old, new in zip(self.kept, state["kept"], strict=True)]
        self.budget = state["budget"]


def check_betas(beta1: float, beta2: float) -> None:
    """Raises unless both lie between 0 and 1."""
    for name, beta in {"beta1": beta1, "beta2": beta2}.items():
        if not 0.0 < beta < 1.0:
            raise AdapterError(f"{name} must lie between 0 and 1, not {beta}")


def _slices_of(model: nn.Module) -> Iterator[_Slices]:
    for name, module in model.named_modules():
        if isinstance(module, Delta) and any(p.requires_grad for p in module.parameters()):
            for mode in module.rank_modes():
                yield _Slices(name, module, mode)
