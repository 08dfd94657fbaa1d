"""Whole backbones of timm and torchvision with random weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from litflora.adapters import FLoRA, inject, load, merge, save, summary, unload, unmerge

from .cases import assert_close, deltas, factors, randomize, relative_error

CLASSES = 5


def from_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        timm = pytest.importorskip("timm")
        return timm.create_model(name, num_classes=CLASSES, **options)

    return build


def from_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        models = pytest.importorskip("torchvision.models")
        return getattr(models, name)(num_classes=CLASSES, **options)

    return build


SMALL_VIT = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 32,
    "mlp_dim": 64,
}

# Model, input size, and one weight of each kind that must be reached.
BACKBONES: dict[str, tuple[Callable[[], nn.Module], int, set[str]]] = {
    "timm-convnext_atto": (
        from_timm("convnext_atto"),
        64,
        {
            "stages.0.blocks.0.conv_dw",
            "stages.0.blocks.0.mlp.fc1",
            "stages.1.downsample.1",
            "stem.0",
        },
    ),
    "timm-convnext_tiny": (
        from_timm("convnext_tiny"),
        64,
        {"stages.3.blocks.2.conv_dw", "stages.2.blocks.8.mlp.fc2"},
    ),
    "timm-convnextv2_atto": (
        from_timm("convnextv2_atto"),
        64,
        {"stages.0.blocks.0.conv_dw", "stages.3.downsample.1"},
    ),
    "timm-vit_tiny": (
        from_timm("vit_tiny_patch16_224", img_size=64),
        64,
        {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.11.mlp.fc2"},
    ),
    "timm-deit_tiny": (
        from_timm("deit_tiny_distilled_patch16_224", img_size=64),
        64,
        {"blocks.0.attn.proj", "blocks.11.mlp.fc1"},
    ),
    "torchvision-resnet18": (
        from_torchvision("resnet18"),
        64,
        {"conv1", "layer1.0.conv1", "layer4.0.downsample.0"},
    ),
    "torchvision-vit": (
        from_torchvision("VisionTransformer", **SMALL_VIT),
        32,
        {
            "conv_proj",
            "encoder.layers.encoder_layer_1.self_attention",
            "encoder.layers.encoder_layer_0.mlp.0",
            "encoder.layers.encoder_layer_0.self_attention.out_proj",
        },
    ),
    "torchvision-convnext_tiny": (
        from_torchvision("convnext_tiny"),
        64,
        {"features.1.0.block.0", "features.7.2.block.5"},
    ),
}


def awake(build: Callable[[], nn.Module]) -> nn.Module:
    """Built from a seed, with what starts at zero opened: behind it nothing would be seen."""
    torch.manual_seed(0)
    model = build().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma", "layer_scale")):
                parameter.fill_(0.5)
            elif parameter.dim() > 1 and not parameter.any():  # a head that starts at zero
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbone(backbone: str, tmp_path: Path) -> None:
    build, size, expected = BACKBONES[backbone]
    model = awake(build)
    fresh, x = deepcopy(model), torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        y = fresh(x)

    head = "heads" if backbone == "torchvision-vit" else head_of(model)
    report = inject(model, FLoRA(rank=8, spatial_rank=2, targets="all"), train=[head])
    adapted = {row.layer for row in report.rows}
    assert expected <= adapted
    assert not any(layer == head or layer.startswith(f"{head}.") for layer in adapted)
    with torch.no_grad():
        assert torch.equal(model(x), y), "identity"

    randomize(model, std=0.2)
    model.train()(x).square().sum().backward()
    for name, delta in deltas(model).items():
        assert all(p.grad is not None and p.grad.isfinite().all() for p in delta.parameters()), name
    own = {id(p) for p in (*factors(model), *model.get_submodule(head).parameters())}
    assert all((p.grad is None) == (id(p) not in own) for p in model.parameters())

    model.eval()
    with torch.no_grad():
        tuned = model(x)
        assert relative_error(tuned, y) > 1e-2
        merge(model)
        assert_close(model(x), tuned, 1e-9, "merged")
        unmerge(model)
        assert torch.equal(model(x), tuned)

    folder = save(model, tmp_path / "adapter")
    load(fresh, folder)
    with torch.no_grad():
        assert_close(fresh(x), tuned, 1e-12, "loaded")
    assert len(list(folder.iterdir())) == 2
    saved = report.adapter_params + sum(p.numel() for p in model.get_submodule(head).parameters())
    statistics = sum(
        b.numel() for name, b in model.named_buffers() if "running" in name or "num_batches" in name
    )
    bytes_ = (folder / "adapter_model.safetensors").stat().st_size
    assert bytes_ < 8 * (saved + statistics) + 250 * len(list(model.state_dict())), (
        "nothing of the base"
    )

    unload(fresh)
    assert not any(hasattr(module, "adapters") for module in fresh.modules())


def head_of(model: nn.Module) -> str:
    return next(name for name in ("head", "fc", "classifier") if hasattr(model, name))


def test_the_table_of_a_real_model_reads_well() -> None:
    report = inject(awake(from_timm("convnext_atto")), FLoRA(rank=8, spatial_rank=2, targets="all"))
    text = str(report)
    assert "depthwise" in text
    assert report.trainable < 0.2 * report.total
    assert all(f"{row.layer}.{row.param}" in text for row in report.rows)


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_timm_gradient_checkpointing(grad_checkpointing: bool) -> None:
    model = awake(from_timm("vit_tiny_patch16_224", img_size=32, depth=2))
    inject(model, FLoRA(rank=2, targets="linear"))
    randomize(model, std=0.2)
    model.set_grad_checkpointing(grad_checkpointing)
    torch.manual_seed(1)
    model.train()(torch.randn(2, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
    total = sum(float(p.grad.square().sum()) for p in factors(model))
    reference = deepcopy(model)
    reference.zero_grad()
    reference.set_grad_checkpointing(False)
    torch.manual_seed(1)
    reference(torch.randn(2, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
    assert total == pytest.approx(
        sum(float(p.grad.square().sum()) for p in factors(reference)), rel=1e-9
    )
    assert total > 0


def test_saved_bytes_of_a_vit_stay_near_full_fine_tuning() -> None:
    """W + dW under plain autograd keeps 1.7 times at small batches; a float32 copy more."""
    x = torch.randn(8, 3, 64, 64)
    full = awake(from_timm("vit_tiny_patch16_224", img_size=64)).float()
    tuned = deepcopy(full)
    inject(tuned, FLoRA(rank=8, targets="linear"))
    kept, of = summary(tuned, x).saved_bytes, summary(full, x).saved_bytes
    assert kept and of and kept <= 1.05 * of  # noqa: PT018
