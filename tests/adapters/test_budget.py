"""Rank budgets: the scores, the schedule and the masks, alone and beside PEFT's; smaller files."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litflora.adapters import (
    AdaLoRA,
    AdapterError,
    BudgetSchedule,
    FLoRA,
    LoRA,
    Parts,
    RankAllocator,
    Tuning,
    inject,
    load,
    orthogonality,
    read_config,
    save,
)

from .cases import assert_close, deltas, randomize
from .toys import images, net, unchanged

TUNINGS = {
    "AdaLoRA": AdaLoRA(rank=4, alpha=4.0, targets="all"),
    "FLoRA": FLoRA(rank=4, spatial_rank=2, targets="all"),
}


def tuned(tuning: Tuning) -> nn.Module:
    model = net()
    inject(model, tuning)
    return randomize(model)


def step(model: nn.Module) -> None:
    """Gradients of a loss that has a minimum elsewhere."""
    model.zero_grad()
    (model(images()) - 1.0).square().mean().backward()


class Loss(nn.Module):
    """Two linear layers and a loss, as PEFT wants it: its orthogonality term joins `loss`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.second = nn.Linear(9, 5)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        found = self.second(torch.tanh(self.first(x)))
        return SimpleNamespace(found=found, loss=(found - y).square().mean())


def beside_peft(steps: int, warmup: int, final: int, interval: int) -> tuple[Any, Any]:
    """The same model with PEFT's AdaLoRA and with ours, of the same numbers, in float64."""
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=8,
        total_step=steps,
        tinit=warmup,
        tfinal=final,
        deltaT=interval,
        orth_reg_weight=0.3,
        target_modules=["first", "second"],
    )
    base = Loss()
    # In float32 first: of a base of another type PEFT 0.21 trains the rank that it divides by.
    theirs = peft.get_peft_model(deepcopy(base), config).double()
    base = base.double()
    # PEFT adds 1e-5 to the rank that it divides by.
    inject(base, AdaLoRA(rank=4, alpha=8 * 4 / (4 + 1e-5)))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_" in name:
                own = peer(theirs, name)
                own.copy_(own.clone().normal_(std=0.4))
                parameter.copy_(own.view_as(parameter))
    return theirs, base


def peer(theirs: nn.Module, name: str) -> Tensor:
    """PEFT's parameter: `first.lora_A.default` for `first.adapters.default.weight.lora_A`."""
    layer, _, tensor = name.partition(".adapters.default.weight.")
    return theirs.get_parameter(f"base_model.model.{layer}.{tensor}.default")


@pytest.mark.parametrize(("warmup", "final", "interval"), [(0, 0, 1), (2, 3, 1), (1, 3, 2)])
def test_adalora_is_that_of_peft(warmup: int, final: int, interval: int) -> None:
    steps = 12
    theirs, ours = beside_peft(steps, warmup, final, interval)
    allocator = RankAllocator(ours)
    schedule = BudgetSchedule(allocator.size, 4, steps, warmup, final, interval)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for model in (theirs, ours)
    ]
    masks = set()
    for t in range(1, steps + 1):
        x, y = torch.randn(7, 6).double(), torch.randn(7, 5).double()
        expected, out = theirs.base_model(x, y), ours(x, y)  # PeftModel passes the term by
        loss = out.loss + 0.3 * orthogonality(ours)
        assert_close(out.found, expected.found, 1e-5)
        assert_close(loss, expected.loss, 1e-5)
        for optimizer, each in zip(optimizers, (expected.loss, loss), strict=True):
            optimizer.zero_grad()
            each.backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(t)
        if t < schedule.end:
            allocator.update()  # PEFT looks at the weights after the step
        if schedule.due(t):
            allocator.allocate(schedule(t))
        if schedule.due(t) or t > schedule.end:
            allocator.mask()
        peft_allocator = theirs.base_model.rankallocator
        assert schedule(t) == peft_allocator.budget_schedule(t)[0]
        for name, parameter in ours.named_parameters():
            if "lora_" not in name:
                continue
            other = peer(theirs, name)
            assert_close(parameter, other.view_as(parameter), 1e-5, f"{name} at {t}")
            assert_close(parameter.grad, other.grad.view_as(parameter), 1e-5, f"{name}.grad at {t}")
            if t < schedule.end:
                key = f"{name.partition('.adapters')[0]}.{name.rpartition('.')[2]}.default"
                score = peft_allocator._element_score(key)
                state = allocator.state_dict()
                own = state["sensitivity"][name] * state["uncertainty"][name]
                assert_close(own, score.view_as(own), 1e-5, f"score of {name} at {t}")
        masks.add(tuple(torch.cat(allocator.kept).tolist()))
    assert len(masks) > 2, "a vacuous test: nothing was pruned"
    pattern = theirs.peft_config["default"].rank_pattern
    assert list(pattern.values()) == [kept.tolist() for kept in allocator.kept]
    assert sum(map(sum, pattern.values())) == 4


def test_the_schedule_falls_by_the_cube_and_ends_at_the_budget() -> None:
    schedule = BudgetSchedule(100, 40, steps=50, warmup=10, final=20, interval=5)
    budgets = [schedule(t) for t in range(1, 51)]
    assert budgets[:10] == [100] * 10
    assert budgets[19] == int(40 + 60 * 0.5**3)
    assert budgets[29:] == [40] * 21
    assert budgets == sorted(budgets, reverse=True)
    assert [t for t in range(1, 51) if schedule.due(t)] == [15, 20, 25, 30]


def test_a_schedule_that_is_all_warmup_but_its_last_step() -> None:
    schedule = BudgetSchedule(8, 3, steps=7, warmup=6)
    assert [schedule(t) for t in (6, 7)] == [8, 3]
    assert [t for t in range(1, 8) if schedule.due(t)] == [7]


@pytest.mark.parametrize("method", TUNINGS)
def test_the_budget_is_met_exactly_also_where_all_are_equal(method: str) -> None:
    allocator = RankAllocator(tuned(TUNINGS[method]))
    for budget in range(allocator.least, allocator.size + 1):
        allocator.allocate(budget)
        assert sum(int(kept.sum()) for kept in allocator.kept) == budget
        assert all(kept[0] or method == "AdaLoRA" for kept in allocator.kept)
        flat = torch.cat(allocator.kept).tolist()
        if method == "AdaLoRA":  # the first of equals stay
            assert flat == sorted(flat, reverse=True)
    for budget in (allocator.least - 1, allocator.size + 1):
        with pytest.raises(AdapterError, match="must lie between"):
            allocator.allocate(budget)


def test_scores_of_flora_are_means_over_core_slice_and_column() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    inject(model, FLoRA(rank=3, spatial_rank=2, targets="all"))
    randomize(model)
    allocator = RankAllocator(model, beta1=0.8, beta2=0.6)
    delta = deltas(model)["0.weight"]
    sensitivity: dict[str, Any] = dict.fromkeys(dict(delta.named_parameters()), 0.0)
    uncertainty = dict(sensitivity)
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(2, 3, 6, 6)).square().mean().backward()
        allocator.update()
        for name, p in delta.named_parameters():
            now = (p * p.grad).abs().detach()
            sensitivity[name] = 0.8 * sensitivity[name] + 0.2 * now
            off = (now - sensitivity[name]).abs()
            uncertainty[name] = 0.6 * uncertainty[name] + 0.4 * off
    state = allocator.state_dict()
    for key, expected_averages in (("sensitivity", sensitivity), ("uncertainty", uncertainty)):
        for name, value in expected_averages.items():
            assert_close(state[key][f"0.adapters.default.weight.{name}"], value, 1e-5, key)
    score = {name: sensitivity[name] * uncertainty[name] for name in sensitivity}
    expected = []
    for n in range(4):
        others = [m for m in range(4) if m != n]
        own = score["core"].mean(others) + score[f"factors.{n}"].mean(0)
        expected.append(own)
    best = [int(own.argmax()) for own in expected]
    for budget in range(4, 10):
        allocator.allocate(budget)
        ranked = [
            (float("inf") if j == best[n] else float(value), n, j)
            for n, own in enumerate(expected)
            for j, value in enumerate(own)
        ]
        chosen = {(n, j) for _, n, j in sorted(ranked, reverse=True)[:budget]}
        found = {
            (n, int(j)) for n, kept in enumerate(allocator.kept) for j in kept.nonzero().flatten()
        }
        assert found == chosen, budget


@pytest.mark.parametrize("method", TUNINGS)
def test_masked_slices_are_gone_and_may_come_back(method: str) -> None:
    model = tuned(TUNINGS[method])
    allocator = RankAllocator(model)
    step(model), allocator.update()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    allocator.allocate(allocator.least + 5)
    allocator.mask()
    gate = "core" if method == "FLoRA" else "lora_E"
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert {name.rpartition(".")[2] for name in changed} == {gate}
    step(model)
    for name in changed:
        parameter = model.get_parameter(name)
        zero = parameter == 0
        assert zero.sum() > 0
        assert parameter.grad[zero].any(), "what is masked could never come back"
    allocator.mask_gradients()
    for name in changed:
        parameter = model.get_parameter(name)
        assert not parameter.grad[parameter == 0].any()
        assert parameter.grad[parameter != 0].all()


@pytest.mark.parametrize("method", TUNINGS)
def test_files_hold_what_is_left(method: str, tmp_path: Path) -> None:
    model = tuned(TUNINGS[method])
    allocator = RankAllocator(model)
    step(model), allocator.update()
    budget = allocator.least + 5
    allocator.allocate(budget), allocator.mask()
    with unchanged(model):
        save(model, tmp_path)
    records = read_config(tmp_path)["deltas"]
    again = net()
    load(again, tmp_path)
    assert_close(again(images()), model(images()), 1e-12)
    counted, gone = 0, 0
    for name, delta in deltas(model).items():
        if name not in records:
            gone += 1
            assert not delta.dense().any()
            continue
        smaller = deltas(again)[name]
        assert_close(smaller.dense(), delta.dense(), 1e-12, name)
        assert smaller.scale == delta.scale
        ranks, shape = smaller.ranks(), delta.info.shape
        told = records[name]["ranks" if method == "FLoRA" else "rank"]
        assert told == (list(ranks) if method == "FLoRA" else ranks[0])
        factors = [r for r, n in zip(ranks, shape, strict=False) if n > 1]
        counted += sum(factors if method == "FLoRA" else ranks)
    assert counted == budget < allocator.size
    assert bool(gone) is (method == "AdaLoRA")


def test_parts_of_a_weight_are_cut_one_by_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 9))
    base = deepcopy(model)
    qv = {"1": Parts(of=3, adapt=[0, 2])}
    inject(model, AdaLoRA(rank=2, targets=["0", "1"], parts=qv))
    randomize(model)
    allocator = RankAllocator(model)
    assert allocator.modes == 3
    allocator.allocate(3), allocator.mask()  # all of layer 0, and one triplet of its first part
    save(model, tmp_path / "a")
    record = read_config(tmp_path / "a")["deltas"]["1.weight"]
    assert {part: told["rank"] for part, told in record["parts"].items()} == {"0": 1}
    again = deepcopy(base)
    load(again, tmp_path / "a")
    x = torch.randn(4, 6)
    assert_close(again(x), model(x), 1e-6)
    allocator.allocate(2), allocator.mask()
    save(model, tmp_path / "b")
    assert list(read_config(tmp_path / "b")["deltas"]) == ["0.weight"]
    load(base, tmp_path / "b")
    assert_close(base(x), model(x), 1e-6)


@pytest.mark.parametrize("method", TUNINGS)
def test_without_a_budget_zeros_are_kept(method: str, tmp_path: Path) -> None:
    model = net()
    inject(model, TUNINGS[method])  # dW is zero
    save(model, tmp_path)
    again = net()
    load(again, tmp_path)
    for name, delta in deltas(model).items():
        assert deltas(again)[name].ranks() == delta.ranks()


def test_a_budgeted_flora_that_is_zero_keeps_a_slice_of_each_mode(tmp_path: Path) -> None:
    model = net()
    inject(model, TUNINGS["FLoRA"])
    RankAllocator(model)
    save(model, tmp_path)
    again = net()
    load(again, tmp_path)
    for delta in deltas(again).values():
        assert set(delta.ranks()) == {1}


def test_the_state_goes_on_bit_for_bit() -> None:
    model = tuned(TUNINGS["FLoRA"])
    first = RankAllocator(model)
    step(model), first.update()
    first.allocate(first.least + 9)
    second = RankAllocator(model)
    second.load_state_dict(deepcopy(first.state_dict()))
    for allocator in (first, second):
        allocator.update(scale=4.0), allocator.allocate(first.least + 4)
    assert torch.equal(torch.cat(first.kept), torch.cat(second.kept))
    for key in ("sensitivity", "uncertainty"):
        for name, value in first.state_dict()[key].items():
            assert torch.equal(value, second.state_dict()[key][name])


def test_scaled_gradients_score_the_same() -> None:
    model = tuned(TUNINGS["AdaLoRA"])
    plain, scaled = RankAllocator(model), RankAllocator(model)
    step(model), plain.update()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad *= 64
    scaled.update(64.0)
    for name, value in plain.state_dict()["sensitivity"].items():
        assert torch.equal(value, scaled.state_dict()["sensitivity"][name])


def test_frozen_factors_are_cut_and_not_scored() -> None:
    model = tuned(FLoRA(rank=3, targets="mlp.*", freeze_factors=True))
    allocator = RankAllocator(model)
    assert {name.rpartition(".")[2] for name in allocator.state_dict()["sensitivity"]} == {"core"}
    step(model), allocator.update()
    allocator.allocate(allocator.least)
    assert [int(kept.sum()) for kept in allocator.kept] == [1, 1, 1, 1]


def test_orthogonality_is_zero_of_orthonormal_factors_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Linear(6, 6))
    inject(model, AdaLoRA(rank=3, targets="all"))
    assert orthogonality(model) > 0.5
    with torch.no_grad():
        for delta in deltas(model).values():
            nn.init.orthogonal_(delta.lora_A)
            nn.init.orthogonal_(delta.lora_B)
    assert orthogonality(model) < 1e-5


def test_mistakes() -> None:
    model = net()
    with pytest.raises(AdapterError, match="there is no AdaLoRA"):
        orthogonality(model)
    inject(model, LoRA())
    with pytest.raises(AdapterError, match="for AdaLoRA or FLoRA"):
        RankAllocator(model)
    with pytest.raises(AdapterError, match="beta2 must lie"):
        RankAllocator(tuned(TUNINGS["FLoRA"]), beta2=1.0)
    for settings, told in (({"rank": 0}, "rank must be"), ({"alpha": float("nan")}, "alpha must")):
        with pytest.raises(AdapterError, match=told):
            AdaLoRA(**settings)
    with pytest.raises(AdapterError, match="one rank a layer"):
        inject(net(), AdaLoRA(rank_pattern={"mlp.0": [2, 3]}))
    for wrong in ({"warmup": 150, "final": 900}, {"warmup": 1000}):
        with pytest.raises(AdapterError, match="leave none of 1000 for the budget"):
            BudgetSchedule(80, 40, 1000, **wrong)
    for first, last, interval in ((40, 80, 1), (80, 0, 1), (80, 40, 0)):
        with pytest.raises(AdapterError, match=f"from {first} to {last} slices every {interval}"):
            BudgetSchedule(first, last, 1000, interval=interval)


def test_ranks_are_clamped_and_scales_are_not() -> None:
    model = net()
    report = inject(model, AdaLoRA(rank=20, alpha=40.0, targets=["mlp.0", "dw"]))
    assert [(row.ranks, row.clamped) for row in report.rows] == [((8,), True), ((8,), True)]
    assert {delta.scale for delta in deltas(model).values()} == {2.0}
