"""A delta: a trainable change dW of one weight tensor, in that tensor's stored shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from .base import Base
from .errors import AdapterError
from .tucker import Factors

Kind = Literal["linear", "conv", "depthwise", "embedding", "attention", "parameter"]
Path = Literal["auto", "side", "rebuilt", "merged"]
PATHS = get_args(Path)
COMPUTED: tuple[Path, ...] = PATHS[1:]  # "auto" is one of these


@dataclass(frozen=True)
class WeightInfo:
    """What a delta must know of the weight it changes.

    Attributes:
        name: Dotted name of the weight in its model, for messages.
        shape: The stored shape.
        kind: What the weight is used for.
        out_dim: The mode that indexes outputs.
        in_dim: The mode that indexes inputs.
        groups: Groups of a convolution.
        padding_idx: The row of an embedding that must stay untouched.
        has_side: Whether the layer can run a low-rank chain beside its own operation.
        dtype: Type of the delta's parameters: the base's, but at least float32.
        device: Where the delta's parameters live.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    out_dim: int = 0
    in_dim: int = 1
    groups: int = 1
    padding_idx: int | None = None
    has_side: bool = True
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None

    def on(self, device: torch.device | None) -> WeightInfo:
        """The same for a delta that lives on another device; None leaves it with its weight."""
        return self if device is None else replace(self, device=device)

    @property
    def spatial(self) -> tuple[int, ...]:
        """The kernel modes of a convolution."""
        return tuple(range(2, len(self.shape))) if self.kind in ("conv", "depthwise") else ()


@dataclass(frozen=True)
class RankMode:
    """A rank of a delta that can be made smaller, slice by slice (see `budget`).

    Attributes:
        place: Which of the delta's ranks it is.
        tensors: Name and dimension of each parameter that the slices run through. A slice of which
            the first is zero adds nothing to dW.
        least: How many slices have to stay.
    """

    place: int
    tensors: tuple[tuple[str, int], ...]
    least: int


class Delta(nn.Module):
    """Base class of every delta.

    A method derives from it, holds its factors as parameters, and says in ``compose`` how they
    make dW. If dW has a Tucker form, ``tucker`` returns it and the layer can run the cheap chain
    beside its own operation; otherwise the layer runs once with ``W + dW``.

    Attributes:
        info: The weight that is changed.
        scale: The factor in front of dW.
        path: The computing path asked for.
        dropout: Probability of zeroing an input of the side path in training.
        clamped: Whether a larger rank was asked for than the weight has.
        recompute: Whether an input that a norm or an activation made is made again in backward.
        base: Where it finds its weight; None until it is bound to one.
        budgeted: Whether a rank budget rules it: files then leave out what is zero of it.
    """

    registry: ClassVar[dict[str, type[Delta]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = Delta.registry.get(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"there is a delta class {cls.__name__} in {known.__module__} already")
        Delta.registry[cls.__name__] = cls

    def __init__(
        self, info: WeightInfo, scale: float = 1.0, path: Path = "auto", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if path not in PATHS:
            raise AdapterError(f"path must be one of {', '.join(PATHS)}, not {path!r}")
        if not math.isfinite(scale):
            raise AdapterError(f"the scale must be a finite number, not {scale!r}")
        if not 0.0 <= dropout < 1.0:
            raise AdapterError(f"dropout must be in [0, 1), not {dropout}")
        self.info = info
        self.scale = scale
        self.path: Path = path
        self.dropout = dropout
        self.clamped = False
        self.recompute = True
        self.base: Base | None = None
        self.budgeted = False

    def factory(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter of this delta's dtype and device."""
        return nn.Parameter(torch.empty(shape, dtype=self.info.dtype, device=self.info.device))

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that ``compose`` takes, in its order."""
        return tuple(self.parameters())

    def compose(self, *factors: Tensor) -> Tensor:
        """Makes dW, in the stored shape and with the scale, from ``factors``."""
        raise NotImplementedError

    def tucker(self) -> tuple[Tensor, Factors] | None:
        """The core and factors of dW without the scale, or None if dW has no such form."""
        return None

    def leaves(self) -> list[tuple[int, Delta | None]]:
        """Rows and delta of each slice of the output mode: one slice, but for a split delta."""
        return [(self.info.shape[self.info.out_dim], self)]

    def bind(self, base: Base) -> None:
        """Tells the delta where its weight is; `inject` and `load` do, before it is used."""
        self.base = base

    def start(self) -> None:
        """Sets what begins from the values of the weight; most deltas have nothing of the kind."""

    def weight(self) -> Tensor:
        """The weight that is changed, in the type that it is stored in.

        Raises:
            AdapterError: It has no memory yet.
        """
        assert self.base is not None, "bind comes first"
        weight = self.base.own(self.base.whole())
        if weight.is_meta and self.info.device != weight.device:
            raise AdapterError(
                f"{self.info.name}: {type(self).__name__.removesuffix('Delta')} begins from the "
                "base's values, which are read later here, as where the base is shared out: take "
                "a strategy that holds the whole base, such as ddp"
            )
        return weight

    def dense(self) -> Tensor:
        """Returns dW in the stored shape of the weight; differentiable."""
        return self.compose(*self.tensors())

    def reset_parameters(self) -> None:
        """Draws the factors afresh, such that dW is exactly zero."""
        raise NotImplementedError

    def ranks(self) -> tuple[int, ...]:
        """The rank of each mode; the mode's own size where it carries no factor."""
        raise NotImplementedError

    def rank_modes(self) -> list[RankMode]:
        """The ranks that can be made smaller; most methods have none."""
        return []

    def with_ranks(self, ranks: Sequence[int]) -> Delta:
        """The same delta of other ranks, on the meta device."""
        raise NotImplementedError

    def _like(self, **settings: Any) -> Delta:
        """The same delta with other settings, without memory."""
        info = replace(self.info, device=torch.device("meta"))
        return type(self)(info, **{**self.settings(), **settings})

    def frozen(self) -> set[str]:
        """Names of the delta's parameters that never train."""
        return set()

    def rates(self) -> dict[str, float]:
        """Names of parameters that learn faster or slower than the rest, and how many times."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Plain keyword arguments which, after ``info``, build this delta again."""
        return {"scale": self.scale, "path": self.path, "dropout": self.dropout}

    def extra_repr(self) -> str:
        """The shape, ranks and scale, as shown by ``print(model)``."""
        shape = "x".join(map(str, self.info.shape))
        ranks = "x".join(map(str, self.ranks()))
        return f"{shape}, rank={ranks}, scale={self.scale:g}"

    def _scaled(self, factor: Tensor) -> Tensor:
        """One factor, times the scale; of scale 1 the factor itself, for an operation less."""
        return factor if self.scale == 1.0 else factor * self.scale

    def _masked(self, dense: Tensor) -> Tensor:
        """Keeps the padding row of an embedding at zero."""
        if self.info.padding_idx is None:
            return dense
        keep = torch.arange(dense.shape[0], device=dense.device) != self.info.padding_idx
        return dense * keep.unsqueeze(1)
