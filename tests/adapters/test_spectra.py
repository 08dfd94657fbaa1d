"""Spectra: figures that can be told beforehand, and ranks that FLoRA takes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from litflora.adapters import (
    AdapterError,
    FLoRA,
    Full,
    LoRA,
    SpectraReport,
    activate,
    inject,
    merge,
    spectra,
    suggested_ranks,
)

from .cases import deltas, randomize
from .toys import net


def tuned(layer: nn.Module, tuning: Any) -> nn.Module:
    model = nn.Sequential(nn.Identity(), layer.double())
    inject(model, tuning)
    randomize(model)
    return model


def changed(before: Tensor, after: Tensor) -> SpectraReport:
    """The report of one linear layer whose weight was set."""
    layer = nn.Linear(*reversed(before.shape), bias=False, dtype=before.dtype)
    layer.weight.data = after
    return spectra(nn.Sequential(layer), {"0.weight": before})


def test_the_values_of_a_kernel_are_those_of_its_unfoldings() -> None:
    model = tuned(nn.Conv2d(6, 8, (3, 5)), FLoRA(targets="all", rank_pattern={"1": [4, 3, 2, 2]}))
    (row,) = spectra(model).rows
    (delta,) = deltas(model).values()
    dense = delta.dense().detach().numpy()
    for mode, values in enumerate(row.values):
        unfolded = np.moveaxis(dense, mode, 0).reshape(dense.shape[mode], -1)
        np.testing.assert_allclose(values, np.linalg.svd(unfolded)[1], atol=1e-12)
    assert row.ranks(1 - 1e-14) == (4, 3, 2, 2)  # the core is all there is
    weight = model[1].weight.detach().numpy()
    assert row.relative_norm == pytest.approx(np.linalg.norm(dense) / np.linalg.norm(weight))


@pytest.mark.parametrize(
    ("layer", "out_dim"), [(nn.ConvTranspose2d(6, 8, 3), 1), (nn.Embedding(9, 5), 1)]
)
def test_the_matrix_has_the_outputs_as_its_rows(layer: nn.Module, out_dim: int) -> None:
    model = tuned(layer, LoRA(rank=2, targets=["1"]))
    (row,) = spectra(model).rows
    assert row.out_dim == out_dim
    assert row.ranks(1 - 1e-14)[out_dim] == 2


def test_the_effective_rank_is_the_least_that_holds_the_energy() -> None:
    weight = torch.eye(4, dtype=torch.float64)
    report = changed(weight, weight + torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0]).double()))
    (row,) = report.rows
    shares = {0.5: 1, 0.64: 1, 0.65: 2, 0.9: 2, 1.0: 2}  # 16 of 25 is 0.64
    assert {energy: row.ranks(energy)[0] for energy in shares} == shares
    assert row.values[0] == row.values[1] == (4, 3, 0, 0)
    assert row.relative_norm == 5 / 2


def test_a_new_direction_is_an_intruder_once_it_is_large() -> None:
    weight = torch.diag(torch.arange(16, 0, -1).double())
    new = torch.full((16, 1), 0.25, dtype=torch.float64)  # cosine 0.25 with all of W's
    assert changed(weight, weight + 1e3 * new @ new.t()).rows[0].intruders == 1
    assert changed(weight, weight + 1e-3 * new @ new.t()).rows[0].intruders == 0


def test_intruders_are_counted_as_the_paper_does() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 30, dtype=torch.float64)
    after = weight + 3 * torch.randn(40, 3, dtype=torch.float64) @ torch.randn(3, 30).double()
    old, new = (np.linalg.svd(each.numpy(), full_matrices=False)[0] for each in (weight, after))
    count = 0
    for j in range(10):
        if all(abs(old[:, i] @ new[:, j]) < 0.5 for i in range(30)):
            count += 1
    assert 0 < count < 10
    assert changed(weight, after).rows[0].intruders == count


def test_full_tuning_is_what_differs_from_the_base() -> None:
    model = net().double()
    before = copy.deepcopy(model.state_dict())
    inject(model, Full())
    named = dict(model.named_parameters())
    with torch.no_grad():
        named["stem.weight"] += 0.1 * torch.randn_like(named["stem.weight"])
        named["head.weight"] += 1.0
    (row,) = spectra(model, before).rows  # neither head nor what stayed as it was
    change = model.stem.weight.detach() - before["stem.weight"]
    assert row.name == "stem.weight"
    assert row.values[0] == pytest.approx(torch.linalg.svdvals(change.flatten(1)).tolist())


def test_the_change_is_the_sum_of_the_active_adapters_merged_or_not() -> None:
    model = net().double()
    inject(model, LoRA(rank=1, targets=["stem"]), name="a")
    inject(model, LoRA(rank=2, targets=["stem"]), name="b")
    randomize(randomize(model, name="a"), name="b")
    activate(model, {"a": 1.0, "b": -0.5})
    (apart,) = spectra(model).rows
    (one,), (other,) = (deltas(model, name).values() for name in ("a", "b"))
    total = (one.dense() - 0.5 * other.dense()).detach()
    assert apart.values[0] == pytest.approx(torch.linalg.svdvals(total.flatten(1)).tolist())
    before = model.stem.weight.detach().clone()
    merge(model)
    (merged,) = spectra(model).rows
    assert merged == apart
    (against,) = spectra(model, {**model.state_dict(), "stem.weight": before}).rows[:1]
    assert against.values[0] == pytest.approx(apart.values[0])


def test_half_precision_is_measured_in_float32() -> None:
    model = tuned(nn.Linear(16, 16), LoRA(rank=2, targets="all"))
    (exact,) = spectra(model).rows
    (rounded,) = spectra(model.bfloat16()).rows
    assert rounded.relative_norm == pytest.approx(exact.relative_norm, rel=2e-2)
    assert rounded.ranks()[0] <= 2


def test_flora_takes_the_suggested_ranks() -> None:
    names = ["conv", "inner.conv", "mlp"]  # "conv" is an end of another name, too
    layers = [nn.Conv2d(5, 6, 3), nn.ModuleDict({"conv": nn.Conv2d(6, 7, 3)}), nn.Linear(7, 8)]
    model = nn.ModuleDict(dict(zip(["conv", "inner", "mlp"], layers, strict=True))).double()
    fresh = copy.deepcopy(model)
    asked = {"inner.conv": [3, 2, 1, 3], "conv": [2, 4, 3, 2], "mlp": 5}
    inject(model, FLoRA(targets=names, rank_pattern=asked))
    randomize(model)
    found = suggested_ranks(spectra(model), energy=1 - 1e-14)
    assert found == asked
    inject(fresh, FLoRA(targets=names, rank_pattern=found))
    ranks = {delta.info.name: delta.ranks() for delta in deltas(fresh).values()}
    assert ranks == {
        "conv.weight": (2, 4, 3, 2),
        "inner.conv.weight": (3, 2, 1, 3),
        "mlp.weight": (5, 5),
    }
    fewer = suggested_ranks(spectra(model), energy=0.5)
    assert all(np.all(np.less_equal(fewer[name], rank)) for name, rank in asked.items())
    assert fewer != asked


def test_where_nothing_changed_one_rank_is_suggested() -> None:
    model = net()
    inject(model, FLoRA(targets="all"))
    report = spectra(model)
    assert all(set(row.ranks()) == {0} and row.intruders == 0 for row in report.rows)
    assert all(np.all(np.equal(ranks, 1)) for ranks in suggested_ranks(report).values())


def test_it_prints_as_a_table() -> None:
    model = tuned(nn.Conv2d(6, 8, 3), FLoRA(rank=1, spatial_rank=1, targets="all"))
    head, _, line, *_ = str(spectra(model)).splitlines()
    assert head.split() == ["weight", "kind", "shape", "rank", "|dW|/|W|", "intruders"]
    assert line.split()[:4] == ["1.weight", "conv", "8x6x3x3", "1x1x1x1"]
    assert str(SpectraReport()) == "no weight of two modes or more has changed"


def test_what_cannot_be_measured_is_refused() -> None:
    model = net()
    with pytest.raises(AdapterError, match="no adapter is active: base="):
        spectra(model)
    with pytest.raises(AdapterError, match=r"base has no stem\.weight of shape"):
        spectra(model, {})
    state = model.state_dict()
    model.stem.weight.data = model.stem.weight * float("nan")
    with pytest.raises(AdapterError, match=r"the change of stem\.weight is not finite"):
        spectra(model, state)
    model.stem.weight.original_fingerprint = "int8"
    with pytest.raises(AdapterError, match=r"stem\.weight is quantised"):
        spectra(model, state)
    with pytest.raises(AdapterError, match="energy must lie in"):
        changed(torch.eye(2), 2 * torch.eye(2)).rows[0].ranks(0.0)
