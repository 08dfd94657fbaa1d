"""What must hold before anything is timed: gradients are those of W + dW."""

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
