import pytest
import timm
import torch
from torch import nn

from litflora.adapters import FLoRA, LoRA, inject
from litflora.backbones import create, default_targets
from litflora.heads import classifier_names

VIT = {"blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2"}
MLP = {"stages.*.blocks.*.mlp.fc1", "stages.*.blocks.*.mlp.fc2"}
CONVS = {"stages.*.blocks.*.conv_dw", "stages.*.downsample.1"}
FAMILIES = [
    "test_vit",
    "test_convnext",
    "convnext_atto",  # 1x1 convolutions where others have linear layers
    "convnextv2_atto",
    "deit3_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "vit_base_patch16_clip_224",
    "swin_tiny_patch4_window7_224",
]


@pytest.mark.parametrize(
    ("name", "lora", "flora"),
    [
        ("test_vit", VIT, VIT),
        ("vit_small_patch16_dinov3_qkvb", VIT, VIT),
        ("test_convnext", MLP, MLP | CONVS),
        ("convnext_atto", MLP, MLP | CONVS),
        ("convnextv2_atto", MLP, MLP | CONVS),
    ],
)
def test_families(name, lora, flora):
    with torch.device("meta"):
        net = timm.create_model(name)
    assert set(default_targets(net, LoRA())) == lora
    assert set(default_targets(net, FLoRA())) == flora


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tuning", [FLoRA, LoRA])
def test_stem_and_head_stay_and_every_pattern_matches(name, tuning):
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=3)
    targets = default_targets(net, tuning())
    report = inject(net, tuning(targets=targets), train=classifier_names(net))  # strict
    for row in report.rows:
        assert row.layer.startswith(("blocks.", "stages.", "layers."))
        assert ".head" not in row.layer


@pytest.mark.parametrize(
    ("name", "size"), [("test_vit", 32), ("test_convnext", 32), ("eva02_tiny_patch14_224", 28)]
)
def test_every_delta_gets_a_gradient(name, size):
    """A layer whose weight is read past it would train nothing, as qkv of EVA and BEiT."""
    net = create(name, None, 3, size)
    inject(net, LoRA(rank=1, targets=default_targets(net, LoRA())))
    net(torch.rand(2, 3, size, size)).square().sum().backward()
    trained = {n: p for n, p in net.named_parameters() if n.endswith("lora_B")}
    assert trained
    assert all(p.grad is not None and p.grad.any() for p in trained.values())


def test_nothing_to_adapt():
    net = timm.create_model("resnet18", pretrained=False)
    net.layer2, net.layer3, net.layer4 = nn.Identity(), nn.Identity(), nn.Identity()
    with pytest.raises(ValueError, match=r"name tuning\.targets"):
        default_targets(net, LoRA())
