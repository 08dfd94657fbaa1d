"""Bugs of other libraries in merging, files and training, each under its own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litflora.adapters import (
    AdapterError,
    FLoRA,
    LoRA,
    delete,
    inject,
    load,
    merge,
    save,
    trainable_parameters,
    unmerge,
)

from .cases import assert_close, deltas, factors, randomize
from .toys import Net, edit_tensors, images, net, saved_bytes, unchanged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_peft_unmerge_of_half_precision_is_inexact(dtype: torch.dtype) -> None:
    """PEFT subtracts: 9.8e-4 off in bf16."""
    model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    before = model[0].weight.detach().clone()
    inject(model, LoRA(rank=8, targets="0"))
    randomize(model, std=0.05)
    for _ in range(3):
        merge(model)
        assert not torch.equal(model[0].weight, before)
        unmerge(model)
        assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_bases_train_on_the_side_path(dtype: torch.dtype) -> None:
    """bf16(W + dW) loses 78 % of a delta of 1/1000 of W, and no tolerance test would see it."""
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 8))
    report = inject(model.to(dtype), FLoRA(rank=2, targets=["conv", "linear"]))
    assert [row.path for row in report.rows] == ["side"] * 3
    assert all(p.dtype == torch.float32 for p in factors(model))
    model = nn.Sequential(nn.Linear(8, 8))
    assert [row.path for row in inject(model, FLoRA(rank=2, targets="0")).rows] == ["merged"]


def test_peft_deleting_a_merged_adapter_leaves_its_weights() -> None:
    model = net()
    inject(model, FLoRA(rank=2, targets="all"))
    randomize(model)
    merge(model)
    with unchanged(model), pytest.raises(AdapterError, match="unmerge"):
        delete(model, "default")


def test_peft_safe_merge_is_no_option() -> None:
    """A NaN in the last layer must not leave the first ones merged."""
    model = net()
    inject(model, FLoRA(rank=2, targets="all"))
    randomize(model)
    with torch.no_grad():
        deltas(model)["mlp.2.weight"].core[0, 0] = float("nan")
    with unchanged(model), pytest.raises(AdapterError, match=r"mlp\.2\.weight"):
        merge(model)


def test_lycoris_merging_and_unmerging_does_not_restore() -> None:
    model, expected = net(torch.float32), net(torch.float32)
    inject(model, FLoRA(rank=8, spatial_rank=3, targets="all"))
    randomize(model, std=3.0)
    merge(model)
    unmerge(model)
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_flora_authors_have_no_merge_and_forward_inference_returns_nothing() -> None:
    model = net()
    inject(model, FLoRA(rank=2, targets="all"))
    randomize(model)
    expected = model(images())
    merge(model, unload=True)
    assert_close(model(images()), expected, 1e-10)


def test_peft_merging_tied_weights_unties_or_doubles_them() -> None:
    model = nn.Module()
    model.add_module("embed", nn.Embedding(7, 6))
    model.add_module("project", nn.Linear(6, 7, bias=False))
    model.project.weight = model.embed.weight
    with unchanged(model), pytest.raises(AdapterError, match=r"(?i)tied"):
        inject(model, LoRA(targets="project"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model: Net = net()
    inject(model, FLoRA(rank=2, targets="all"), train=["head"])
    randomize(model)
    return save(model, tmp_path / "adapter")


def test_peft_unexpected_key_is_silent(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.update(surplus=torch.ones(2)))
    model = net()
    with unchanged(model), pytest.raises(AdapterError, match="surplus"):
        load(model, saved)


def test_peft_missing_key_only_warns(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.pop(next(k for k in tensors if "mlp.0" in k)))
    model = net()
    with unchanged(model), pytest.raises(AdapterError, match=r"mlp\.0"):
        load(model, saved)


def test_peft_another_base_is_silent(saved: Path) -> None:
    model = net(seed=2)
    with unchanged(model), pytest.raises(AdapterError, match="base"):
        load(model, saved)


def test_peft_batch_norm_statistics_are_not_saved(tmp_path: Path) -> None:
    model, again = net(torch.float32), net(torch.float32)
    inject(model, FLoRA(rank=2, targets="all"))
    model.train()(3 + 2 * images(dtype=torch.float32))
    load(again, save(model, tmp_path))
    for name, buffer in model.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer)
    assert int(again.norm.num_batches_tracked) == 1


def test_peft_adapter_name_in_the_keys() -> None:
    """A name that occurs in the keys was cut out of them: here no name is in any file."""
    # The round trips of such names are in test_adapter_files.
    model = net()
    inject(model, FLoRA(rank=2, targets="mlp.0"), name="mlp")
    assert set(deltas(model, "mlp")) == {"mlp.0.weight"}


def test_peft_renames_the_base_keys() -> None:
    model = net()
    inject(model, FLoRA(rank=2, targets="all"))
    assert [k for k in model.state_dict() if ".adapters." not in k] == list(net().state_dict())


def test_peft_head_to_save_is_copied() -> None:
    """PEFT keeps the frozen original beside the trained copy."""
    model = net()
    head = model.head
    inject(model, FLoRA(rank=2, targets="all"), train=["head"])
    assert model.head is head
    base = sum(p.numel() for p in net().parameters())
    assert sum(p.numel() for p in model.parameters()) == base + sum(
        p.numel() for p in factors(model)
    )


def test_flora_authors_freeze_head_and_norms_too() -> None:
    model = net()
    inject(model, FLoRA(rank=2, targets="all"), train=["head", "norm"])
    trained = {name.split(".")[0] for name in trainable_parameters(model)["other"]}
    assert trained == {"head", "norm"}


def test_lycoris_leaves_the_base_trainable() -> None:
    model = net()
    inject(model, FLoRA(rank=2, targets="all"))
    assert not trainable_parameters(model)["other"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_frozen_tower_loses_its_gradients(reentrant: bool) -> None:
    """Adapters in a checkpointed tower under a frozen head got zeros (unsloth #5039)."""
    model, x = net(), images().requires_grad_(reentrant)
    inject(model, LoRA(rank=2, targets="all"))
    randomize(model)

    def tower(x: Tensor) -> Tensor:
        return model.dw(model.norm(model.stem(x)))

    features = checkpoint(tower, x, use_reentrant=reentrant)
    model.head(features.mean((2, 3))).sum().backward()
    for name, delta in deltas(model).items():
        if name.startswith(("stem", "dw")):
            assert all(p.grad is not None and p.grad.any() for p in delta.parameters()), name


class Projections(nn.Module):
    """q, k and v of one input: what PEFT saved six times."""

    def __init__(self) -> None:
        super().__init__()
        for name in "qkv":
            self.add_module(name, nn.Linear(128, 128))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x)


@pytest.mark.parametrize("tuning", [FLoRA, LoRA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_peft_saves_its_input_several_times(
    tuning: Any, dtype: torch.dtype, autocast: bool
) -> None:
    """6.09 times in bf16, 3.07 under autocast: the factors are to be cast, never the input."""
    model = Projections().to(dtype)
    inject(model, tuning(rank=4, targets="linear"))
    x = torch.randn(2048, 128, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = saved_bytes(model, x)
    copies = 1.5 if autocast and dtype == torch.float32 else 1.0  # autocast's own bf16 copy
    small = 3 * 2048 * 4 * x.element_size() + 2 * sum(p.numel() * 4 for p in model.parameters())
    assert kept <= copies * x.numel() * x.element_size() + small


def test_flora_authors_materialise_the_delta_of_every_layer() -> None:
    """Two full operations, and a copy of the weight kept for each layer until backward."""
    layer = nn.Linear(256, 256)
    model = nn.Sequential(layer)
    inject(model, FLoRA(rank=4, targets="0"))
    x = torch.randn(8, 256, requires_grad=True)
    assert saved_bytes(model, x) < layer.weight.numel() * 4


def test_peft_itself_ignores_an_unexpected_key(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["mlp.0"])).save_pretrained(
        tmp_path
    )
    edit_tensors(
        tmp_path,
        lambda tensors: tensors.update({"base_model.model.mlp.9.lora_A.weight": torch.ones(2, 8)}),
    )
    peft.PeftModel.from_pretrained(net(), tmp_path)  # not a word
    model = net()
    with unchanged(model), pytest.raises(AdapterError, match=r"mlp\.9"):
        load(model, tmp_path)
