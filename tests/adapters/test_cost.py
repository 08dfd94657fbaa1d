"""What a step costs, by what can be counted exactly: bytes kept, operations, compiled graphs.

Seconds are measured by benchmarks/step.py; here every figure is the same on every machine.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from litflora.adapters import FLoRA, LoRA, inject, summary

from .cases import randomize

LINEAR, ALL = "linear", "all"
HEADS = {"vit_tiny_patch16_224": "head", "convnext_atto": "head.fc"}


def tuned(name: str, tuning: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **options)
    inject(net, tuning, train=[HEADS[name]])
    randomize(net)
    return net


def kept(net: nn.Module, x: Tensor) -> int:
    saved = summary(net, x).saved_bytes
    assert saved is not None
    return saved


@pytest.mark.parametrize(
    ("name", "options", "targets", "full", "with_deltas"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}, LINEAR, 10_351_456, 6_652_224),
        ("convnext_atto", {}, LINEAR, 10_325_792, 5_262_880),
        ("convnext_atto", {}, ALL, 10_325_792, 5_387_616),
    ],
)
def test_bytes_kept(
    name: str, options: dict[str, Any], targets: str, full: int, with_deltas: int
) -> None:
    """Floats of full tuning, and of FLoRA: little beyond what frozen layers keep."""
    x = torch.randn(4, 3, 64, 64)
    assert kept(timm.create_model(name, num_classes=5, **options), x) == full
    assert kept(tuned(name, FLoRA(rank=4, targets=targets), **options), x) == with_deltas


def test_dropout_keeps_no_mask() -> None:
    x = torch.randn(4, 3, 64, 64)
    without, dropped = (
        kept(tuned("vit_tiny_patch16_224", LoRA(rank=4, dropout=p, path="side"), img_size=64), x)
        for p in (0.0, 0.1)
    )
    assert dropped == without


class Counting(TorchDispatchMode):
    """Counts the operations that do arithmetic."""

    SMALL = ("aten.view", "aten.t.", "aten.transpose", "aten.detach", "aten.expand", "aten.permute")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not str(func).startswith(self.SMALL):
            self.counts[str(func).removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


def products(path: str, tuning: type = FLoRA, width: int = 48) -> int:
    """Matrix products of a forward and backward of one adapted linear layer."""
    net = nn.Sequential(nn.Linear(32, width))
    inject(net, tuning(rank=4, targets=LINEAR, path=path))
    x = torch.randn(16, 32, requires_grad=True)
    with Counting() as counting:
        net(x).sum().backward()
    return sum(counting.counts[f"aten.{name}"] for name in ("mm", "addmm", "addmm_"))


@pytest.mark.parametrize(("path", "count"), [("side", 9), ("rebuilt", 8), ("merged", 7)])
def test_products_of_lora(path: str, count: int) -> None:
    """Forward, input gradient, and for the factors: W + dW or the chain, and their gradients."""
    assert products(path, LoRA) == count


@pytest.mark.parametrize(("path", "count"), [("side", 8), ("rebuilt", 7), ("merged", 7)])
def test_few_inputs_read_the_gradient_once(path: str, count: int) -> None:
    """The gradients of the input and of what A made of it are one product."""
    assert products(path, LoRA, width=64) == count


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}),
        pytest.param("convnext_atto", {"depths": (1, 1, 1, 1)}, marks=pytest.mark.slow),
    ],
)
def test_a_training_step_compiles_to_one_graph(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    net, twin = (tuned(name, FLoRA(rank=2, targets=ALL), **options) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    for _ in range(3):
        losses = [
            step(model, parameters_of, x, y)
            for model, parameters_of in zip((compiled, twin), (net, twin), strict=True)
        ]
        torch.testing.assert_close(losses[0], losses[1])
    assert counter.frame_count == 1


def step(model: Any, owner: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    optimizer = torch.optim.SGD([p for p in owner.parameters() if p.requires_grad], 0.01)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
