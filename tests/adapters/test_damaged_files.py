"""Each kind of damage, and each wrong base, is named; the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from litflora.adapters import (
    AdapterError,
    LoRA,
    inject,
    load,
    merge,
    save,
)

from .toys import edit_config, edit_tensors, images, net, trained, unchanged


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(trained(), tmp_path / "adapter")


def first(tensors: dict[str, Tensor], part: str) -> str:
    return next(key for key in tensors if part in key)


def drop(part: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda t: t.pop(first(t, part)))


def resize(part: str, mode: int) -> Callable[[Path], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        key = first(tensors, part)
        tensors[key] = torch.cat([tensors[key], tensors[key].narrow(mode, 0, 1)], mode)

    return lambda folder: edit_tensors(folder, edit)


def write(name: str, data: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(data(path.read_bytes()) if callable(data) else data)

    return damage


def record(config: dict[str, Any], layer: str = "mlp.0.weight") -> dict[str, Any]:
    return config["deltas"][layer]


# Each names the layer or key, and both sides where there are two.
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing_factor": (drop("mlp.0"), r"mlp\.0"),
    "missing_head": (drop("head.weight"), r"head\.weight"),
    "missing_buffer": (drop("norm.running_mean"), r"norm\.running_mean"),
    "unexpected_key": (lambda f: edit_tensors(f, lambda t: t.update(extra=torch.ones(1))), "extra"),
    "unexpected_factor": (
        lambda f: edit_tensors(f, lambda t: t.update({first(t, "mlp.0") + "x": torch.ones(3, 3)})),
        r"mlp\.0.*x",
    ),
    "unexpected_layer": (
        lambda f: edit_tensors(
            f, lambda t: t.update({first(t, "mlp.0").replace("mlp.0", "mlp.9"): torch.ones(3, 3)})
        ),
        r"mlp\.9",
    ),
    "shape_of_head": (resize("head.weight", 0), r"(?s)head\.weight.*6.*5|head\.weight.*5.*6"),
    "shape_of_factor": (resize("mlp.0", 0), r"(?s)mlp\.0.*4.*3|mlp\.0.*3.*4"),
    "rank": (
        lambda f: edit_config(f, lambda c: record(c).update(ranks=[2, 2])),
        r"(?s)mlp\.0.*3.*2|mlp\.0.*2.*3",
    ),
    "method": (
        lambda f: edit_config(f, lambda c: record(c).update(type="FLoRADelat")),
        r"mlp\.0.*FLoRADelat",
    ),
    "layer_gone_from_config": (
        lambda f: edit_config(f, lambda c: c["deltas"].pop("mlp.0.weight")),
        r"mlp\.0",
    ),
}


# Each names the file.
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "value_in_config": (lambda f: edit_config(f, lambda c: record(c).update(scale=2.0)), "adapter"),
    "dropout_in_config": (
        lambda f: edit_config(f, lambda c: record(c).update(dropout=2.0)),
        "adapter",
    ),
    "type_in_config": (
        lambda f: edit_config(f, lambda c: record(c).update(ranks="two")),
        "adapter",
    ),
    "unknown_setting": (lambda f: edit_config(f, lambda c: record(c).update(sclae=2.0)), "adapter"),
    "empty_config": (write("adapter_config.json", b"{}"), r"adapter_config\.json"),
    "hollow_config": (
        lambda f: edit_config(
            f, lambda c: [c.pop(k) for k in list(c) if k not in ("format", "checksum")]
        ),
        "adapter",
    ),
    "other_format": (lambda f: edit_config(f, lambda c: c.update(format=99)), "99"),
    "value_of_tensor": (
        lambda f: edit_tensors(f, lambda t: t[first(t, "mlp.0")].view(-1)[:1].add_(1)),
        "adapter",
    ),
    "truncated_tensors": (
        write("adapter_model.safetensors", lambda b: b[:-50]),
        r"adapter_model\.safetensors",
    ),
    "truncated_header": (
        write("adapter_model.safetensors", lambda b: b[:20]),
        r"adapter_model\.safetensors",
    ),
    "empty_tensors": (write("adapter_model.safetensors", b""), r"adapter_model\.safetensors"),
    "truncated_config": (
        write("adapter_config.json", lambda b: b[: len(b) // 2]),
        r"adapter_config\.json",
    ),
    "config_is_a_list": (write("adapter_config.json", b"[1, 2]"), r"adapter_config\.json"),
    "config_is_not_text": (write("adapter_config.json", b"\xff\xfe\x00"), r"adapter_config\.json"),
    "no_tensors": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        r"adapter_model\.safetensors",
    ),
    "no_config": (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json"),
}


@pytest.mark.parametrize(
    ("hurt", "message"),
    [pytest.param(*damage, id=name) for name, damage in (WRONG | DAMAGED).items()],
)
def test_damage_raises_by_name_and_changes_nothing(
    hurt: Callable[[Path], Any], message: str, saved: Path
) -> None:
    hurt(saved)
    model = net()
    with unchanged(model), pytest.raises(AdapterError, match=message) as error:
        load(model, saved)
    assert len(str(error.value).splitlines()) <= 3


def test_a_model_without_memory_wants_a_device(saved: Path) -> None:
    with torch.device("meta"):
        model = net()
    with pytest.raises(AdapterError, match=r"load\(\.\.\., device=\.\.\.\)"):
        load(model, saved)


def test_metadata_may_be_edited(saved: Path) -> None:
    edit_config(saved, lambda c: c["metadata"].update(note="mine"))
    assert load(net(), saved)["metadata"] == {"note": "mine"}


def other_width() -> nn.Module:
    model = net()
    model.mlp = nn.Sequential(nn.Linear(8, 14), nn.GELU(), nn.Linear(14, 8)).double()
    return model


def without_a_layer() -> nn.Module:
    model = net()
    model.dw = nn.Identity()
    return model


def nudged(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = net()
        with torch.no_grad():
            model.get_parameter(name).view(-1)[0] += 0.5
        return model

    return build


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: net(seed=2), r"(?i)base"),
        (nudged("mlp.0.weight"), r"(?i)base"),
        (nudged("norm.weight"), r"(?i)base"),
        (other_width, r"(?s)mlp\.0.*(12.*14|14.*12)"),
        (without_a_layer, "dw"),
        (lambda: nn.Linear(3, 3).double(), "stem"),
    ],
    ids=[
        "other_values",
        "one_weight_differs",
        "a_norm_differs",
        "other_width",
        "layer_missing",
        "another_model",
    ],
)
def test_another_base_is_refused(build: Callable[[], nn.Module], message: str, saved: Path) -> None:
    model = build()
    with unchanged(model), pytest.raises(AdapterError, match=message):
        load(model, saved)


def test_another_base_is_refused_in_another_dtype_too(tmp_path: Path) -> None:
    """Two random layers have the same norm: that alone does not tell them apart."""

    def layer(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(256, 256, bias=False))

    model = layer(1)
    inject(model, LoRA(rank=2, targets="0"))
    folder = save(model, tmp_path)
    load(layer(1).bfloat16(), folder)
    other = layer(2).bfloat16()
    with unchanged(other), pytest.raises(AdapterError, match=r"0\.weight"):
        load(other, folder)


def test_another_head_is_refused_with_both_sizes(saved: Path) -> None:
    model = net()
    model.head = nn.Linear(8, 7).double()
    with unchanged(model), pytest.raises(AdapterError, match=r"(?s)head.*5.*7|head.*7.*5"):
        load(model, saved)


def test_the_head_that_was_trained_is_no_part_of_the_base(saved: Path) -> None:
    """A fresh, random head is replaced by the saved one: its values are no fingerprint."""
    model, expected = net(), net()
    nn.init.normal_(model.head.weight)
    load(model, saved), load(expected, saved)
    assert torch.equal(model(images()), expected(images()))


def test_load_onto_a_merged_or_trained_base_is_refused(saved: Path) -> None:
    model = trained()
    merge(model, unload=True)
    with unchanged(model), pytest.raises(AdapterError, match=r"(?i)base"):
        load(model, saved)


@pytest.mark.parametrize("where", ["nowhere", "file"])
def test_a_path_that_is_no_adapter(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hello")
    with pytest.raises((AdapterError, FileNotFoundError), match=where):
        load(net(), tmp_path / where)
