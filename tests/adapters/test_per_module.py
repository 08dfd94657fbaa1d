"""PerModule: a tuning for each part of a model, which together are one adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from litflora.adapters import (
    AdapterError,
    BitFit,
    FLoRA,
    Frozen,
    Full,
    LoRA,
    NormTuning,
    PerModule,
    Probe,
    Tuning,
    activate,
    delete,
    inject,
    load,
    merge,
    read_config,
    save,
    summary,
    unmerge,
)

from .cases import assert_close, assert_gradients_close, deltas, factors, randomize, with_deltas
from .toys import Net, images, net, unchanged

MIXED = {
    "stem": FLoRA(rank=3, targets="all"),
    "norm": Full(),
    "mlp": LoRA(rank=2),
    "attn": Frozen(),
    "head": LoRA(rank=4),
}


def tuned(modules: dict[str, Tuning] | None = None, **options: Any) -> Net:
    model = net()
    inject(model, PerModule(modules or MIXED), **options)
    return model


def mixed() -> Net:
    """The net above, away from its start."""
    model = randomize(tuned())
    with torch.no_grad():
        model.norm.weight.normal_()
    return model


def names_of(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


# What is tuned ------------------------------------------------------------------------------------


def test_each_module_has_its_own_method() -> None:
    model = tuned()
    kinds = {name: type(delta).__name__ for name, delta in deltas(model).items()}
    assert kinds == {
        "stem.weight": "FLoRADelta",
        "mlp.0.weight": "LoRADelta",
        "mlp.2.weight": "LoRADelta",
        "head.weight": "LoRADelta",
    }
    ranks = {row.layer: row.ranks for row in summary(model).rows}
    assert ranks["head"] == (4,)
    assert ranks["mlp.0"] == (2,)
    in_place = {name for name in names_of(model) if ".adapters." not in name}
    assert in_place == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(
    ("tuning", "module", "expected"),
    [
        (Full(), "mlp", {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}),
        (BitFit(), "mlp", {"mlp.0.bias", "mlp.2.bias"}),
        (NormTuning(), "norm", {"norm.weight", "norm.bias"}),
        (Frozen(), "mlp", set()),
        (Probe(), "mlp", set()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Tuning) else "",
)
def test_a_selective_tuning_selects_within_its_module(
    tuning: Tuning, module: str, expected: set[str]
) -> None:
    model = tuned({module: tuning}, train=["head"])
    assert names_of(model) == expected | {"head.weight", "head.bias"}


def test_patterns_are_matched_on_full_names_within_the_module() -> None:
    model = tuned({"mlp": LoRA(rank=2, targets=["mlp.*"], rank_pattern={"mlp.2": 3})})
    assert {row.layer: row.ranks for row in summary(model).rows} == {"mlp.0": (2,), "mlp.2": (3,)}
    model = tuned({"mlp": LoRA(targets="linear", exclude=["mlp.0"])})
    assert set(deltas(model)) == {"mlp.2.weight"}


def test_a_head_is_adapted_only_where_it_is_named() -> None:
    whole = nn.Sequential()
    whole.add_module("net", net())
    whole.get_classifier = lambda: whole.net.head  # type: ignore[assignment]
    report = inject(whole, PerModule({"net": LoRA(rank=1, targets="linear")}))
    assert set(deltas(whole)) == {"net.mlp.0.weight", "net.mlp.2.weight"}
    assert report.warnings == ["net.head is the head and is frozen: train=['net.head'] trains it"]


@pytest.mark.parametrize("tuning", [LoRA(rank=1), Frozen(), Full()], ids=lambda t: type(t).__name__)
def test_a_head_that_is_named_needs_no_warning(tuning: Tuning) -> None:
    assert not inject(net(), PerModule({"mlp": LoRA(rank=1), "head": tuning})).warnings


@pytest.mark.parametrize(
    ("modules", "train", "said"),
    [
        ({"mpl": LoRA()}, (), r"no module is 'mpl'.*Nearest: mlp"),
        ({"mlp": LoRA(), "head": LoRA()}, ("head",), "head is to train whole, by train="),
        ({"mlp": LoRA(targets="stem")}, (), "'stem' matches no layer"),
        ({"mlp": LoRA(exclude="stem")}, (), "exclude: 'stem' matches no layer"),
        ({"mlp": LoRA(rank_pattern={"head": 2})}, (), "rank_pattern: 'head' matches no layer"),
        ({"mlp": NormTuning()}, (), "NormTuning trains nothing in mlp"),
        ({"mlp": Frozen()}, (), "PerModule trains nothing here"),
        ({"mlp": Tuning()}, (), "tuning must be a Tuning such as"),
    ],
)
def test_mistakes_leave_the_model_as_it_was(modules: Any, train: Any, said: str) -> None:
    model = net()
    with unchanged(model), pytest.raises(AdapterError, match=said):
        inject(model, PerModule(modules), train=train)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({}, "needs tunings by module"),
        ({"mlp": LoRA(), "mlp.0": FLoRA()}, "mlp.0 lies in mlp"),
        ({"mlp": "LoRA"}, "mlp needs one tuning"),
        ({"mlp": PerModule({"a": LoRA()})}, "mlp needs one tuning"),
    ],
)
def test_mistakes_in_the_settings(modules: Any, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        PerModule(modules)


def test_a_base_that_trains_is_refused_beside_another_adapter() -> None:
    model = net()
    inject(model, LoRA(rank=2), name="first")
    with unchanged(model), pytest.raises(AdapterError, match="the model has adapters"):
        inject(model, PerModule(MIXED), name="second")
    inject(model, PerModule({"mlp": Frozen(), "head": LoRA()}), name="second")
    assert set(deltas(model, "second")) == {"head.weight"}


# Values -------------------------------------------------------------------------------------------


def test_values_and_gradients_are_those_of_the_sum() -> None:
    model, x = mixed(), images().requires_grad_()
    plain = net()
    plain.norm.weight = model.norm.weight
    expected = with_deltas(plain, model, x)
    assert_close(model(x), expected, 1e-12)
    wanted = [x, model.norm.weight, *factors(model)]
    assert_gradients_close(model(x), expected, wanted)


def test_merged_and_unmerged() -> None:
    model, x = mixed(), images()
    before, weight = model(x), model.head.weight.clone()
    merge(model)
    assert_close(model(x), before, 1e-10)
    unmerge(model)
    assert torch.equal(model.head.weight, weight)


def test_chosen_and_deleted() -> None:
    model = mixed()
    activate(model, {"default": 0.5})
    plain = net()
    plain.norm.weight = model.norm.weight
    expected = with_deltas(plain, model, images(), weights={"default": 0.5})
    assert_close(model(images()), expected, 1e-12)
    delete(model, "default")
    assert_close(model(images()), plain(images()), 1e-12)
    assert type(model.head) is nn.Linear


# On disk ------------------------------------------------------------------------------------------


def test_one_folder_makes_it_again_bit_for_bit(tmp_path: Path) -> None:
    model = mixed()
    save(model, tmp_path)
    again = net()
    load(again, tmp_path)
    assert torch.equal(again(images()), model(images()))
    assert names_of(again) == names_of(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    config = read_config(tmp_path)
    assert config["method"] == ["FLoRA", "LoRA"]
    assert config["tuning"]["modules"]["head"]["class"] == "LoRA"
    assert config["tuning"]["modules"]["norm"] == {"class": "Full"}
    assert {"norm.weight", "norm.bias"} <= set(config["trained"])
    assert "head.weight" in config["base"]
    save(again, tmp_path / "again")
    for file in tmp_path.glob("*.*"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_a_folder_for_another_head_is_refused(tmp_path: Path) -> None:
    save(mixed(), tmp_path)
    other = net()
    nn.init.ones_(other.head.weight)
    with unchanged(other), pytest.raises(AdapterError, match=r"values of head\.weight differ"):
        load(other, tmp_path)
