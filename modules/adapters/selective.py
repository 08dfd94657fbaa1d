"""Tunings that add nothing: they choose which of the base's own parameters train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .tuning import Tuning

NORMS = ("LayerNorm", "BatchNorm", "GroupNorm", "RMSNorm", "InstanceNorm", "GlobalResponseNorm")


class Selective(Tuning):
    """Base class of the tunings that choose among the base's own parameters."""

    def select(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """The parameters of ``model`` that train; those of the head are added by `inject`."""
        raise NotImplementedError


@dataclass
class Full(Selective):
    """Every parameter trains."""

    def select(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """All of them."""
        return model.parameters()


@dataclass
class Probe(Selective):
    """The head alone trains."""

    def select(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """None of them."""
        return iter(())


@dataclass
class Frozen(Selective):
    """Nothing trains."""

    def select(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """None of them."""
        return iter(())


@dataclass
class BitFit(Selective):
    """The biases train (Ben Zaken et al., arXiv 2106.10199), a norm layer's among them."""

    def select(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """Every parameter whose own name ends in "bias"."""
        return (p for name, p in model.named_parameters() if name.endswith("bias"))


@dataclass
class NormTuning(Selective):
    """The weights and biases of the norm layers train."""

    def select(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """The parameters of every module whose class is named like a norm layer."""
        for module in model.modules():
            if any(norm in cls.__name__ for cls in type(module).__mro__ for norm in NORMS):
                yield from module.parameters(recurse=False)
