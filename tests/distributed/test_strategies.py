"""Two processes reach what one reaches, whether they share the batch (DDP) or the model (FSDP2)."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from safetensors.torch import load_file

from litflora import from_adapter
from litflora.adapters import merge, read_config
from litflora.backbones import create
from litflora.precision import hold_base

from . import runs, work
from .work import CASES, TWO


@pytest.mark.parametrize(("backbone", "tuning"), CASES)
def test_two_processes_train_as_one(
    backbone: str, tuning: str, base: Path, two: Any, tmp_path: Path
) -> None:
    one, _ = runs.fit(work.module(backbone, tuning, base), "single", tmp_path)
    assert len(one.losses) == 20
    for strategy in TWO:
        first, second = (left["steps"][backbone, tuning, strategy] for left in two)
        assert_alike(one, first, second)


@pytest.mark.slow
def test_two_processes_train_by_each_method_as_one(tmp_path: Path) -> None:
    first, second = worlds.run(work.methods, tmp_path)
    for tuning in work.TUNINGS:
        made = work.module("convnext_shapes", tuning, tmp_path)
        one, _ = runs.fit(made, "single", tmp_path, runs.shapes(1, 4))
        assert_alike(one, first[tuning], second[tuning])


def assert_alike(one: runs.Left, first: runs.Left, second: runs.Left) -> None:
    """One process and either of two end with the same weights."""
    assert first.losses == pytest.approx(one.losses, rel=1e-5)
    assert_same(first.start, one.start)  # the same base, head and deltas
    assert first.moved == first.trained == one.trained
    assert_same(first.end, second.end)
    for name, value in one.end.items():
        torch.testing.assert_close(first.end[name], value, atol=1e-4, rtol=1e-3)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("tuning", ["LoRA", "Full"])
def test_both_leave_the_same_adapter(tuning: str, two: Any, folder: Path) -> None:
    own = folder / "files" / tuning
    files = [load_file(own / s / "adapter" / "adapter_model.safetensors") for s in TWO]
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        torch.testing.assert_close(files[1][key], value, atol=1e-5, rtol=1e-5)
    configs = [read_config(own / strategy / "adapter") for strategy in TWO]
    for config in configs:
        del config["checksum"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("strategy", TWO)
def test_the_folder_holds_the_best_weights(strategy: str, two: Any, folder: Path) -> None:
    own = folder / "files" / "Full" / strategy
    found = load_file(own / "adapter" / "adapter_model.safetensors")
    best = torch.load(own / "best.ckpt", weights_only=True)
    assert best["epoch"] == 0  # the second was spoiled
    for key, value in found.items():
        assert torch.equal(best["state_dict"][f"net.{key}"], value), key


def test_a_single_process_loads_and_merges_what_a_sharded_run_left(two: Any, folder: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    outputs = []
    for strategy in TWO:
        made = from_adapter(folder / "files" / "LoRA" / strategy / "adapter")
        made.configure_model()
        before = made.eval()(images)
        merge(made.net, unload=True)
        torch.testing.assert_close(made(images), before, atol=1e-5, rtol=1e-4)
        outputs.append(before)
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_a_sharded_run_exports_to_peft(two: Any, folder: Path) -> None:
    files = [load_file(folder / f"files/peft/{s}/adapter_model.safetensors") for s in TWO]
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        torch.testing.assert_close(files[1][key], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", TWO)
def test_a_resumed_run_ends_where_the_whole_one_does(strategy: str, two: Any) -> None:
    for rank in two:
        whole, after = rank["resumed"][strategy]
        assert whole.losses[4:] == after.losses
        assert_same(after.end, whole.end)


def test_a_checkpoint_is_one_of_any_strategy(two: Any, folder: Path, base: Path) -> None:
    ddp, fsdp2 = (
        torch.load(folder / "resumed" / s / "epoch=0.ckpt", weights_only=True) for s in TWO
    )
    assert ddp["state_dict"].keys() == fsdp2["state_dict"].keys()
    made = work.module("test_vit", "FLoRA", base)
    made.configure_model()
    assert not made.frozen_keys() & fsdp2["state_dict"].keys()
    for key, value in ddp["state_dict"].items():
        torch.testing.assert_close(fsdp2["state_dict"][key], value, atol=1e-5, rtol=1e-4)
    states = [each["optimizer_states"][0]["state"] for each in (ddp, fsdp2)]
    assert states[0].keys() == states[1].keys()
    for index, kept in states[0].items():
        for key, value in kept.items():
            torch.testing.assert_close(states[1][index][key], value, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(("how", "strategy"), list(product(["blocks", "every-2"], TWO)))
def test_checkpointed_activations_change_no_step(how: str, strategy: str, two: Any) -> None:
    plain, other = (two[0]["variants"][name, strategy] for name in ("plain", how))
    assert other.losses == plain.losses
    assert_same(other.end, plain.end)


@pytest.mark.parametrize("strategy", TWO)
def test_a_base_in_half_precision(strategy: str, two: Any, base: Path) -> None:
    (left, dtypes), (second, _) = (rank["variants"]["bfloat16", strategy] for rank in two)
    net = create("test_vit", str(base), 10, 32)
    hold_base(net.requires_grad_(False), torch.bfloat16)
    halves = {f"net.{n}" for n, p in net.named_parameters() if p.dtype == torch.bfloat16}
    halves -= {"net.head.weight", "net.head.bias"}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == halves
    assert halves
    assert not halves & left.trained
    assert left.moved == left.trained
    assert_same(left.end, second.end)


@pytest.mark.parametrize("what", ["fit", "test"])
def test_processes_with_different_numbers_of_batches_judge_alike(what: str, two: Any) -> None:
    ddp, fsdp2 = (two[0]["evaluated"][what, strategy] for strategy in TWO)
    assert ddp.keys() == fsdp2.keys()
    for key, value in ddp.items():
        assert float(fsdp2[key]) == pytest.approx(float(value), abs=1e-5), key
        assert two[1]["evaluated"][what, "fsdp2"][key] == fsdp2[key] or key == "train/loss"


def test_processes_with_different_numbers_of_windows_judge_alike(two: Any) -> None:
    ddp, fsdp2 = (two[0]["windows"][strategy] for strategy in TWO)
    assert "val/miou" in ddp
    assert fsdp2 == pytest.approx(ddp, abs=1e-4)
    assert two[1]["windows"]["fsdp2"]["val/miou"] == fsdp2["val/miou"]


def test_each_image_is_predicted_once(two: Any) -> None:
    paths = [path for rank in two for path in rank["evaluated"]["predict", "fsdp2"]]
    assert len(paths) == len(set(paths)) == 19


@pytest.mark.parametrize("tuning", ["Full", "FLoRA"])
def test_fsdp1_takes_the_steps_of_ddp(tuning: str, two: Any, folder: Path) -> None:
    """On a CPU, by a stand-in for the device that Lightning gives it."""
    (losses, groups), (flat_losses, flat_groups) = (
        two[0]["fsdp1"][tuning, strategy] for strategy in ("ddp", "fsdp1")
    )
    assert flat_losses == pytest.approx(losses, rel=1e-5)
    assert flat_groups == groups  # names, decays and numbers, though all is flattened
    own = folder / "fsdp1" / tuning
    files = [load_file(own / s / "adapter/adapter_model.safetensors") for s in ("ddp", "fsdp1")]
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        torch.testing.assert_close(files[1][key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strategy", TWO)
def test_bad_numbers_in_one_process_leave_the_step_out_in_all(strategy: str, two: Any) -> None:
    for rank in two:
        skipped, (first, second, third) = rank["poisoned"][strategy]
        assert skipped == 1
        assert_same(second, first)
        assert all(value.isfinite().all() for value in third.values())
        assert any(not torch.equal(third[name], value) for name, value in second.items())


@pytest.mark.parametrize("tuning", ["AdaLoRA", "FLoRA"])
def test_all_processes_keep_the_same_of_a_budget(tuning: str, two: Any) -> None:
    (kept, end), (other, end_of_other) = (rank["budgeted"][tuning] for rank in two)
    assert torch.equal(kept, other)
    assert kept.sum() == round(0.4 * len(kept))
    assert_same(end, end_of_other)


def test_what_is_refused_of_a_sharded_model(two: Any) -> None:
    for rank in two:
        said = rank["mistakes"]
        assert "log_scale trains and is not sharded" in said["unsharded"]
        assert "take trainer.strategy ddp" in said["EMA"]
        assert "take trainer.strategy ddp" in said["RankBudget"]
        assert "the model is sharded" in said["merge"]
        assert "take litflora.strategies.FSDP2" in said["Lightning's"]
        assert "take litflora.strategies.FSDP2" in said["windows"]
