"""An adapted model is copied, pickled, built on meta, converted and restored like any other."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from litflora.adapters import (
    FLoRA,
    activate,
    adapter_names,
    disabled,
    inject,
    merge,
    unload,
    unmerge,
)

from .cases import assert_close, deltas, factors, randomize, relative_error, with_deltas
from .toys import Net, base, flora_net, images, net, snapshot, two_adapters, unchanged


def test_deepcopy_is_a_model_of_its_own() -> None:
    model, x = flora_net(), images()
    with torch.no_grad():
        model(x)  # with whatever is cached
    copy = deepcopy(model)
    before = model(x)
    assert torch.equal(copy(x), before)
    with unchanged(model):
        randomize(copy)
        assert relative_error(copy(x), before) > 1e-2
        merge(copy)
        assert torch.equal(deepcopy(copy)(x), copy(x))
        again = deepcopy(copy)
        unmerge(again)
        assert torch.equal(again.mlp[0].weight, net().mlp[0].weight), "a merged copy unmerges"
        unload(again)
    assert torch.equal(model(x), before)


def through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: nn.Module) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("copy", [deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_whole(copy: Any, merged: bool) -> None:
    model, x = two_adapters(), images()
    activate(model, {"a": 0.5, "b": 1.0})
    if merged:
        merge(model)
    twin = copy(model)
    assert torch.equal(twin(x), model(x))
    assert isinstance(twin.stem, nn.Conv2d)
    assert list(adapter_names(twin)) == ["a", "b"]
    assert snapshot(twin) == snapshot(model)
    with disabled(twin):
        assert torch.equal(twin(x), base()(x))
    unmerge(twin)
    unload(twin)
    assert snapshot(twin) == snapshot(base())


def test_state_dict_copies_between_equal_models() -> None:
    model, other = flora_net(), net()
    inject(other, FLoRA(rank=3, targets="all"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))


def test_strict_base_loading_is_possible_before_and_without_adapters_after() -> None:
    model = flora_net()
    base = {key: value for key, value in model.state_dict().items() if ".adapters." not in key}
    net(seed=2).load_state_dict(base, strict=True)
    _, unexpected = model.load_state_dict(net(seed=2).state_dict(), strict=False)
    assert not unexpected
    assert_close(model(images()), with_deltas(net(seed=2), model, images()), 1e-10)


@pytest.mark.parametrize("assign", [False, True])
def test_built_on_meta_then_loaded(assign: bool) -> None:
    source = flora_net()
    with torch.device("meta"):
        model = Net()
    model.double().eval()
    inject(model, FLoRA(rank=3, targets="all"))
    assert all(p.is_meta for p in model.parameters())
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    assert not any(p.is_meta for p in (*model.parameters(), *model.buffers()))
    assert torch.equal(model(images()), source(images()))


def test_meta_build_then_reset_is_the_base() -> None:
    with torch.device("meta"):
        model = Net()
    model.double().eval()
    inject(model, FLoRA(rank=3, targets="all"))
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict(), strict=False)
    for delta in deltas(model).values():
        delta.reset_parameters()
    assert torch.equal(model(images()), net()(images()))
    for parameter in factors(model):
        assert parameter.isfinite().all()


@pytest.mark.parametrize("merged", [False, True])
def test_conversion_after_injection(merged: bool) -> None:
    """`to` another dtype moves base, deltas and kept originals alike; the output follows."""
    model = flora_net()
    expected = model(images()).detach()
    if merged:
        merge(model)
    model.float()
    y = model(images(dtype=torch.float32)).detach()
    assert y.dtype == torch.float32
    assert_close(y, expected, 1e-4)
    unmerge(model)
    for name, parameter in net().float().named_parameters():
        assert model.get_parameter(name).dtype == torch.float32
        assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("merged", [False, True])
def test_unload_leaves_a_model_without_trace(merged: bool) -> None:
    model, clean = two_adapters(), base()
    activate(model, {"a": 1.0, "b": 0.5})
    expected = model(images()) if merged else clean(images())
    if merged:
        merge(model, unload=True)
    else:
        unload(model)
    assert_close(model(images()), expected, 1e-10)
    assert list(model.state_dict()) == list(clean.state_dict())
    for (name, mine), (other, theirs) in zip(
        model.named_modules(), clean.named_modules(), strict=True
    ):
        assert (name, type(mine)) == (other, type(theirs))
        assert vars(mine).keys() == vars(theirs).keys(), "an attribute was left behind"
        assert not mine._forward_hooks
        assert not mine._forward_pre_hooks
    assert not any("litflora" in str(value) for value in pickle.dumps(model).split(b"c"))


def test_users_own_hooks_survive() -> None:
    model, calls = net(), []
    model.stem.register_forward_hook(lambda *_: calls.append("hook"))
    inject(model, FLoRA(rank=2, targets="all"))
    randomize(model)
    model(images())
    unload(model)
    model(images())
    assert calls == ["hook", "hook"]
