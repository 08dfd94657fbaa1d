"""Ways to train a model: whole, its head alone, with litflora's adapters, with those of others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litflora.adapters import FLoRA, LoRA, inject

RANK = 8
NONE: frozenset[str] = frozenset()
LINEAR = frozenset({"linear"})
DENSE = LINEAR | {"dense"}
ALL = DENSE | {"depthwise"}


@dataclass(frozen=True)
class Variant:
    """One way to train a model; calling it makes a network ready, in place.

    Attributes:
        tune: Takes the network and the names of the layers to adapt; returns what trains.
        kinds: Kinds of the layers that are adapted.
        reaches_input: Whether gradients go down to the input, as for an adapter in the first layer.
        exact: Whether the gradients are ours, and those of W + dW: dropout's are not.
    """

    tune: Callable[[nn.Module, list[str]], nn.Module]
    kinds: frozenset[str] = NONE
    reaches_input: bool = False
    exact: bool = False

    def __call__(self, net: nn.Module) -> nn.Module:
        """The network, ready to train."""
        return self.tune(net, layers(net, self.kinds))

    def suits(self, convolutional: bool) -> bool:
        """Whether it has something of its own to do: what adapts convolutions wants some."""
        return convolutional or self.kinds <= LINEAR


def layers(net: nn.Module, kinds: frozenset[str]) -> list[str]:
    """Names of the layers of some kinds: linear, dense (convolutions), depthwise; not the head."""
    head = {id(m) for m in net.get_classifier().modules()}
    return [
        name
        for name, module in net.named_modules()
        if id(module) not in head and kind_of(module) in kinds and not name.startswith("stem.")
    ]


def kind_of(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "dense" if module.groups == 1 else "depthwise"
    return ""


def head_of(net: nn.Module) -> str:
    """The name of the head."""
    return next(name for name, module in net.named_modules() if module is net.get_classifier())


def full(net: nn.Module, names: list[str]) -> nn.Module:
    return net


def frozen(net: nn.Module, names: list[str]) -> nn.Module:
    net.requires_grad_(False)
    net.get_classifier().requires_grad_(True)
    return net


def ours(method: type, **options: object) -> Callable[[nn.Module, list[str]], nn.Module]:
    def tune(net: nn.Module, names: list[str]) -> nn.Module:
        inject(net, method(rank=RANK, targets=names, **options), train=[head_of(net)])
        return net

    return tune


def peft(dropout: float = 0.0) -> Callable[[nn.Module, list[str]], nn.Module]:
    def tune(net: nn.Module, names: list[str]) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK,
            lora_alpha=16,
            lora_dropout=dropout,
            target_modules=names,
            modules_to_save=[head_of(net)],
        )
        return get_peft_model(net, config)

    return tune


def lycoris(net: nn.Module, names: list[str]) -> nn.Module:
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_name": names})
    wrapper = create_lycoris(
        net, 1.0, linear_dim=RANK, linear_alpha=RANK, algo="locon", use_tucker=True
    )
    wrapper.apply_to()
    frozen(net, names)
    wrapper.requires_grad_(True)
    net.lycoris = wrapper
    return net


class TwoOps(nn.Module):
    """The article's own way: the layer, and beside it the whole operation again with dW."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        shape = layer.weight.shape
        ranks = [min(RANK, n) if i < 2 else min(2, n) for i, n in enumerate(shape)]
        self.core = nn.Parameter(torch.zeros(ranks))
        self.factors = nn.ParameterList(
            nn.Parameter(torch.randn(n, r) / n**0.5) for n, r in zip(shape, ranks, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Two operations of full size."""
        dense = self.core
        for factor in self.factors:  # each contracts the first mode and appends its own
            dense = torch.tensordot(dense, factor, dims=([0], [1]))
        if isinstance(self.layer, nn.Linear):
            return self.layer(x) + F.linear(x, dense)
        return self.layer(x) + self.layer._conv_forward(x, dense, None)


def two_ops(net: nn.Module, names: list[str]) -> nn.Module:
    frozen(net, names)
    for name in names:
        net.set_submodule(name, TwoOps(net.get_submodule(name)))
    return net


VARIANTS: dict[str, Variant] = {
    "full": Variant(full),
    "probe": Variant(frozen),
    # The least that any adapter can cost: frozen layers, and the gradient down to the input.
    "floor": Variant(frozen, reaches_input=True),
    "PEFT LoRA, linear": Variant(peft(), LINEAR),
    "PEFT LoRA, linear, dropout": Variant(peft(dropout=0.1), LINEAR),
    "PEFT LoRA, linear + dense": Variant(peft(), DENSE),
    "LyCORIS LoCon-Tucker, all": Variant(lycoris, ALL),
    "article's two operations, all": Variant(two_ops, ALL),
    "FLoRA side, linear": Variant(ours(FLoRA, path="side"), LINEAR, exact=True),
    "FLoRA rebuilt, linear": Variant(ours(FLoRA, path="rebuilt"), LINEAR, exact=True),
    "FLoRA merged, linear": Variant(ours(FLoRA, path="merged"), LINEAR, exact=True),
    "FLoRA auto, linear": Variant(ours(FLoRA), LINEAR, exact=True),
    "FLoRA auto, linear, nothing recomputed": Variant(
        ours(FLoRA, recompute="none"), LINEAR, exact=True
    ),
    "LoRA auto, linear": Variant(ours(LoRA), LINEAR, exact=True),
    "LoRA auto, linear, dropout": Variant(ours(LoRA, dropout=0.1), LINEAR),
    "FLoRA auto, linear + dense": Variant(ours(FLoRA), DENSE, exact=True),
    "LoRA auto, linear + dense": Variant(ours(LoRA), DENSE, exact=True),
    "FLoRA auto, all": Variant(ours(FLoRA), ALL, exact=True),
}
