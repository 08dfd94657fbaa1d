"""Inference keeps W + dW, and notices everything that changes it."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litflora.adapters import FLoRA, LoRA, activate, inject, merge, unmerge

from .cases import randomize

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6),
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
}
INPUTS = {"linear": (3, 4), "attention": (3, 5, 4)}


def made(kind: str) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(LAYERS[kind]()).eval()
    inject(model, FLoRA(rank=2, targets="all"))
    randomize(model)
    return model, torch.randn(INPUTS.get(kind, (3, 4, 5, 5)))


def idle(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def kept(model: nn.Module) -> list[Any]:
    sets = [m.adapters.cache for m in model.modules() if hasattr(m, "adapters")]
    return [value for cache in sets for value in cache._kept.values()]


def factors(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".adapters." in name]


def step(model: nn.Module, x: Tensor, kind: type, options: dict[str, Any]) -> None:
    optimizer = kind(factors(model), lr=1.0, **options)
    model(x)[..., 0].square().sum().backward()
    idle(model, x)  # after the gradients are there, as a metric in between would be
    optimizer.step()


CHANGES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "no_grad": lambda m, x: [p.detach().mul_(1.5) for p in factors(m)],
    "load_state_dict": lambda m, x: m.load_state_dict(
        {k: 1.5 * v for k, v in m.state_dict().items()}
    ),
    "SGD": lambda m, x: step(m, x, torch.optim.SGD, {}),
    "foreach": lambda m, x: step(m, x, torch.optim.AdamW, {"foreach": True}),
    "fused": lambda m, x: step(m, x, torch.optim.AdamW, {"fused": True}),
    "weights of adapters": lambda m, x: activate(m, {"default": 0.5}),
    "another adapter": lambda m, x: (inject(m, LoRA(rank=2, targets="all"), "b"), randomize(m)),
    "base": lambda m, x: [p.detach().mul_(2) for p in m.parameters() if p.ndim > 1],
    "double": lambda m, x: m.double(),
    "scale": lambda m, x: [setattr(d, "scale", 3.0) for d in m.modules() if hasattr(d, "clamped")],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_change_is_noticed(kind: str, change: str) -> None:
    model, x = made(kind)
    before = idle(model, x)
    assert kept(model)
    CHANGES[change](model, x)
    x = x.to(next(model.parameters()).dtype)
    after = idle(model, x)
    torch.testing.assert_close(after, model(x).detach())  # with gradients nothing is kept
    if change != "double":
        assert not torch.allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_second_forward_builds_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(kind)
    first = idle(model, x)
    monkeypatch.setattr("litflora.adapters.cache.added", None)
    assert torch.equal(idle(model, x), first)


def test_training_and_merging_forget() -> None:
    model, x = made("conv")
    expected = idle(model, x)
    assert kept(model)
    model.train()
    assert not kept(model)
    model.eval()
    idle(model, x)
    merge(model)
    assert not kept(model)
    torch.testing.assert_close(idle(model, x), expected)
    unmerge(model)
    assert torch.equal(idle(model, x), expected)


def test_a_copy_starts_without() -> None:
    model, x = made("linear")
    idle(model, x)
    twin = deepcopy(model)
    assert not kept(twin)
    assert torch.equal(idle(twin, x), idle(model, x))


def test_nothing_is_kept_that_could_not_be_noticed() -> None:
    with torch.inference_mode():
        model, x = made("linear")
        model(x)
        assert not kept(model)
    stacked = torch.stack([factors(made("linear")[0])[0].detach() for _ in range(3)])
    model, x = made("linear")
    name = next(n for n, _ in model.named_parameters() if ".adapters." in n)
    with torch.no_grad():
        outputs = torch.vmap(lambda f: torch.func.functional_call(model, {name: f}, (x,)))(stacked)
    assert outputs.shape == (3, *model(x).shape)
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("options", [{"path": "side"}, {}], ids=["side", "bf16"])
def test_the_side_path_keeps_no_second_weight(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 6)).eval()
    model = model if options else model.bfloat16()
    inject(model, LoRA(rank=2, **options))
    randomize(model)
    idle(model, torch.randn(3, 4, dtype=next(model.parameters()).dtype))
    assert not kept(model)


def test_what_another_process_may_write_to_is_not_kept() -> None:
    model, x = made("linear")
    before = idle(model, x)
    assert kept(model)
    model.share_memory()
    assert torch.equal(idle(model, x), before)
    assert not kept(model)
    factors(model)[0].detach().numpy()[...] *= 3  # moves no version counter, as another process
    assert not torch.equal(idle(model, x), before)
