"""What happens between forward and backward, or between two forwards, is right or is told."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from litflora.adapters import AdapterError, FLoRA, LoRA, activate, inject, merge
from litflora.adapters.recompute import _notes

from .cases import Mixture, randomize

F64 = torch.float64


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mha(x, x, x, need_weights=False)[0]
        return y


LAYERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "attention": (Attention, "attention"),
    "raw": (lambda: nn.Sequential(Mixture(8, 8)), "*.table"),
}


def made(kind: str) -> tuple[nn.Module, Tensor]:
    build, targets = LAYERS[kind]
    torch.manual_seed(0)
    model = build().double()
    inject(model, FLoRA(rank=2, targets=targets))
    randomize(model)
    return model, torch.randn(2, 5, 8, dtype=F64, requires_grad=True)


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".adapters." in name}


@pytest.mark.parametrize("kind", LAYERS)
def test_backward_uses_the_factors_that_forward_was_given(kind: str) -> None:
    model, x = made(kind)
    others = {n: (1.7 * p).detach().requires_grad_() for n, p in factors(model).items()}
    y = functional_call(model, others, (x,))
    found = torch.autograd.grad(y.square().sum(), list(others.values()))
    twin = deepcopy(model)
    with torch.no_grad():
        for name, parameter in factors(twin).items():
            parameter.copy_(others[name])
    expected = torch.autograd.grad(twin(x).square().sum(), list(factors(twin).values()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def rescale(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "clamped"):
            module.scale = 3.0


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "merge": merge,
    "base": lambda m: (
        [p.data.mul_(2) for p in m.parameters() if p.ndim > 1]
        + [torch.autograd.graph.increment_version(p) for p in m.parameters()]
    ),
    "scale": rescale,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [*LAYERS, "linear"])
def test_a_change_before_backward_is_told(kind: str, change: str) -> None:
    if kind == "linear":
        model, x = nn.Sequential(nn.Linear(8, 8)).double(), torch.randn(3, 8, dtype=F64)
        inject(model, FLoRA(rank=2, path="merged"))
        randomize(model)
    else:
        model, x = made(kind)
    loss = model(x).square().sum()
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match=r"between forward and backward|inplace operation"):
        loss.backward()


def test_torch_func_goes_through_attention() -> None:
    model, x = made("attention")
    values = factors(model)

    def loss(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (x,)).square().sum()

    found = torch.func.grad(loss)(values)
    expected = torch.autograd.grad(loss(values), list(values.values()))
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


# Norms and activations whose outputs are not what they seem ---------------------------------------


class Scaled(nn.LayerNorm):
    """Takes more than its input."""

    def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
        return by * super().forward(x)


class NoisyGELU(nn.GELU):
    """Random, and so not to be made again."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand_like(x)


class Net(nn.Module):
    def __init__(self, norm: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), norm, nn.Linear(6, 3)
        self.kwargs = kwargs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.norm(self.first(x), **self.kwargs))
        return y


def louder(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda module, args, output: 3 * output)
    return norm


NETS: dict[str, Callable[[], Net]] = {
    "hook before": lambda: Net(louder(nn.LayerNorm(6))),
    "keyword": lambda: Net(Scaled(6), by=3.0),
    "random": lambda: Net(NoisyGELU()),
}


def tuned(net: nn.Module, recompute: Any = "pointwise") -> nn.Module:
    inject(net.double(), LoRA(rank=2, targets=["first", "last"], recompute=recompute))
    randomize(net)
    return net


@pytest.mark.parametrize("kind", NETS)
def test_outputs_that_were_changed_or_random_are_kept(kind: str) -> None:
    gradients = []
    for recompute in ("pointwise", "none"):
        torch.manual_seed(0)
        net, x = tuned(NETS[kind](), recompute), torch.randn(4, 6, dtype=F64)
        torch.manual_seed(1)
        net(x).square().sum().backward()
        gradients.append([p.grad for p in factors(net).values()])
    assert all(map(torch.equal, *gradients))


def test_a_hook_put_before_ours_later_is_seen() -> None:
    torch.manual_seed(0)
    net, x = tuned(Net(nn.LayerNorm(6))), torch.randn(4, 6, dtype=F64)
    net.norm.register_forward_hook(lambda module, args, output: 3 * output, prepend=True)
    y = net(x)
    (found,) = torch.autograd.grad(
        y.square().sum(), [net.last.adapters["default"]["weight"].lora_A]
    )
    delta = net.last.adapters["default"]["weight"]
    hidden = 3 * net.norm.forward(net.first(x))
    explicit = nn.functional.linear(hidden, net.last.weight + delta.dense(), net.last.bias)
    (expected,) = torch.autograd.grad(explicit.square().sum(), [delta.lora_A])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fresh", [False, True], ids=["built", "copied"])
def test_norms_whose_parameters_are_replaced_for_a_call(fresh: bool) -> None:
    net, x = tuned(Net(nn.LayerNorm(6))), torch.randn(4, 6, dtype=F64)
    net.norm.requires_grad_(True)
    net = deepcopy(net) if fresh else net
    values = {n: (p + 0.5).detach().requires_grad_() for n, p in net.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return functional_call(net, values, (x,)).square().sum()

    found = torch.autograd.grad(loss(values), list(values.values()))
    transformed = torch.func.grad(loss)(values)
    other = tuned(Net(nn.LayerNorm(6)), "none")
    other.load_state_dict(values)
    wanted = dict(other.named_parameters())
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    expected = torch.autograd.grad(other(x).square().sum(), list(wanted.values()))
    for name, one, want in zip(values, found, expected, strict=True):
        torch.testing.assert_close(one, want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(transformed[name], want, rtol=1e-10, atol=1e-12)


def test_second_derivatives_by_the_output_of_a_norm() -> None:
    found = []
    for recompute in ("pointwise", "none"):
        torch.manual_seed(0)
        net, x = tuned(Net(nn.LayerNorm(6)), recompute), torch.randn(4, 6, dtype=F64)
        hidden = net.norm(net.first(x))
        factor = net.last.adapters["default"]["weight"].lora_A
        loss = net.last(hidden).square().sum()
        (gradient,) = torch.autograd.grad(loss, factor, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), hidden)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_an_output_is_saved_like_any_tensor_and_keeps_nothing_alive() -> None:
    net = tuned(Net(nn.LayerNorm(6)))
    output = net.norm(net.first(torch.randn(4, 6, dtype=F64)))
    assert output in _notes
    file = io.BytesIO()
    torch.save(output.detach().requires_grad_(), file)
    torch.save(output.clone().detach(), file)
    source = _notes[output][1]
    assert source() is not None
    output.sum().backward()
    assert source() is None


def test_a_layer_compiled_alone_makes_one_graph() -> None:
    torch._dynamo.reset()
    net, x = tuned(Net(nn.LayerNorm(6))), torch.randn(4, 6, dtype=F64)
    expected = net(x)
    net.last.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(net(x), expected)


# Adapters that do not go together, and types ------------------------------------------------------


def test_dropout_is_not_dropped_for_another_adapters_sake() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRA(rank=2, dropout=0.5), "a")
    inject(model, LoRA(rank=2, path="merged"), "b")
    activate(model, ["a", "b"])
    with pytest.raises(AdapterError, match="dropout of one active adapter needs the side path"):
        model(torch.randn(2, 4))
    model.eval()
    model(torch.randn(2, 4))


def test_the_base_is_not_rounded_to_the_type_of_the_factors() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(100, 4)
    expected = model(x)
    inject(model, LoRA(rank=2, path="rebuilt"))
    model[0].adapters.to(torch.bfloat16)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("path", ["side", "rebuilt", "merged"])
def test_backward_inside_autocast(path: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRA(rank=2, path=path))
    randomize(model)
    loss = model(torch.randn(5, 4)).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
