"""A backbone built without its weights is, once filled, the one that was built with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny import save_base
from torch import nn

from litflora.adapters import FLoRA, Full, check_base, inject, load, save
from litflora.backbones import create
from litflora.backbones import deferred as module
from litflora.backbones.deferred import deferring

CPU = torch.device("cpu")


def built(*args: Any) -> tuple[nn.Module, torch.Tensor]:
    """A model, and the next random number after it."""
    torch.manual_seed(0)
    return create(*args), torch.rand(3)


def deferred(*args: Any) -> tuple[nn.Module, torch.Tensor, module.Deferred]:
    torch.manual_seed(0)
    with deferring() as weights:
        net = create(*args)
    return net, torch.rand(3), weights


@pytest.mark.parametrize("classes", [5, 7])
@pytest.mark.parametrize(
    ("name", "size"),
    [("test_vit", None), ("test_vit", 32), ("convnext_shapes", None), ("resnet18", None)],
)
def test_it_is_the_same_model(name: str, size: int | None, classes: int, tmp_path: Path) -> None:
    path = "embedded" if name == "convnext_shapes" else str(save_base(tmp_path, name))
    expected, numbers = built(name, path, classes, size)
    net, found, weights = deferred(name, path, classes, size)
    empty = [key for key, p in net.named_parameters() if p.is_meta]
    assert len(empty) >= len(list(net.parameters())) - 2  # all but a new head
    assert not any(b.is_meta for b in net.buffers())
    assert torch.equal(found, numbers)  # what is drawn next is what would have been drawn
    weights.fill(net, CPU)
    state = expected.state_dict()
    assert net.state_dict().keys() == state.keys()
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key
    side = size or net.pretrained_cfg["input_size"][-1]
    x = torch.rand(1, 3, side, side)
    assert torch.equal(net.eval()(x), expected.eval()(x))


def test_values_stay_in_the_file_until_they_are_wanted(tmp_path: Path) -> None:
    net, _, weights = deferred("test_vit", str(save_base(tmp_path)), 5, 32)
    sources = {key: _source(weights, net, key) for key, _ in net.named_parameters()}
    resampled = {key for key, source in sources.items() if source.values is not None}
    assert resampled == {"pos_embed"}
    state = load_file(tmp_path / "test_vit.safetensors")
    weight = state["blocks.1.mlp.fc1.weight"]
    assert torch.equal(sources["blocks.1.mlp.fc1.weight"].read(3, 7), weight[3:10])


def _source(weights: module.Deferred, net: nn.Module, key: str) -> module.Source:
    layer, _, name = key.rpartition(".")
    return weights.sources[net.get_submodule(layer)][name]


def test_other_formats_are_read_whole(tmp_path: Path) -> None:
    state = load_file(save_base(tmp_path))
    torch.save(state, tmp_path / "base.pth")
    net, _, weights = deferred("test_vit", str(tmp_path / "base.pth"), 5)
    weights.fill(net, CPU)
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key])


def test_the_head_of_weights_with_other_classes_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As weights of the hub come: timm leaves their head out."""
    file = str(save_base(tmp_path, num_classes=1000))
    monkeypatch.setattr(module, "timm", _Hub(file))
    net, _, weights = deferred("test_vit", "pretrained", 7)
    weights.fill(net, CPU)
    assert net.head.weight.shape[0] == 7
    assert all(p.isfinite().all() for p in net.head.parameters())
    state = load_file(file)
    for key, value in net.state_dict().items():
        assert key.startswith("head.") or torch.equal(value, state[key])


class _Hub:
    """timm, whose hub is a file."""

    def __init__(self, file: str) -> None:
        self.overlay = {"file": file}

    def create_model(self, *args: Any, **options: Any) -> nn.Module:
        return timm.create_model(*args, pretrained_cfg_overlay=self.overlay, **options)


def test_weights_that_lack_a_parameter_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save_base(tmp_path, num_classes=1000)
    state = load_file(file)
    del state["norm.weight"]
    save_file(state, file)
    monkeypatch.setattr(module, "timm", _Hub(str(file)))
    # timm is strict only where the classes are those of the weights.
    with pytest.raises(ValueError, match=r"lack norm\.weight"):
        deferred("test_vit", "pretrained", 7)


def test_a_damaged_file_is_named_as_always(tmp_path: Path) -> None:
    file = save_base(tmp_path)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read"):
        deferred("test_vit", str(file), 5)


def test_deltas_are_real_and_the_base_is_checked_afterwards(tmp_path: Path) -> None:
    file = str(save_base(tmp_path))
    expected, _ = built("test_vit", file, 5)
    inject(expected, FLoRA(rank=2, targets="linear"), train=["head"])
    save(expected, tmp_path / "adapter")
    net, _, weights = deferred("test_vit", file, 5)
    config = load(net, tmp_path / "adapter", device=CPU)
    assert not any(p.is_meta for n, p in net.named_parameters() if ".adapters." in n)
    weights.fill(net, CPU)
    check_base(net, config)
    for key, value in net.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key])
    with torch.no_grad():
        net.blocks[0].attn.qkv.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight differ"):
        check_base(net, config)


def test_what_an_adapter_trained_in_place_wins_over_the_file(tmp_path: Path) -> None:
    file = str(save_base(tmp_path))
    tuned, _ = built("test_vit", file, 5)
    inject(tuned, Full())
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 1
    save(tuned, tmp_path / "adapter")
    net, _, weights = deferred("test_vit", file, 5)
    load(net, tmp_path / "adapter", device=CPU)
    weights.fill(net, CPU)
    for key, value in net.state_dict().items():
        assert torch.equal(value, tuned.state_dict()[key]), key
