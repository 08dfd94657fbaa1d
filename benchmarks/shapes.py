"""Forward and backward of single layers, by shape: the table behind the rule in `paths.py`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import report
import torch
from rich.progress import track
from torch import Tensor, nn

from litflora.adapters import FLoRA, LoRA, inject

WARMUP = 3  # turns in which the allocator settles


@dataclass(frozen=True)
class Shape:
    """A layer, the shape of its input without the batch, and whether that input has a gradient."""

    name: str
    build: Callable[[], nn.Module]
    x: tuple[int, ...]
    input_grad: bool = True


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> Callable:
    padding = kernel // 2 if stride == 1 else 0
    return lambda: nn.Conv2d(cin, cout, kernel, stride, padding, groups=groups)


def linear(cin: int, cout: int) -> Callable:
    return lambda: nn.Linear(cin, cout)


SHAPES = [  # a batch of four images of 224 pixels
    Shape("stem 4x4 s4, 3->96", conv(3, 96, 4, 4), (4, 3, 224, 224), input_grad=False),
    Shape("depthwise 7x7, 96 @56", conv(96, 96, 7, groups=96), (4, 96, 56, 56)),
    Shape("depthwise 7x7, 384 @14", conv(384, 384, 7, groups=384), (4, 384, 14, 14)),
    Shape("downsample 2x2 s2, 96->192 @56", conv(96, 192, 2, 2), (4, 96, 56, 56)),
    Shape("downsample 2x2 s2, 384->768 @14", conv(384, 768, 2, 2), (4, 384, 14, 14)),
    Shape("conv 3x3, 256->256 @14", conv(256, 256, 3), (4, 256, 14, 14)),
    Shape("linear 96->384, n=12544", linear(96, 384), (12544, 96)),
    Shape("linear 384->1536, n=784", linear(384, 1536), (784, 384)),
    Shape("linear 768->3072, n=196", linear(768, 3072), (196, 768)),
    Shape("linear 384->1152, n=788", linear(384, 1152), (788, 384)),
    Shape("linear 1536->384, n=788", linear(1536, 384), (788, 1536)),
    Shape("linear 1024->4096, n=577", linear(1024, 4096), (577, 1024)),
    Shape("linear 4096->4096, n=128", linear(4096, 4096), (128, 4096)),
]


def full(net: nn.Module) -> nn.Module:
    return net


def frozen(net: nn.Module) -> nn.Module:
    return net.requires_grad_(False)


def peft(net: nn.Module) -> nn.Module | None:
    from peft import LoraConfig, get_peft_model

    if getattr(net[0], "groups", 1) > 1:  # its rank must then be a multiple of the groups
        return None
    return get_peft_model(net, LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))


def ours(method: type, path: str) -> Callable[[nn.Module], nn.Module]:
    def make(net: nn.Module) -> nn.Module:
        inject(net, method(rank=8, path=path, targets="all"))
        return net

    return make


VARIANTS: dict[str, Callable[[nn.Module], Any]] = {
    "floor": frozen,
    "full": full,
    "PEFT LoRA": peft,
    "FLoRA side": ours(FLoRA, "side"),
    "FLoRA rebuilt": ours(FLoRA, "rebuilt"),
    "FLoRA merged": ours(FLoRA, "merged"),
    "FLoRA auto": ours(FLoRA, "auto"),
    "LoRA auto": ours(LoRA, "auto"),
}


def named(part: str) -> list[Shape]:
    return [shape for shape in SHAPES if part in shape.name]


def table(chosen: list[Shape], repetitions: int) -> str:
    """Time of each variant relative to full tuning of the layer, medians; CPU time."""
    rows = []
    for shape in track(chosen, description="shapes"):
        times = measure(shape, repetitions)
        cells = [
            f"{times[name] / times['full']:.2f}" if name in times else "-" for name in VARIANTS
        ]
        rows.append([shape.name, *cells])
    return report.table(["layer", *VARIANTS], rows)


def measure(shape: Shape, repetitions: int) -> dict[str, float]:
    nets = {}
    for name, make in VARIANTS.items():
        if name == "floor" and not shape.input_grad:
            continue
        torch.manual_seed(0)
        made = make(nn.Sequential(shape.build()))
        if made is not None:
            nets[name] = made.train()
    x = torch.randn(shape.x)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_(shape.input_grad)
    gy = torch.ones_like(nets["full"](x)).detach()
    times: dict[str, list[float]] = {name: [] for name in nets}
    for repetition in range(repetitions + WARMUP):
        for name in list(nets)[:: 1 if repetition % 2 == 0 else -1]:
            times[name].append(step(nets[name], x, gy))
    return {name: statistics.median(values[WARMUP:]) for name, values in times.items()}


def step(net: nn.Module, x: Tensor, gy: Tensor) -> float:
    net.zero_grad()
    x.grad = None
    start = time.process_time()
    net(x).backward(gy)
    return time.process_time() - start
