"""Convolutions without overlap, computed as matrix products on patches."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litflora.adapters import FLoRA, LoRA, inject
from litflora.adapters.forms import Patches

from .cases import Holder, assert_close, assert_gradients_close, factors, randomize, with_deltas

KERNELS: dict[str, Any] = {"square": 2, "wide": (1, 3), "all": (4, 6)}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Sizes of the inputs that were cut into patches."""
    seen: list[torch.Size] = []
    gather = Patches.input

    def watched(self: Patches, x: Tensor) -> Tensor:
        seen.append(x.shape)
        return gather(self, x)

    monkeypatch.setattr(Patches, "input", watched)
    return seen


def channels_together(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def built(kind: str, method: type, path: str) -> tuple[Holder, Holder, Tensor]:
    kernel = KERNELS[kind]
    torch.manual_seed(0)
    base = Holder(nn.Conv2d(5, 40, kernel, stride=kernel)).double()
    model = deepcopy(base)
    inject(model, method(rank=3, path=path, targets="layer"))
    randomize(model)
    return model, base, channels_together(torch.randn(1, 5, 4, 6, dtype=torch.float64))


@pytest.mark.parametrize("path", ["side", "rebuilt", "merged"])
@pytest.mark.parametrize("method", [FLoRA, LoRA])
@pytest.mark.parametrize("kind", KERNELS)
def test_patches_equal_w_plus_dw(
    kind: str, method: type, path: str, calls: list[torch.Size]
) -> None:
    model, base, x = built(kind, method, path)
    x = channels_together(x).requires_grad_()
    calls.clear()
    y, expected = model(x), with_deltas(base, model, x)
    assert calls, "the convolution was not computed on patches"
    assert_close(y, expected, 1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_gradients_close(y, expected, [x, *factors(model)])
    with torch.no_grad():
        assert_close(model.eval()(x), expected, 1e-12)


@pytest.mark.parametrize("path", ["side", "rebuilt", "merged"])
def test_second_derivatives_and_a_trained_weight(path: str) -> None:
    model, base, x = built("square", FLoRA, path)
    model.layer.weight.requires_grad_(True), model.layer.bias.requires_grad_(True)
    x = channels_together(x).requires_grad_()
    leaves = [x, model.layer.weight, model.layer.bias, *factors(model)]

    def second(run: Callable[[], Tensor]) -> list[Tensor]:
        first = torch.autograd.grad(run().pow(3).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))

    delta = model.layer.adapters["default"]["weight"]

    def explicit() -> Tensor:
        weight = model.layer.weight + delta.dense()
        return base.layer._conv_forward(x, weight, model.layer.bias)

    for one, other in zip(second(lambda: model(x)), second(explicit), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_dropout_drops_the_same_inputs_in_both_directions() -> None:
    _, base, x = built("square", LoRA, "side")
    tuning = LoRA(rank=3, dropout=0.4, targets="layer")
    model = deepcopy(base)
    inject(model, tuning), randomize(model)
    direction = channels_together(torch.randn_like(x))

    def output(point: Tensor) -> Tensor:
        torch.manual_seed(1)
        return model(point).square().sum()

    x = channels_together(x).requires_grad_()
    (gradient,) = torch.autograd.grad(output(x), x)
    step = 1e-5
    slope = (output(x + step * direction) - output(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, (5, 6)),  # does not divide
        ({"padding": (0, 2)}, (4, 6)),
        ({"groups": 5, "out": 10}, (4, 6)),
        ({"dilation": 2}, (4, 6)),
        ({"stride": 1}, (4, 6)),
        ({}, (40, 60)),  # more numbers in the input than in the weight
    ],
)
def test_other_convolutions_are_left_to_torch(
    change: dict[str, Any], size: tuple[int, int], calls: list[torch.Size]
) -> None:
    change = dict(change)
    out, stride = change.pop("out", 12), change.pop("stride", 2)
    base = Holder(nn.Conv2d(5, out, 2, stride=stride, **change)).double()
    model = deepcopy(base)
    inject(model, FLoRA(rank=3, targets="layer")), randomize(model)
    x = channels_together(torch.randn(1, 5, *size, dtype=torch.float64))
    assert_close(model(x), with_deltas(base, model, x), 1e-12)
    assert not calls
