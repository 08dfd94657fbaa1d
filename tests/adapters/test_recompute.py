"""Inputs made by a norm or an activation are not kept: they are made again, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litflora.adapters import AdapterError, FLoRA, LoRA, inject, summary, unload
from litflora.adapters.recompute import _notes, note

from .cases import deltas, randomize

PATHS = ("side", "rebuilt", "merged")


class Block(nn.Module):
    def __init__(self, norm: nn.Module, act: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm, self.act = norm, act
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class InPlace(Block):
    """Changes the norm's output before the next layer reads it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.fc2(self.act(self.fc1(self.norm(x).mul_(2))))


NORMS = {"layer": nn.LayerNorm(8), "rms": nn.RMSNorm(8), "group": nn.GroupNorm(2, 8)}
ACTS = {"gelu": nn.GELU(), "tanh": nn.GELU("tanh"), "silu": nn.SiLU(), "relu": nn.ReLU()}


@contextmanager
def forgetting(model: nn.Module) -> Iterator[None]:
    """Takes the notes off the outputs, so that they are kept as torch would keep them."""
    noted = [m for m in model.modules() if note in m._forward_hooks.values()]
    assert noted
    handles = [m.register_forward_hook(lambda m, a, out: forget(out)) for m in noted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradients(model: nn.Module, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """The gradients of the factors; the backward runs outside autocast."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x).square().sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_without_notes(model: nn.Module, x: Tensor, autocast: bool = False) -> None:
    """Bit for bit."""
    found = gradients(model, x, autocast)
    with forgetting(model):
        expected = gradients(model, x, autocast)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def forget(output: Tensor) -> None:
    if output in _notes:
        del _notes[output]


def block(norm: str, act: str, path: str, kind: type[Block] = Block) -> Block:
    model = kind(deepcopy(NORMS[norm]), deepcopy(ACTS[act]))
    inject(model, FLoRA(rank=2, targets="linear", path=path))  # type: ignore[arg-type]
    randomize(model)
    return model


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_the_same_bit_for_bit(norm: str, act: str, path: str) -> None:
    assert_same_without_notes(block(norm, act, path), torch.randn(5, 8))


@pytest.mark.parametrize("path", PATHS)
def test_autocast_makes_the_same_again(path: str) -> None:
    assert_same_without_notes(block("layer", "gelu", path), torch.randn(5, 8), autocast=True)


@pytest.mark.parametrize("path", PATHS)
def test_what_is_kept_is_the_input_of_norm_and_activation(path: str) -> None:
    """Width 8 in float32: x, the first layer's and fc1's output, the norm's statistics."""
    model, x = block("layer", "gelu", path), torch.randn(100, 8)
    floats = 8 + 8 + 16 + 2
    small = 4 * sum(p.numel() for p in model.parameters())  # what the factors' own products keep
    saved = summary(model, x).saved_bytes
    assert saved is not None
    assert 100 * 4 * floats <= saved <= 100 * 4 * floats + small


def test_it_can_be_turned_off() -> None:
    models = []
    for recompute in ("pointwise", "none"):
        torch.manual_seed(0)
        model = Block(nn.LayerNorm(8), nn.GELU())
        inject(model, LoRA(rank=2, targets="linear", path="side", recompute=recompute))  # type: ignore[arg-type]
        randomize(model)
        models.append(model)
    x = torch.randn(100, 8)
    less, more = (summary(model, x).saved_bytes for model in models)
    assert less is not None
    assert more == less + 100 * 4 * (8 + 16)  # the outputs of the norm and of the activation
    found, expected = (gradients(model, x) for model in models)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(AdapterError, match="'pointwise' or 'none', not 'all'"):
        LoRA(recompute="all")  # type: ignore[arg-type]


def test_an_output_changed_in_place_is_kept_as_it_is() -> None:
    assert_same_without_notes(block("layer", "gelu", "side", InPlace), torch.randn(5, 8))


def test_a_norm_changed_before_backward_is_told() -> None:
    model = block("layer", "gelu", "side")
    loss = model(torch.randn(5, 8)).sum()
    with torch.no_grad():
        model.norm.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"LayerNorm was changed|modified by an inplace"):
        loss.backward()


def deltas_of(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_composes_with_checkpointing(reentrant: bool) -> None:
    model, x = block("layer", "gelu", "auto"), torch.randn(5, 8, requires_grad=True)
    plain = gradients(model, x)
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for name, parameter in deltas_of(model):
        assert torch.equal(parameter.grad, plain[name]), name


def test_double_backward_goes_through_what_was_made_again() -> None:
    model = block("layer", "gelu", "side").double()
    factors = [p for _, p in deltas_of(model)]

    def penalty() -> tuple[Tensor, ...]:
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8).requires_grad_()
        grads = torch.autograd.grad(model(x).square().sum(), factors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), factors)

    found = penalty()
    with forgetting(model):
        expected = penalty()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "size", "most"), [("vit_tiny_patch16_224", 64, 0.67), ("convnext_atto", 64, 0.57)]
)
def test_kept_bytes_of_a_real_model(name: str, size: int, most: float) -> None:
    """Of what full tuning keeps, a step with adapters keeps little more than a frozen one."""
    options = {"img_size": size} if name.startswith("vit") else {}
    net = timm.create_model(name, num_classes=5, **options)
    x = torch.randn(4, 3, size, size)
    full = summary(net, x).saved_bytes
    inject(net, LoRA(rank=4, targets="linear"), train=["head"])
    tuned = summary(net, x).saved_bytes
    assert full is not None
    assert tuned is not None
    assert tuned / full <= most


def test_unload_takes_the_hooks_off() -> None:
    model = block("layer", "gelu", "auto")
    assert deltas(model)
    assert note in model.norm._forward_hooks.values()
    unload(model)
    assert not model.norm._forward_hooks
    assert not model.act._forward_hooks
