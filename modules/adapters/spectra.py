"""What a tuning changed: the spectrum of each dW, and what became of the weight's own.

The effective rank is that of "LoRA Learns Less and Forgets Less" (Biderman et al., arXiv
2405.09673, section 6): the least n whose n largest singular values hold 90 % of the squared energy.
A kernel is unfolded along each of its modes, as the higher-order SVD does (De Lathauwer et al.,
2000): these ranks are what a Tucker form of dW needs, mode by mode. Intruder dimensions are those
of Shuttleworth et al. (arXiv 2410.21228, algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .base import base_weight
from .errors import AdapterError
from .layers import AdapterSet
from .quantized import first_quantized
from .sharded import is_sharded
from .summary import text_table
from .targets import Candidate, candidates, head_names, is_inside

INTRUDERS_AMONG = 10
INTRUDER_COSINE = 0.5


@dataclass(frozen=True)
class Spectrum:
    """The change of one weight.

    Attributes:
        layer: Dotted name of the weight's layer.
        param: The weight's own name.
        kind: What the weight is used for.
        shape: The weight's stored shape.
        out_dim: The mode that indexes outputs.
        values: Singular values of dW, largest first, unfolded along each mode: those of
            ``out_dim`` are of the (out, rest) matrix.
        relative_norm: ||dW||_F / ||W||_F.
        intruders: How many of the first 10 left singular vectors of the (out, rest) matrix of
            W + dW have a cosine below 0.5, whatever its sign, with each left singular vector of W.
    """

    layer: str
    param: str
    kind: str
    shape: tuple[int, ...]
    out_dim: int
    values: tuple[tuple[float, ...], ...]
    relative_norm: float
    intruders: int

    @property
    def name(self) -> str:
        """Dotted name of the weight."""
        return f"{self.layer}.{self.param}".lstrip(".")

    def ranks(self, energy: float = 0.9) -> tuple[int, ...]:
        """The effective rank of each mode's unfolding; 0 where dW is zero.

        Args:
            energy: The share of the squared energy that it holds, in (0, 1].
        """
        if not 0.0 < energy <= 1.0:
            raise AdapterError(f"energy must lie in (0, 1], not {energy}")
        return tuple(_effective_rank(values, energy) for values in self.values)


@dataclass
class SpectraReport:
    """The changes of all weights; ``print`` shows them as a table."""

    rows: list[Spectrum] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.rows:
            return "no weight of two modes or more has changed"
        head = ("weight", "kind", "shape", "rank", "|dW|/|W|", "intruders")
        body = [
            (
                row.name,
                row.kind,
                "x".join(map(str, row.shape)),
                "x".join(map(str, row.ranks())),
                f"{row.relative_norm:.2e}",
                str(row.intruders),
            )
            for row in self.rows
        ]
        told = [
            "rank: effective, of each mode of dW, at 90 % of the squared energy",
            f"intruders: of the first {INTRUDERS_AMONG} left singular vectors of W + dW, those of "
            f"|cosine| < {INTRUDER_COSINE} with all of W",
        ]
        return "\n".join([*text_table(head, body), "", *told])


@torch.no_grad()
def spectra(model: nn.Module, base: Mapping[str, Tensor] | None = None) -> SpectraReport:
    """Measures what a tuning changed, weight by weight; a head that trained whole is left out.

    All is computed in the weights' type, float32 at least, one weight at a time.

    Args:
        model: A tuned model, merged or not. The change is the sum of its active adapters.
        base: The state dict from before the tuning. With it, what was trained in place counts
            too, and weights that are as they were are left out.

    Returns:
        The figures.

    Raises:
        AdapterError: There is neither adapter nor base, ``base`` lacks a weight, a change is not
            finite, or the weights are quantised or shared out among processes.
    """
    if is_sharded(model):
        raise AdapterError("the model is sharded: spectra are of whole weights")
    if quantized := first_quantized(model):
        raise AdapterError(f"{quantized} is quantised: litflora.nf4.dequantize(model) comes first")
    rows = [_spectrum(*change) for change in _changes(model, base)]
    if base is None and not rows:
        raise AdapterError("no adapter is active: base=, the state dict from before, is needed")
    return SpectraReport(rows)


def suggested_ranks(report: SpectraReport, energy: float = 0.9) -> dict[str, int | list[int]]:
    """Ranks that hold so much of each change: a ``rank_pattern`` for `FLoRA`.

    Args:
        report: What `spectra` gave, of a full tuning or of generous ranks.
        energy: The share of the squared energy of each mode's unfolding, in (0, 1].

    Returns:
        By the name of the layer (or of the weight, if it is not a layer's ``weight``) one rank for
        a matrix and one for each mode of anything else, all at least 1.
    """
    found: dict[str, int | list[int]] = {}
    # Patterns match ends of names too, and the first that fits counts: longer ones come first.
    for row in sorted(report.rows, key=lambda row: -len(row.name)):
        own = row.param == "weight" and row.kind != "parameter"
        ranks = [max(1, rank) for rank in row.ranks(energy)]
        found[row.layer if own else row.name] = ranks[0] if len(ranks) == 2 else ranks
    return found


def _changes(
    model: nn.Module, base: Mapping[str, Tensor] | None
) -> Iterator[tuple[Candidate, Tensor, Tensor]]:
    """Each weight that was tuned, as it was before, and its dW."""
    heads = head_names(model)
    for candidate in candidates(model):
        delta = _delta(candidate)
        if delta is None and (base is None or is_inside(candidate.layer, heads)):
            continue
        present = base_weight(candidate.module, candidate.param)
        before = present if base is None else _before(candidate, base)
        wide = torch.promote_types(before.dtype, torch.float32)
        before, present = before.to(present.device, wide), present.to(wide)
        change = present - before if delta is None else present - before + delta.to(wide)
        if delta is not None or bool(change.any()):
            yield candidate, before, change


def _delta(candidate: Candidate) -> Tensor | None:
    """The sum of the deltas that are active on a weight, merged or not."""
    adapters = getattr(candidate.module, "adapters", None)
    if not isinstance(adapters, AdapterSet):
        return None
    total = adapters.sums(adapters.active).get(candidate.param)
    if total is None:
        return None
    return total(*(t.to(torch.promote_types(t.dtype, torch.float32)) for t in total.tensors()))


def _before(candidate: Candidate, base: Mapping[str, Tensor]) -> Tensor:
    name, shape = candidate.info.name, candidate.info.shape
    if name not in base or tuple(base[name].shape) != shape:
        raise AdapterError(
            f"base has no {name} of shape {list(shape)}: give the state dict of this very model "
            "from before the tuning"
        )
    return base[name]


def _spectrum(candidate: Candidate, weight: Tensor, delta: Tensor) -> Spectrum:
    info = candidate.info
    if not bool(torch.isfinite(delta).all()):
        raise AdapterError(f"the change of {info.name} is not finite")
    # A matrix and its transpose share their values.
    modes = range(1 if delta.dim() == 2 else delta.dim())
    values = [tuple(torch.linalg.svdvals(_unfold(delta, mode)).tolist()) for mode in modes]
    size = float(weight.norm())
    before, after = _unfold(weight, info.out_dim), _unfold(weight + delta, info.out_dim)
    return Spectrum(
        layer=candidate.layer,
        param=candidate.param,
        kind=info.kind,
        shape=info.shape,
        out_dim=info.out_dim,
        values=tuple(values * 2 if delta.dim() == 2 else values),
        relative_norm=float(delta.norm()) / size if size else math.inf,
        intruders=_intruders(before, after),
    )


def _unfold(tensor: Tensor, mode: int) -> Tensor:
    """The matrix whose rows are indexed by one mode."""
    return tensor.movedim(mode, 0).flatten(1)


def _intruders(before: Tensor, after: Tensor) -> int:
    old = torch.linalg.svd(before, full_matrices=False).U
    new = torch.linalg.svd(after, full_matrices=False).U[:, :INTRUDERS_AMONG]
    nearest = (old.t() @ new).abs().amax(0)
    return int((nearest < INTRUDER_COSINE).sum())


def _effective_rank(values: tuple[float, ...], energy: float) -> int:
    squares = torch.tensor(values, dtype=torch.float64).square()
    shares = squares.cumsum(0)
    if shares[-1] == 0:
        return 0
    return int((shares < energy * shares[-1]).sum()) + 1
