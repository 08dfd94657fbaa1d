"""What a forward costs for inference, with the deltas beside the weights and merged into them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import report
import torch
from checks import check_outputs, sums
from models import Model
from report import ratio
from rich.progress import track
from timing import alternate
from torch import Tensor, nn
from variants import VARIANTS, head_of

from litflora.adapters import merge


@dataclass(frozen=True)
class Contestant:
    """Adapters that can be merged.

    Attributes:
        variant: The way of training that made them.
        merge: Merges them, in a way that can be undone.
        sums: W + dW of each adapted layer, by the weight's name in the base.
    """

    variant: str
    merge: Callable[[nn.Module], object]
    sums: Callable[[nn.Module], dict[str, Tensor]]


def peft_merge(net: nn.Module) -> None:
    net.merge_adapter()


def peft_sums(net: nn.Module) -> dict[str, Tensor]:
    from peft.tuners.lora import LoraLayer

    return {
        f"{name}.weight": layer.get_base_layer().weight + layer.get_delta_weight("default")
        for name, layer in net.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }


CONTESTANTS = {
    "FLoRA": Contestant("FLoRA auto, linear", merge, sums),
    "LoRA": Contestant("LoRA auto, linear", merge, sums),
    "PEFT LoRA": Contestant("PEFT LoRA, linear", peft_merge, peft_sums),
}


def table(model: Model, device: str, repetitions: int) -> str:
    """The table: each contestant unmerged and merged, relative to the base."""
    x, autocast = model.example().to(device), model.autocast(device)
    tolerance = 5e-2 if model.in_bf16(device) else 1e-4
    torch.manual_seed(0)
    nets = {"base": model.build().to(device).eval()}
    for name in track(CONTESTANTS, description="checking"):
        nets |= adapted(name, nets["base"], x, autocast, tolerance)
    runs = {name: partial(infer, net, x, autocast) for name, net in nets.items()}
    times = alternate(runs, device, repetitions)
    rows = [(name, f"{1000 * t:.1f}", ratio(t, times["base"])) for name, t in times.items()]
    return report.table(("inference", "ms", "/ base"), rows)


def adapted(
    name: str, base: nn.Module, x: Tensor, autocast: torch.autocast, tolerance: float
) -> dict[str, nn.Module]:
    """A contestant's two networks, whose outputs are compared with those of W + dW."""
    contestant = CONTESTANTS[name]
    net = VARIANTS[contestant.variant](deepcopy(base)).to(x.device).eval()
    fill(net, head_of(base))
    weights = contestant.sums(net)
    plain = infer(base, x, autocast)
    expected = infer(lambda x: torch.func.functional_call(base, weights, (x,)), x, autocast)
    nets = {f"{name}, unmerged": net, f"{name}, merged": deepcopy(net)}
    contestant.merge(nets[f"{name}, merged"])
    for each in nets.values():
        check_outputs(infer(each, x, autocast), expected, plain, tolerance)
    return nets


def fill(net: nn.Module, head: str) -> None:
    """Draws every factor: the dW of a new adapter is zero, and this one is about as large as W."""
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and f".{head}." not in f".{name}":
            nn.init.normal_(parameter, std=0.1)


@torch.no_grad()
def infer(net: Callable[[Tensor], Tensor], x: Tensor, autocast: torch.autocast) -> Tensor:
    with autocast:
        return net(x)
