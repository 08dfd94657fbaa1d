"""What must not be lost or silently wrong: threads, layouts, heads, patched layers, damage."""

from __future__ import annotations

import json
import sys
import threading
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from litflora.adapters import (
    AdapterError,
    BitFit,
    FLoRA,
    LoRA,
    Probe,
    activate,
    adapter_names,
    inject,
    load,
    merge,
    save,
    summary,
    unmerge,
)

from .cases import randomize


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).double()


def test_threads_do_not_mix_up_the_weights_of_attention() -> None:
    net = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    inject(net, FLoRA(rank=2, targets="attention"))
    randomize(net)
    x, base = torch.randn(2, 5, 16), net.in_proj_weight
    with torch.no_grad():
        expected = net(x, x, x)[0]
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():
            # A new thread may round otherwise; a mixed-up weight is off by far more.
            outputs = (net(x, x, x)[0] for _ in range(50))
            wrong.extend(i for i, y in enumerate(outputs) if (y - expected).abs().max() > 1e-5)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert net.in_proj_weight is base


@pytest.mark.parametrize("unload", [False, True])
def test_merge_keeps_the_memory_format(unload: bool) -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    net[0].weight.data = net[0].weight.data.contiguous(memory_format=torch.channels_last)
    strides = net[0].weight.stride()
    inject(net, FLoRA(rank=2, targets="conv"))
    randomize(net)
    x = torch.randn(1, 4, 6, 6)
    before = net.eval()(x)
    merge(net, unload=unload)
    assert net[0].weight.stride() == strides
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_a_merge_that_fails_in_any_way_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small()
    inject(net, FLoRA(rank=2, targets=["0", "2"]))
    randomize(net)
    before = [net[0].weight.clone(), net[2].weight.clone()]
    second = net[2].adapters["default"]["weight"]

    def fails(*tensors: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(second, "compose", fails)
    with pytest.raises(MemoryError):
        merge(net)
    assert torch.equal(net[0].weight, before[0])
    assert torch.equal(net[2].weight, before[1])
    assert not net[0].adapters.merged


def test_a_merge_between_forward_and_backward_is_noticed() -> None:
    net = small()
    inject(net, FLoRA(rank=2, targets=["0", "2"], path="merged"))
    randomize(net)
    loss = net(torch.randn(2, 6, dtype=torch.float64)).sum()
    merge(net)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_merge_that_overflows_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 4)).half()
    net[0].weight.data.fill_(60000.0)
    inject(net, LoRA(rank=1, alpha=1.0, targets="0"))
    for parameter in net[0].adapters.parameters():
        parameter.data.fill_(200.0)
    with pytest.raises(AdapterError, match=r"not finite in torch\.float16"):
        merge(net)
    assert torch.equal(net[0].weight, torch.full_like(net[0].weight, 60000.0))


def test_merging_no_adapter_merges_none() -> None:
    net = small()
    inject(net, FLoRA(rank=2, targets="0"))
    randomize(net)
    before = net[0].weight.clone()
    merge(net, [])
    assert torch.equal(net[0].weight, before)


def test_a_module_that_is_used_twice_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.GELU(), layer)
    base = deepcopy(net)
    inject(net, FLoRA(rank=2, targets="linear"))
    randomize(net)
    load(base, save(net, tmp_path))
    x = torch.randn(2, 4)
    assert torch.equal(base(x), net(x))


def test_a_head_goes_with_the_adapter_it_was_trained_with(tmp_path: Path) -> None:
    """The model holds one head: a second adapter must not take the first one's from it."""
    folders = {}
    for value, name in ((1.0, "a"), (2.0, "b")):
        net = small()
        inject(net, FLoRA(rank=2, targets="0"), train=["2"])
        net[2].weight.data.fill_(value)
        folders[name] = save(net, tmp_path / name)
    both = small()
    load(both, folders["a"], name="a")
    with pytest.raises(AdapterError, match=r"2\.weight of its own"):
        load(both, folders["b"], name="b")
    assert adapter_names(both) == ["a"]
    assert torch.equal(both[2].weight, torch.full_like(both[2].weight, 1.0))


def test_a_second_adapter_does_not_cost_the_first_its_head(tmp_path: Path) -> None:
    net = small()
    inject(net, FLoRA(rank=2, targets="0"), name="a", train=["2"])
    net[2].weight.data.fill_(1.0)
    inject(net, FLoRA(rank=2, targets="0"), name="b")
    assert not net[2].weight.requires_grad
    again = small()
    load(again, save(net, tmp_path, name="a"))
    assert torch.equal(again[2].weight, net[2].weight)


def test_tunings_that_would_do_nothing_or_harm_are_refused() -> None:
    with pytest.raises(AdapterError, match="trains nothing"):
        inject(small(), Probe())
    net = small()
    inject(net, FLoRA(rank=2, targets="0"))
    with pytest.raises(AdapterError, match="unload them first"):
        inject(net, BitFit())
    assert all(p.requires_grad for p in net[0].adapters.parameters())


def test_an_exact_name_trains_that_module_alone() -> None:
    net = nn.ModuleDict({"fc": nn.Linear(2, 2), "se": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    inject(net, LoRA(rank=1, targets="se.fc"), train=["fc"])
    assert net["fc"].weight.requires_grad
    assert not net["se"]["fc"].weight.requires_grad


def test_a_frozen_head_is_told() -> None:
    net = nn.Sequential()
    net.add_module("body", nn.Linear(64, 64))
    net.add_module("head", nn.Linear(64, 2))
    (warning,) = inject(net, LoRA(targets="body")).warnings
    assert "train=['head']" in warning


def test_layers_whose_forward_or_weight_is_patched_are_refused() -> None:
    patched = small()
    patched[0].forward = patched[0].forward
    pruned = small()
    prune.identity(pruned[0], "weight")
    for net, target in ((patched, "0"), (pruned, "0.weight_orig")):
        with pytest.raises(AdapterError, match="0"):
            inject(net, FLoRA(rank=2, targets=target))


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_the_merged_path_takes_no_input_that_the_base_would_not(dtype: torch.dtype) -> None:
    net = small()
    inject(net, FLoRA(rank=2, targets="0", path="merged"))
    with pytest.raises(RuntimeError):
        net(torch.ones(2, 6, dtype=dtype))


def test_half_precision_on_the_merged_path_is_warned_of() -> None:
    net = nn.MultiheadAttention(64, 2).to(torch.bfloat16)
    report = inject(net, LoRA(rank=2, targets="attention"))
    assert any("bfloat16 loses" in warning for warning in report.warnings)


def test_huge_ranks_in_a_damaged_config_ask_for_no_memory(tmp_path: Path) -> None:
    net = small()
    inject(net, FLoRA(rank=2, targets="0"))
    config = save(net, tmp_path) / "adapter_config.json"
    content = json.loads(config.read_text())
    content["deltas"]["0.weight"]["ranks"] = [10**7, 10**7]
    config.write_text(json.dumps(content))
    with pytest.raises(AdapterError, match=r"0\.weight"):
        load(small(), tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("scale", "big"), ("scale", float("nan")), ("path", "zzz"), ("type", None)]
)
def test_settings_of_a_wrong_type_are_refused(key: str, value: object, tmp_path: Path) -> None:
    net = small()
    inject(net, FLoRA(rank=2, targets="0"))
    config = save(net, tmp_path) / "adapter_config.json"
    content = json.loads(config.read_text())
    content["deltas"]["0.weight"][key] = value
    config.write_text(json.dumps(content))
    again = small()
    with pytest.raises(AdapterError):
        load(again, tmp_path)
    assert type(again[0]) is nn.Linear


def test_checkpointing_around_attention_keeps_its_memory() -> None:
    """Hooks of autograd do not nest: ours must hand on what is not theirs."""

    def kept(adapted: bool) -> int:
        torch.manual_seed(0)
        net = nn.MultiheadAttention(32, 2, batch_first=True)
        if adapted:
            inject(net, LoRA(rank=2, targets="attention"))
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        x = torch.randn(4, 20, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(x, x, x)
        return total

    assert kept(adapted=True) > 0.8 * kept(adapted=False)
    net = nn.MultiheadAttention(32, 2, batch_first=True)
    x = torch.randn(4, 20, 32)
    inject(net, LoRA(rank=2, targets="attention"))
    assert summary(net, (x, x, x)).saved_bytes > x.numel() * x.element_size()


def test_unmerge_after_switching_dtype_and_activate_refuses_while_merged() -> None:
    net = small()
    inject(net, FLoRA(rank=2, targets="0"), name="a")
    inject(net, FLoRA(rank=2, targets="0"), name="b")
    merge(net)
    with pytest.raises(AdapterError, match="unmerge first"):
        activate(net, "a")
    unmerge(net)
    activate(net, "a")
