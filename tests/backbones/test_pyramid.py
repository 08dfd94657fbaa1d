import re

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import save_base

from litflora.adapters import FLoRA, inject, merge
from litflora.backbones import Pyramid, create, create_pyramid, default_targets, normalization

STAGES = {
    "convnext_shapes": (24, 48, 72, 112),
    "convnext_atto": (40, 80, 160, 320),
    "resnet18": (64, 128, 256, 512),  # its map at stride 2 is left out
    "swin_tiny_patch4_window7_224": (96, 192, 384, 768),
}
# A backbone, timm's options and the pyramid's, and the channels and strides that are promised.
LEVELS = (4, 8, 16, 32)
PYRAMIDS = [
    *[(name, {}, {}, channels, LEVELS) for name, channels in STAGES.items()],
    *[("test_vit", {"patch_size": size}, {"width": 24}, (24,) * 4, LEVELS) for size in (4, 8, 16)],
    ("test_vit", {"patch_size": 32}, {"width": 12}, (12,) * 4, LEVELS),
    ("test_vit", {"patch_size": 16}, {"blocks": [2, 4]}, (64, 64), (16, 16)),
    ("test_vit", {"patch_size": 14}, {"blocks": [5]}, (64,), (14,)),
    ("vit_small_patch14_dinov2", {}, {"blocks": [0, 1]}, (384, 384), (14, 14)),
]


def made(case):
    name, of_timm, options, _, stride = case
    if "swin" in name or "vit" in name:
        of_timm = {"img_size": 4 * stride[-1], "dynamic_img_size": True, **of_timm}
    return Pyramid(timm.create_model(name, **of_timm), **options)


def named(case):
    return "-".join(map(str, (case[0], *case[1].values(), *case[2])))


@pytest.mark.parametrize("case", PYRAMIDS, ids=named)
def test_maps_are_what_is_promised(case):
    *_, channels, strides = case
    pyramid = made(case).eval()
    assert (pyramid.channels, pyramid.strides) == (channels, strides)
    for size in (65, 97), (64, 96), (10, 33):
        height, width = (-(-side // strides[-1]) * strides[-1] for side in size)
        with torch.no_grad():
            maps = pyramid(torch.rand(1, 3, *size))
        expected = [(1, c, height // s, width // s) for c, s in zip(channels, strides, strict=True)]
        assert [tuple(features.shape) for features in maps] == expected


def test_padding_is_with_zeros_right_and_below():
    pyramid, image = create_pyramid("convnext_shapes", "embedded").eval(), torch.randn(1, 3, 40, 33)
    padded = F.pad(image, (0, 31, 0, 24))
    for small, large in zip(pyramid(image), pyramid.features(padded), strict=True):
        assert torch.equal(small, large)


def test_stages_are_those_of_the_classifier():
    """The last map, pooled, normed and classified, is what the classifier says."""
    net = create("convnext_shapes", "embedded", num_classes=10).eval()
    pyramid = create_pyramid("convnext_shapes", "embedded").eval()
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net.forward_head(pyramid(image)[-1]), net(image))


def test_blocks_are_timms_own_and_normed(tmp_path):
    path = save_base(tmp_path)
    net = create("test_vit", str(path), num_classes=5, img_size=32).eval()
    pyramid = create_pyramid("test_vit", str(path), 32, blocks=[1, 5]).eval()
    image = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(
        pyramid(image), net.get_intermediate_layers(image, [1, 5], True, norm=True), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    final = net.forward_features(image)[:, 1:].transpose(1, 2).reshape(2, 64, 2, 2)
    torch.testing.assert_close(pyramid(image)[-1], final)


def test_coarse_levels_of_a_simple_feature_pyramid_see_pooled_maps():
    """Level 32 of patches of 16 is conv, norm, conv, norm of the map after a 2 x 2 maximum."""
    neck = create_pyramid("test_vit", None, width=8).neck
    last = torch.randn(1, 64, 4, 6)
    _, conv1, norm1, conv2, norm2 = neck.levels[3]
    pooled = last.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    x = F.layer_norm(conv1(pooled).permute(0, 2, 3, 1), (8,), norm1.weight, norm1.bias, 1e-6)
    x = F.layer_norm(
        conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), (8,), norm2.weight, norm2.bias, 1e-6
    )
    torch.testing.assert_close(neck([last])[3], x.permute(0, 3, 1, 2))


@pytest.mark.parametrize(("blocks", "padded"), [(None, (64, 96)), ([1, 3], (48, 80))])
def test_no_resampling_at_the_training_size(monkeypatch, blocks, padded):
    pyramid = create_pyramid("test_vit", None, (40, 72), blocks).eval()
    assert pyramid.backbone.patch_embed.img_size == padded
    sizes, interpolate = [], F.interpolate

    def counted(*args, **kwargs):
        sizes.append(kwargs["size"])
        return interpolate(*args, **kwargs)

    monkeypatch.setattr(F, "interpolate", counted)
    pyramid(torch.rand(1, 3, 40, 72))
    assert sizes == []
    pyramid(torch.rand(1, 3, 72, 40))
    assert len(sizes) == 1  # the position embeddings of another size


@pytest.mark.parametrize("case", PYRAMIDS, ids=named)
def test_every_parameter_gets_a_gradient(case):
    torch.manual_seed(0)
    pyramid = made(case).eval()  # no stochastic depth
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter += 0.1  # residual branches that begin at zero pass no gradient on
    maps = pyramid(torch.rand(2, 3, 64, 64))
    sum((features * torch.randn_like(features)).sum() for features in maps).backward()
    assert [n for n, p in pyramid.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("name", "options"),
    [("convnext_shapes", {}), ("test_vit", {"width": 8}), ("test_vit", {"blocks": [1, 3]})],
)
def test_adapters_act_and_merge(name, options):
    torch.manual_seed(0)
    pyramid, image = create_pyramid(name, None, 32, **options).eval(), torch.rand(1, 3, 40, 32)
    before = pyramid(image)
    targets = default_targets(pyramid, FLoRA())
    report = inject(pyramid, FLoRA(rank=2, targets=targets), train=["neck"])
    assert all(row.layer.startswith("backbone.") for row in report.rows)
    with torch.no_grad():
        for parameter in pyramid.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    adapted = pyramid(image)
    for old, new in zip(before, adapted, strict=True):
        assert not torch.allclose(old, new, atol=1e-3)
    merge(pyramid)
    for merged, new in zip(pyramid(image), adapted, strict=True):
        torch.testing.assert_close(merged, new, atol=1e-4, rtol=1e-4)


def test_the_neck_is_never_adapted():
    report = inject(create_pyramid("test_vit", None, width=8), FLoRA(rank=1, targets="all"))
    assert not any("neck" in row.layer for row in report.rows)


@pytest.mark.parametrize(
    "name", ["test_vit", "convnext_atto", "resnet18", "vit_small_patch16_dinov3"]
)
@pytest.mark.parametrize("coarse", [False, True])
def test_layers_are_grouped_as_in_the_backbone(name, coarse):
    with torch.device("meta"):
        pyramid = Pyramid(timm.create_model(name))
    own = timm.models.group_parameters(pyramid, pyramid.group_matcher(coarse), reverse=True)
    backbone = pyramid.backbone
    theirs = timm.models.group_parameters(backbone, backbone.group_matcher(coarse), reverse=True)
    assert {n: layer for n, layer in own.items() if n.startswith("backbone.")} == {
        f"backbone.{n}": layer for n, layer in theirs.items()
    }
    assert {layer for n, layer in own.items() if n.startswith("neck.")} <= {
        max(theirs.values()) + 1
    }


def test_alternatives_in_a_pattern_stay_inside():
    pattern = Pyramid._reroot(create_pyramid("test_vit", None), r"^norm|^head\.(\d+)")
    found = [re.match(pattern, n) for n in ("backbone.norm", "backbone.head.3", "norm", "head.3")]
    assert [bool(hit) for hit in found] == [True, True, False, False]
    assert found[1].groups() == ("3",)


def test_questions_that_timm_answers():
    pyramid = create_pyramid("vit_tiny_patch16_224", None, 32)
    assert normalization(pyramid)[0] == (0.5, 0.5, 0.5)
    assert pyramid.no_weight_decay() >= {"backbone.pos_embed", "backbone.cls_token"}
    assert create_pyramid("resnet18", None).no_weight_decay() == set()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("convnext_tny", {}, "did you mean 'convnext_tiny'"),
        ("vit_small_patch14_dinov2", {}, "patches of 14 px.*name blocks"),
        ("test_vit", {"blocks": [3, 6]}, r"from 0 to 5 in test_vit, not \[3, 6\]"),
        ("test_vit", {"blocks": [3, 1]}, r"rising order .* not \[3, 1\]"),
        ("test_vit", {"blocks": []}, "blocks must be"),
        ("convnext_atto", {"blocks": [0]}, "convnext_atto has stages"),
        ("volo_d1_224", {}, r"volo_d1_224 is no pyramid: .* \[8, 16, 16, 16\]"),
        ("test_vit", {"weights": "embedded"}, "belong to convnext_shapes"),
        ("test_vit", {"img_size": 0}, "img_size 0 is not a multiple"),
        ("hiera_tiny_224", {"img_size": 128}, "takes images of its own size only"),
        ("convnext_atto", {"img_size": (64, 0)}, "too small"),
    ],
)
def test_mistakes(name, options, said):
    with pytest.raises(ValueError, match=said):
        create_pyramid(name, **{"weights": None, **options})


def test_mistakes_are_told_before_weights_are_read():
    with pytest.raises(ValueError, match="name blocks"):
        create_pyramid("vit_small_patch14_dinov2", "missing.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        create_pyramid("test_vit", "missing.safetensors")


def test_a_net_without_maps():
    net = timm.create_model("test_convnext")
    net.feature_info = None
    with pytest.raises(ValueError, match="test_convnext gives no feature maps"):
        Pyramid(net)


def test_real_weights_load_without_their_head(shared_data):
    path = shared_data / "weights" / "vit_tiny_patch16_224.safetensors"
    pyramid = create_pyramid("vit_tiny_patch16_224", str(path), (360, 480)).eval()
    assert pyramid.backbone.pos_embed.shape[1] == 24 * 30 + 1
    assert not any("head" in name for name, _ in pyramid.named_parameters())
