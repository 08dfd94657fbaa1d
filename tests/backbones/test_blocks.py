"""The one hook that says what the blocks of a backbone are, and blocks that keep their inputs."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from litflora.adapters import FLoRA, inject
from litflora.adapters.summary import measure
from litflora.backbones.blocks import blocks, check_checkpointing, checkpoint_activations
from litflora.segmentation import SegmentationModule


@pytest.mark.parametrize(
    ("name", "count", "kinds"),
    [
        ("vit_tiny_patch16_224", 12, {"Block"}),
        ("convnext_atto", 12 + 3, {"ConvNeXtBlock", "Sequential"}),
        ("convnextv2_atto", 12 + 3, {"ConvNeXtBlock", "Sequential"}),
        ("swin_tiny_patch4_window7_224", 12 + 3, {"SwinTransformerBlock", "PatchMerging"}),
        ("eva02_tiny_patch14_224", 12, {"EvaBlock"}),
        ("hiera_tiny_224", 12, {"HieraBlock"}),
        ("resnet18", 8, {"BasicBlock"}),
    ],
)
def test_blocks_of_timm_models(name: str, count: int, kinds: set[str]) -> None:
    with torch.device("meta"):
        net = timm.create_model(name)
    found = blocks(net)
    assert len(found) == count
    assert {type(block).__name__ for block in found.values()} == kinds
    inside = sum(p.numel() for block in found.values() for p in block.parameters())
    assert inside > 0.9 * sum(p.numel() for p in net.parameters())


def test_blocks_inside_a_dense_net() -> None:
    made = SegmentationModule("convnext_shapes", 3, weights="embedded", head_width=16)
    made.configure_model()
    plain = blocks(timm.create_model("convnext_shapes"))
    assert list(blocks(made.net)) == [f"pyramid.backbone.{name}" for name in plain]


def test_a_model_without_blocks_is_named() -> None:
    with torch.device("meta"):
        net = timm.create_model("cait_xxs24_224")
    with pytest.raises(ValueError, match="Cait has no blocks that timm knows of"):
        blocks(net)


def gradients(net: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    torch.manual_seed(5)  # of dropped paths and dropout
    net.train().zero_grad()
    net(x).square().sum().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("recompute", ["pointwise", "none"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["test_vit", "convnext_shapes"])
def test_the_same_gradients_from_less_memory(name: str, dropout: float, recompute: str) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3, drop_path_rate=0.2)
    inject(
        net, FLoRA(rank=2, targets="linear", dropout=dropout, recompute=recompute), train=["head"]
    )
    for name_, parameter in net.named_parameters():
        if ".adapters." in name_:
            nn.init.normal_(parameter, std=0.1)
    side = net.pretrained_cfg["input_size"][-1]
    x, saved = torch.rand(2, 3, side, side), []
    expected = gradients(net, x)
    keys = list(net.state_dict())
    for how in ("none", "every-2", "blocks"):
        other = deepcopy(net)
        checkpoint_activations(other, how)
        found = gradients(other, x)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert torch.equal(value, expected[key]), (how, key)
        saved.append(measure(other, x)[0])
        assert list(other.state_dict()) == keys
        assert all(
            isinstance(b, type(a)) for a, b in zip(net.modules(), other.modules(), strict=True)
        )
        assert torch.equal(other.eval()(x), deepcopy(net).eval()(x))
        gradients(deepcopy(other), x)  # a copy, as of EMA, goes on working
    none, half, all_ = saved
    assert all_ < half < none
    assert all_ < none / 2


def test_what_can_be_asked_for() -> None:
    assert [check_checkpointing(how) for how in ("none", "blocks", "every-3")] == [0, 1, 3]
    for how in ("every-0", "every", "all", "every-x"):
        with pytest.raises(ValueError, match="none, blocks, or every-k"):
            check_checkpointing(how)
