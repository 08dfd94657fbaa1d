"""Several adapters on one model: added, switched, weighed, routed, deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from litflora.adapters import (
    AdapterError,
    FLoRA,
    LoRA,
    activate,
    adapter_names,
    delete,
    inject,
    load,
    merge,
    route,
    save,
    trainable_parameters,
)

from .cases import BY_ID, adapt, assert_close, factors, randomize, with_deltas
from .toys import base, flora_net, images, net, reference, snapshot, two_adapters, unchanged


def test_add_switch_and_weigh() -> None:
    model = two_adapters()
    assert list(adapter_names(model)) == ["a", "b"]
    assert_close(model(images()), reference(model, {"b": 1.0}), 1e-10, "the last added is active")
    for choice, weights in [
        ("a", {"a": 1.0}),
        ("b", {"b": 1.0}),
        ({"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 0.5}),
        ({"b": -2.0}, {"b": -2.0}),
        ({"a": 0.0}, {"a": 0.0}),
    ]:
        activate(model, choice)
        assert_close(model(images()), reference(model, weights), 1e-10, str(choice))
        with torch.no_grad():
            assert_close(model(images()), reference(model, weights), 1e-10, f"{choice}, no_grad")


def test_an_empty_choice_is_the_base() -> None:
    model = two_adapters()
    activate(model, [])
    assert torch.equal(model(images()), base()(images()))
    assert not trainable_parameters(model)["adapters"]


def test_adapters_on_different_paths_add_up() -> None:
    model = net()
    for name, path in (("a", "side"), ("b", "merged"), ("c", "auto")):
        inject(model, FLoRA(rank=2, targets=["mlp.*", "stem", "dw"], path=path), name=name)
        randomize(model, name=name)
    weights = {"a": 1.0, "b": -0.5, "c": 2.0}
    activate(model, weights)
    assert_close(model(images()), reference(model, weights), 1e-10)


def test_frozen_factors_stay_frozen_through_a_change_of_adapters() -> None:
    model = net()
    inject(model, FLoRA(rank=2, targets="all", freeze_factors=True), name="a")
    inject(model, LoRA(rank=2, targets="all"), name="b")
    activate(model, "a")
    trained = trainable_parameters(model)["adapters"]
    assert trained
    assert all(name.endswith(".core") for name in trained)


def test_each_is_saved_and_loaded_on_its_own(tmp_path: Path) -> None:
    model = two_adapters()
    for name in ("a", "b"):
        again = net()
        load(again, save(model, tmp_path / name, name=name), name="only")
        assert_close(again(images()), reference(model, {name: 1.0}), 1e-10)


def test_only_active_adapters_get_gradients() -> None:
    model = two_adapters()
    activate(model, "a")
    model(images()).sum().backward()
    assert all(p.grad is not None for p in factors(model, "a"))
    assert all(p.grad is None for p in factors(model, "b"))


def test_weighted_gradients_are_the_references() -> None:
    model = two_adapters()
    weights = {"a": 0.5, "b": -1.5}
    activate(model, weights)
    wanted = [p for name in weights for p in factors(model, name)]
    for parameter in wanted:
        parameter.requires_grad_(True)
    got = torch.autograd.grad(model(images()).square().sum(), wanted)
    want = torch.autograd.grad(reference(model, weights).square().sum(), wanted)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, 1e-9, "gradient")


def test_delete_leaves_nothing_behind() -> None:
    model = two_adapters()
    activate(model, "a")
    alone = flora_net("a")
    delete(model, "b")
    assert list(adapter_names(model)) == ["a"]
    assert set(model.state_dict()) == set(alone.state_dict())
    assert snapshot(model).keys() == snapshot(alone).keys()
    assert_close(model(images()), reference(model, {"a": 1.0}), 1e-10)
    inject(model, FLoRA(rank=2, targets="all"), name="b")  # the name is free again
    assert torch.equal(model(images()), net()(images()))


def test_deleting_the_active_one_and_the_last_one() -> None:
    model, plain = two_adapters(), base()
    delete(model, "b")  # the active one: nothing takes its place unasked
    assert torch.equal(model(images()), plain(images()))
    delete(model, "a")
    assert torch.equal(model(images()), plain(images()))
    assert snapshot(model) == snapshot(plain)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda m: inject(m, FLoRA(targets="all"), name="a"),
        lambda m: inject(m, FLoRA(targets="all"), name=""),
        lambda m: inject(m, FLoRA(targets="all"), name="with.dot"),
        lambda m: activate(m, "typo"),
        lambda m: activate(m, {"a": 1.0, "typo": 1.0}),
        lambda m: activate(m, {"a": float("nan")}),
        lambda m: delete(m, "typo"),
        lambda m: merge(m, ["typo"]),
        lambda m: inject(m, FLoRA(targets="mlp.7"), name="c"),
        lambda m: inject(m, FLoRA(targets=["mlp.0", "typo"]), name="c"),
        lambda m: inject(m, FLoRA(targets="all"), name="c", train=["typo"]),
    ],
    ids=[
        "duplicate",
        "empty",
        "dot",
        "activate",
        "activate_one_of_two",
        "nan",
        "delete",
        "merge",
        "target",
        "one_of_two_targets",
        "train",
    ],
)
def test_a_mistake_raises_and_changes_nothing(mistake: Any) -> None:
    model = two_adapters()
    before = model(images())
    with unchanged(model), pytest.raises(AdapterError) as error:
        mistake(model)
    assert len(str(error.value).splitlines()) <= 3
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize(
    "name", ["keys", "items", "forward", "weight", "training", "lora_A", "adapters", "default_2"]
)
def test_any_plain_word_is_a_name(name: str) -> None:
    model = net()
    try:
        inject(model, FLoRA(rank=3, targets="all"), name=name)
    except AdapterError as error:
        assert name in str(error)  # noqa: PT017 - refusing by name is as good as working
        assert not hasattr(model.stem, "adapters")
        return
    randomize(model, name=name)
    assert_close(model(images()), reference(model, {name: 1.0}), 1e-10)


def test_each_sample_takes_its_own_adapter() -> None:
    model, x = two_adapters(), images(4)
    names = ["a", "b", None, "a"]
    expected = {name: with_deltas(net(), model, x, weights={name: 1.0}) for name in ("a", "b")}
    expected[None] = base()(x)
    before = model(x)
    with unchanged(model):
        y = route(model, names, x)
        for n, name in enumerate(names):
            assert_close(y[n], expected[name][n], 1e-10, f"sample {n}")
        assert_close(route(model, ["b"] * 4, x=x), expected["b"], 1e-10, "a keyword")
    assert torch.equal(model(x), before)


def test_a_failing_route_leaves_the_choice_of_adapters() -> None:
    model, x = two_adapters(), images(3)
    before = model(x)
    with unchanged(model):
        with pytest.raises(RuntimeError):
            route(model, ["a", "b", "a"], x[:, :2])
        with pytest.raises(AdapterError, match="typo"):
            route(model, ["a", "typo", "a"], x)
        with pytest.raises(AdapterError, match=r"(?s)2.*3|3.*2"):
            route(model, ["a", "b"], x)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "case", ["conv2d-groups", "conv_transpose2d", "embedding", "raw-3d-experts"]
)
def test_routing_on_each_kind_of_layer(case: str) -> None:
    row = BY_ID[case]
    model, base = adapt(row)
    inject(model, LoRA(rank=2, targets=row.target), name="b")
    randomize(model, name="b")
    inputs = row.inputs(batch=3)
    y = route(model.eval(), ["b", "default", "b"], *inputs)
    for n, name in enumerate(["b", "default", "b"]):
        want = with_deltas(base, model, *inputs, weights={name: 1.0})
        size = want.numel() // 3
        assert_close(
            y.flatten()[n * size : (n + 1) * size], want.flatten()[n * size : (n + 1) * size], 1e-10
        )
