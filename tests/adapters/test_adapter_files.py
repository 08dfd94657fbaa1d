"""Saving and loading: what is in the two files, and what each kind of damage says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from litflora.adapters import (
    AdapterError,
    BitFit,
    DoRA,
    FLoRA,
    LoHa,
    LoKr,
    LoRA,
    MoRA,
    NormTuning,
    Parts,
    Probe,
    Tuning,
    adapter_names,
    inject,
    load,
    merge,
    read_config,
    save,
    trainable_parameters,
    unmerge,
)

from .cases import METHODS, Case, adapt, assert_close, factors, randomize, table
from .toys import images, net, trained, unchanged

FILES = {"adapter_model.safetensors", "adapter_config.json"}


# What is written --------------------------------------------------------------------------------


def test_two_files_with_nothing_of_the_base(tmp_path: Path) -> None:
    model = trained()
    folder = save(model, tmp_path / "deep" / "adapter", metadata={"task": "classification"})
    assert folder == tmp_path / "deep" / "adapter"
    assert {path.name for path in folder.iterdir()} == FILES
    tensors = load_file(folder / "adapter_model.safetensors")
    groups = trainable_parameters(model)
    expected = sum(
        p.numel() * p.element_size() for group in groups.values() for p in group.values()
    )
    buffers = sum(b.numel() * b.element_size() for b in model.norm.buffers())
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == expected + buffers
    assert (folder / "adapter_model.safetensors").stat().st_size < expected + buffers + 200 * len(
        tensors
    )
    base = net().state_dict()
    for key, tensor in tensors.items():
        for name, weight in base.items():
            if weight.dim() > 1 and weight.shape == tensor.shape:
                assert not torch.equal(tensor, weight), f"{key} is the base's {name}"


def test_config_says_what_it_is(tmp_path: Path) -> None:
    metadata = {
        "task": "classification",
        "class_names": ["a", "b"],
        "nested": {"img_size": 96, "x": None},
    }
    folder = save(trained(), tmp_path / "a", metadata=metadata)
    config = read_config(folder)
    assert config["metadata"] == metadata
    assert config == json.loads((folder / "adapter_config.json").read_text())
    text = json.dumps(config)
    import litflora

    for part in ("FLoRA", getattr(litflora, "__version__", "0.")):
        assert part in text
    assert load(net(), folder) == config


def test_saving_replaces_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    save(trained(), tmp_path / "a")
    second = trained(LoRA(rank=2, targets="all"))
    with pytest.raises(AdapterError, match="overwrite"):
        save(second, tmp_path / "a")
    load(net(), tmp_path / "a")  # what was there still is
    save(second, tmp_path / "a", overwrite=True)
    assert {path.name for path in (tmp_path / "a").iterdir()} == FILES
    model = net()
    load(model, tmp_path / "a")
    assert torch.equal(model(images()), second(images()))


# Round trips ------------------------------------------------------------------------------------


@table(methods=METHODS, path=False)
def test_every_layer_comes_back_exactly(case: Case, method: str, path: str, tmp_path: Path) -> None:
    model, base = adapt(case, method)
    load(base, save(model, tmp_path))
    inputs = case.inputs()
    assert torch.equal(base(*inputs), model(*inputs))
    for mine, theirs in zip(factors(base), factors(model), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.requires_grad == theirs.requires_grad


@pytest.mark.parametrize(
    "tuning",
    [
        FLoRA(
            rank=3,
            targets=["stem", "mlp.*"],
            exclude="mlp.2",
            rank_pattern={"stem": [2, 2, 1, 3]},
            scale_pattern={"mlp.0": 0.3},
        ),
        FLoRA(
            rank=2,
            spatial_rank=[1, 3],
            targets="conv",
            freeze_spatial=True,
            init="paper",
            scale=4.0,
        ),
        LoRA(
            rank=3,
            alpha=5,
            targets="all",
            rank_stabilized=True,
            rank_pattern={"dw": 1},
            alpha_pattern={"stem": 2.0},
        ),
        LoRA(rank=2, targets=nn.Linear, parts={"mlp.0": Parts(of=3, adapt=[0, 2])}),
        LoRA(rank=2, targets=["re:mlp\\..*", nn.Conv2d], dropout=0.25),
        DoRA(rank=2, targets="all", parts={"mlp.0": Parts(of=3, adapt=[0, 2])}),
        MoRA(rank=1, targets="all", kind="sharing"),
        LoHa(rank=2, targets="all", rank_pattern={"dw": 1}),
        LoKr(rank=1, targets="all", decompose_factor=2, decompose_both=True),
        BitFit(),
        NormTuning(),
        Probe(),
    ],
    ids=[
        "flora-patterns",
        "flora-frozen",
        "lora-patterns",
        "parts",
        "types+regex",
        "dora-parts",
        "mora",
        "loha",
        "lokr",
        "BitFit",
        "NormTuning",
        "Probe",
    ],
)
def test_every_setting_comes_back(tuning: Tuning, tmp_path: Path) -> None:
    model, again = trained(tuning), net()
    load(again, save(model, tmp_path))
    assert torch.equal(again(images()), model(images()))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in again.named_parameters()} == flags
    torch.manual_seed(2)
    expected = model.train()(images())
    torch.manual_seed(2)
    assert torch.equal(again.train()(images()), expected), "dropout too"


def test_under_another_name_and_beside_another(tmp_path: Path) -> None:
    model = trained(name="first_py", train=())
    folder = save(model, tmp_path / "a", name="first_py")
    second = net()
    load(second, folder, name="adapters")
    assert list(adapter_names(second)) == ["adapters"]
    assert torch.equal(second(images()), model(images()))
    load(second, save(trained(LoRA(targets="linear"), train=()), tmp_path / "b"), name="other")
    assert list(adapter_names(second)) == ["adapters", "other"]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert not any("first_py" in key for key in load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", ["lora_A", "core", "stem", "factors", "adapters", "head"])
def test_names_that_occur_in_keys(name: str, tmp_path: Path) -> None:
    model, again = trained(name=name), net()
    load(again, save(model, tmp_path, name=name), name=name)
    assert torch.equal(again(images()), model(images()))


def test_names_that_flatten_to_the_same(tmp_path: Path) -> None:
    """`a.b_c` and `a_b.c` are one name in LyCORIS's files."""

    def build() -> nn.Module:
        torch.manual_seed(5)
        model = nn.Module()
        model.add_module("a", nn.Module())
        model.a.add_module("b_c", nn.Linear(4, 4))
        model.add_module("a_b", nn.Module())
        model.a_b.add_module("c", nn.Linear(4, 4))
        return model

    model, again = build(), build()
    inject(model, LoRA(rank=2, targets="linear"))
    randomize(model)
    load(again, save(model, tmp_path))
    assert [torch.equal(x, y) for x, y in zip(factors(model), factors(again), strict=True)] == [
        True
    ] * 4


def test_in_another_process(tmp_path: Path) -> None:
    saved = save(trained(), tmp_path / "adapter")
    script = (
        "import sys, torch\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "torch.set_num_threads(1)\n"
        f"from {__package__}.toys import images, net\n"
        "from litflora.adapters import load\n"
        "model = net(); load(model, sys.argv[2])\n"
        "torch.save(model(images()).detach(), sys.argv[3])\n"
    )
    root = Path(__file__).resolve().parents[__package__.count(".") + 1]
    out = tmp_path / "y.pt"
    subprocess.run([sys.executable, "-c", script, str(root), str(saved), str(out)], check=True)
    model = net()
    load(model, saved)
    assert torch.equal(torch.load(out), model(images()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_onto_a_base_of_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """The same weights cast are the same base; factors come back as they were saved."""
    model = net(torch.float32)
    inject(model, FLoRA(rank=3, targets="all"))
    randomize(model)
    cast = net(torch.float32).to(dtype)
    load(cast, save(model, tmp_path))
    for mine, theirs in zip(factors(cast), factors(model), strict=True):
        assert torch.equal(mine.to(theirs.dtype), theirs)
    x = images(dtype=torch.float32)
    y = cast(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - model(x)).abs().max() < 0.1 * model(x).abs().max()


def test_merged_or_not_saves_the_same(tmp_path: Path) -> None:
    model = trained()
    save(model, tmp_path / "a")
    merge(model)
    save(model, tmp_path / "b")
    unmerge(model)
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_batch_norm_statistics_travel(tmp_path: Path) -> None:
    model = net(torch.float32)
    inject(model, FLoRA(rank=3, targets="all"), train=["head"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(5 + 3 * images(dtype=torch.float32)).square().mean().backward()
        optimizer.step()
    model.eval()
    x, again = images(dtype=torch.float32), net(torch.float32)
    assert not torch.equal(model.norm.running_mean, again.norm.running_mean)
    load(again, save(model, tmp_path))
    assert torch.equal(again(x), model(x))
    assert int(again.norm.num_batches_tracked) == 3


@pytest.mark.parametrize("asked", [(), ("norm",)], ids=["as_saved", "and_norm"])
@pytest.mark.parametrize("train", [("head",), ()], ids=["head", "nothing"])
def test_what_was_trained_trains_on(
    train: tuple[str, ...], asked: tuple[str, ...], tmp_path: Path
) -> None:
    model, again = trained(train=train), net()
    load(again, save(model, tmp_path), train=asked)
    assert_close(again(images()), model(images()), 1e-12)
    groups = trainable_parameters(again)
    assert {name.split(".")[0] for name in groups["other"]} == {*train, *asked}
    assert groups["adapters"].keys() == trainable_parameters(model)["adapters"].keys()
    model = net()
    with unchanged(model), pytest.raises(AdapterError, match=r"(?s)haed.*head"):
        load(model, tmp_path, train=["haed"])


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    model, saved = net(), save(trained(), tmp_path)
    load(model, saved)
    with unchanged(model), pytest.raises(AdapterError, match="default"):
        load(model, saved)  # the name is taken


# Damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda folder: save(nn.Linear(2, 2).requires_grad_(False), folder), "nothing to save"),
        (lambda folder: save(trained(), folder, name="typo"), "typo"),
        (lambda folder: save(trained(), folder, format="typo"), "typo"),  # type: ignore[arg-type]
        (lambda folder: save(trained(), folder, metadata={"x": object()}), "(?i)metadata"),
    ],
    ids=["nothing", "name", "format", "metadata"],
)
def test_save_mistakes_write_nothing(mistake: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        mistake(tmp_path / "a")
    assert not list(tmp_path.glob("a/*"))


def test_non_contiguous_tensors_are_saved(tmp_path: Path) -> None:
    model = trained()
    model.head.weight.data = model.head.weight.data.t().contiguous().t()
    for parameter in factors(model):
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()
    assert not any(p.is_contiguous() for p in factors(model) if min(p.shape) > 1 and p.dim() == 2)
    again = net()
    load(again, save(model, tmp_path))
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
