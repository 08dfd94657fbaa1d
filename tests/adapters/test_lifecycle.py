"""A whole model with adapters: several of them, off and on, copied, moved, merged and removed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from litflora.adapters import (
    AdapterError,
    BitFit,
    FLoRA,
    Full,
    LoRA,
    NormTuning,
    Parts,
    Probe,
    Tuning,
    activate,
    adapter_names,
    delete,
    disabled,
    inject,
    merge,
    route,
    summary,
    trainable_parameters,
    unload,
    unmerge,
)

from .cases import (
    assert_close,
    assert_gradients_close,
    deltas,
    factors,
    randomize,
    relative_error,
    with_deltas,
)
from .toys import base, flora_net, images, net, reference, two_adapters, unchanged

# Training ---------------------------------------------------------------------------------------


def test_only_deltas_and_train_modules_learn() -> None:
    model, base = net(), net()
    inject(model, FLoRA(rank=3, targets="all"), train=["head"])
    own = {f"{name}" for name, p in model.named_parameters() if ".adapters." in name}
    expected = own | {"head.weight", "head.bias"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    groups = trainable_parameters(model)
    assert set(groups["adapters"]) == own
    assert set(groups["other"]) == {"head.weight", "head.bias"}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for group in groups.values() for p in group.values()], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == expected
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected
    for name, buffer in base.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), f"{name}: eval mode moves no statistics"


@pytest.mark.parametrize(
    ("tuning", "expected"),
    [
        (Full(), lambda name: True),
        (Probe(), lambda name: name.startswith("head.")),
        (BitFit(), lambda name: name.endswith("bias") or name.startswith("head.")),
        (NormTuning(), lambda name: name.startswith(("norm.", "head."))),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Tuning) else "",
)
def test_selective_tunings(tuning: Tuning, expected: Any) -> None:
    model = net()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # a model that comes frozen is tuned all the same
    report = inject(model, tuning, train=["head"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in net().named_parameters() if expected(name)}
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert set(trainable_parameters(model)["other"]) == trained
    assert not trainable_parameters(model)["adapters"]
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in net().state_dict().items())


# Off and on -------------------------------------------------------------------------------------


def test_disabled_is_the_base_bit_for_bit() -> None:
    model, x = flora_net(), images()
    expected, adapted = base()(x), model(x)
    assert relative_error(adapted, expected) > 1e-2
    with unchanged(model):
        with disabled(model):
            assert torch.equal(model(x), expected)
            with disabled(model):
                assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected), "leaving the inner one leaves the outer one"
            with torch.no_grad():
                assert torch.equal(model(x), expected)
        assert torch.equal(model(x), adapted)
        with pytest.raises(ZeroDivisionError), disabled(model):
            raise ZeroDivisionError
        assert torch.equal(model(x), adapted)


def test_disabled_while_merged_and_with_a_trained_head() -> None:
    model, x = flora_net(train=["head"]), images()
    merge(model)
    merged = model(x)
    with disabled(model):
        assert torch.equal(model(x), base()(x))
    assert torch.equal(model(x), merged)
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(x), merged)
    unmerge(model)
    with disabled(model):
        assert torch.equal(model(x), base()(x))


def test_disabled_keeps_the_choice_of_adapters() -> None:
    model = two_adapters()
    activate(model, {"a": 0.5, "b": 2.0})
    before = model(images())
    with disabled(model):
        assert torch.equal(model(images()), base()(images()))
    assert torch.equal(model(images()), before)


# Merging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "action",
    [merge, lambda m: delete(m, "default"), lambda m: activate(m, "default")],
    ids=["merge", "delete", "activate"],
)
def test_a_model_without_adapters_says_so(action: Any) -> None:
    """A forgotten `load` must not go by as a merge of nothing."""
    model = net()
    with unchanged(model), pytest.raises(AdapterError, match=r"(?i)adapter"):
        action(model)


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_merging_one_by_one_is_merging_both(order: list[str]) -> None:
    model = two_adapters()
    activate(model, order)
    both = deepcopy(model)
    for name in order:
        merge(model, [name])
    merge(both, ["a", "b"])
    assert_close(model(images()), both(images()), 1e-12)
    assert_close(both(images()), reference(both, {"a": 1.0, "b": 1.0}), 1e-10)
    unmerge(model), unmerge(both)
    for name, parameter in net().named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
        assert torch.equal(both.get_parameter(name), parameter)


def test_merge_takes_the_active_adapters_with_their_weights() -> None:
    model = two_adapters()
    activate(model, {"a": 0.5, "b": -1.0})
    before = model(images())
    merge(model)
    assert_close(model(images()), before, 1e-10)
    merge(model)
    assert_close(model(images()), before, 1e-10, "merged twice")
    unmerge(model)
    assert_close(model(images()), before, 1e-12)


def test_a_merged_adapter_is_not_deleted() -> None:
    model = two_adapters()
    activate(model, "a")
    merge(model)
    with unchanged(model), pytest.raises(AdapterError, match=r"(?s)\ba\b.*unmerge"):
        delete(model, "a")
    unmerge(model)
    delete(model, "a")
    assert list(adapter_names(model)) == ["b"]


@pytest.mark.parametrize(
    "action",
    [
        lambda m: activate(m, "a"),
        lambda m: inject(m, FLoRA(targets="all"), name="c"),
        lambda m: delete(m, "a"),
        lambda m: unload(m),
        lambda m: route(m, ["a"] * 3, images()),
    ],
    ids=["activate", "inject", "delete", "unload", "route"],
)
def test_a_merged_model_asks_to_be_unmerged_first(action: Any) -> None:
    model = two_adapters()
    merge(model)
    with unchanged(model), pytest.raises(AdapterError, match="unmerge"):
        action(model)


def test_training_while_merged_is_warned_of() -> None:
    """The deltas would get no gradient, and the optimiser would train nothing without a word."""
    model = two_adapters().train()
    merge(model)
    with pytest.warns(UserWarning, match="unmerge"):
        model(images())


def test_base_weights_loaded_while_merged_are_not_lost_silently() -> None:
    """`unmerge` must not undo the loading of another base without a word."""
    model = flora_net()
    merge(model)
    other = net(seed=2).state_dict()
    try:
        model.load_state_dict(other, strict=False)
        unmerge(model)
    except (AdapterError, RuntimeError):
        return
    assert torch.equal(model.mlp[0].weight, other["mlp.0.weight"])


def test_merge_says_what_rounding_costs() -> None:
    """A change of 1/1000 of bf16 weights is mostly lost when cast; in float32 it is not."""
    lost = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
        inject(model, FLoRA(rank=8, targets="0"))
        randomize(model)
        (delta,) = deltas(model).values()
        with torch.no_grad():
            delta.core.mul_(1e-3 * model[0].weight.float().norm() / delta.dense().float().norm())
        report = merge(model)
        (row,) = report.rows
        lost[dtype] = row.lost
        told = "rounding lost nothing" if row.lost == 0 else "rounding lost at most"
        assert told in str(report)
    assert lost[torch.float32] < 1e-3
    assert 0.5 < lost[torch.bfloat16] <= 1.0


def test_eval_and_train_merge_nothing() -> None:
    model = flora_net()
    with unchanged(model.eval()):
        with torch.no_grad():
            model(images())
        model.train().eval()


# Shared weights and modules ---------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.body = nn.Linear(6, 6)
        self.project = nn.Linear(6, 7, bias=False)
        self.project.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.body(self.embed(x)))


@pytest.mark.parametrize("targets", [["embed"], ["project"], ["embed", "project"]], ids="+".join)
def test_tied_weights_are_refused(targets: list[str]) -> None:
    model = Tied()
    with unchanged(model), pytest.raises(AdapterError, match=r"(?i)(shared|tied|shares)") as error:
        inject(model, FLoRA(rank=2, targets=targets))
    assert "embed" in str(error.value)
    assert "project" in str(error.value)
    inject(model, FLoRA(rank=2, targets="body"))  # what is not shared is no concern


def test_one_layer_under_two_names_is_adapted_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model, x = Twice().double(), torch.randn(2, 6, dtype=torch.float64)
    base = deepcopy(model)
    report = inject(model, FLoRA(rank=2, targets="linear"))
    assert len(report.rows) == 1
    randomize(model)
    changed = deepcopy(base)  # not functional_call, which a module under two names confuses
    with torch.no_grad():
        changed.first.weight += deltas(model)["first.weight"].dense()
    assert_close(model(x), changed(x), 1e-10)
    assert summary(model).trainable == sum(p.numel() for p in factors(model))
    unload(model)
    assert torch.equal(model(x), base(x))


def test_the_model_itself_may_be_one_layer() -> None:
    model = nn.Conv2d(3, 8, 3).double()
    base = deepcopy(model)
    inject(model, FLoRA(rank=2, targets="conv"))
    randomize(model)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert_close(model(x), with_deltas(base, model, x), 1e-10)
    merge(model, unload=True)
    assert type(model) is nn.Conv2d


def test_parametrized_and_weight_normed_layers_are_right_or_refused() -> None:
    """Their weight is made afresh each call: it is not the stored parameter."""
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))).double()
    base, x = deepcopy(model), torch.randn(2, 6, dtype=torch.float64)
    try:
        inject(model, FLoRA(rank=2, targets="0"))
    except AdapterError as error:
        assert "0" in str(error)  # noqa: PT017
        assert torch.equal(model(x), base(x))
        return
    randomize(model)
    (delta,) = deltas(model).values()
    assert_close(model(x), base(x) + x @ delta.dense().T, 1e-10)


def test_lazy_layers_are_refused_by_name() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(AdapterError, match=r"0\.weight.*forward"):
        inject(model, FLoRA(rank=2, targets="1"))
    model(torch.randn(2, 3))
    assert len(inject(model, FLoRA(rank=2, targets="1")).rows) == 1


def test_embedding_max_norm_is_refused() -> None:
    """A look-up with max_norm rescales the stored rows in place: W + dW has no meaning."""
    model = nn.Sequential(nn.Embedding(7, 6, max_norm=1.0))
    with unchanged(model), pytest.raises(AdapterError, match="max_norm"):
        inject(model, FLoRA(rank=2, targets="embedding"))


# Parts of fused weights -------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["side", "merged", "auto"])
@pytest.mark.parametrize("tuning", [FLoRA, LoRA])
def test_parts_of_a_fused_weight(tuning: Any, path: str) -> None:
    model = nn.Sequential()
    model.add_module("qkv", nn.Linear(8, 24))
    model.double().eval()
    base = deepcopy(model)
    parts = {"qkv": Parts(of=3, adapt=[0, 2])}
    inject(model, tuning(rank=2, targets="qkv", path=path, parts=parts))
    randomize(model)
    x = torch.randn(4, 8, dtype=torch.float64)
    expected = with_deltas(base, model, x)
    assert_close(model(x), expected, 1e-10)
    assert_gradients_close(model(x), expected, factors(model))
    difference = (model(x) - base(x)).unflatten(-1, (3, 8)).abs().amax((0, 2))
    assert difference[1] == 0, "k is not touched"
    assert (difference[[0, 2]] > 1e-2).all(), "q and v are"
    merge(model)
    assert_close(model(x), expected, 1e-10)
    assert torch.equal(model.qkv.weight[8:16], base.qkv.weight[8:16])
    assert tuple(model.qkv.weight.shape) == (24, 8)


def test_parts_of_attention() -> None:
    model = nn.Module()
    model.add_module("attn", nn.MultiheadAttention(8, 2))
    parts = {"attn.in_proj_weight": Parts(of=3, adapt=[0, 2])}
    report = inject(model, LoRA(rank=2, targets="attn.in_proj_weight", parts=parts))
    assert report.trainable == 2 * 2 * (8 + 8)
    randomize(model)
    changed = deltas(model)["attn.in_proj_weight"].dense().unflatten(0, (3, 8)).abs().amax((1, 2))
    assert (changed > 0).tolist() == [True, False, True]


@pytest.mark.parametrize("tuning", [FLoRA, LoRA])
def test_uneven_parts(tuning: Any) -> None:
    model = nn.Sequential()
    model.add_module("fused", nn.Linear(6, 16))
    model.double()
    base = deepcopy(model)
    inject(model, tuning(rank=2, targets="fused", parts={"fused": Parts(of=[10, 4, 2], adapt=[1])}))
    randomize(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    changed = (model(x) - base(x)).abs().amax(0) > 1e-6
    assert changed.nonzero().flatten().tolist() == [10, 11, 12, 13]
    bad = net()
    with unchanged(bad), pytest.raises(AdapterError, match=r"(?s)mlp\.0.*12"):
        inject(bad, tuning(targets="mlp.0", parts={"mlp.0": Parts(of=[10, 4], adapt=[1])}))
    for parts in (Parts(of=[16, -4], adapt=[0]), Parts(of=2, adapt=[0, 0]), Parts(of=0, adapt=[0])):
        with pytest.raises(AdapterError, match="parts"):
            inject(bad, tuning(targets="mlp.0", parts={"mlp.0": parts}))
