"""What must hold before anything is timed: gradients and outputs are those of W + dW."""

from __future__ import annotations

import torch
from models import Model
from torch import Tensor, nn
from variants import Variant

from litflora.adapters import disabled
from litflora.adapters.layers import adapted_layers


def sums(net: nn.Module) -> dict[str, Tensor]:
    """W + dW of every layer that litflora has adapted, by the weight's name."""
    return {
        f"{name}.{param}": layer.get_parameter(param) + total(*total.tensors())
        for name, layer, adapters in adapted_layers(net)
        for param, total in adapters.applied().items()
    }


def check_gradients(model: Model, variant: Variant) -> None:
    """Raises unless a variant's gradients are those of W + dW, in float64."""
    torch.manual_seed(0)
    small = model.small()
    net = variant(small.build().double())
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        nn.init.normal_(parameter, std=0.02)
    x = small.example().double()
    weights = sums(net)
    with disabled(net):
        expected = torch.func.functional_call(net, weights, (x,))
    wanted = torch.autograd.grad(expected.square().sum(), list(trained.values()))
    found = torch.autograd.grad(net(x).square().sum(), list(trained.values()))
    for name, one, other in zip(trained, found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10 * other.abs().max(), msg=name)


def check_outputs(found: Tensor, expected: Tensor, base: Tensor, tolerance: float) -> None:
    """Raises unless an adapted model's outputs are those of the base with W + dW.

    Args:
        found: What the adapted model gives, merged or not.
        expected: What the base gives with W + dW for its weights.
        base: What it gives with W. An error counts as a share of what dW changes, so that adapters
            which change nothing do not pass.
        tolerance: The share that rounding may make.
    """
    change = (expected - base).float().norm()
    error = float((found - expected).float().norm() / change)
    if not error <= tolerance:  # nor if it is not a number
        raise AssertionError(f"outputs are off by {error:.2g} of what the adapters change")
