import sys

import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch import Segformer, Unet
from segmentation_models_pytorch.base.initialization import initialize_decoder
from torch import nn

from litflora.adapters import FLoRA, inject, merge, trainable_parameters
from litflora.backbones import create_pyramid, default_targets, normalization
from litflora.heads import classifier_names
from litflora.heads.segmentation import HEADS, LinearHead, SegmentationNet, create_head
from litflora.optim import build_optimizer, default_optimizer

CLASSES = 3
# A small width for each; fpn normalises its half in 32 groups, unet halves it four times.
WIDTH = {"fpn": 64, "unet": 64, "dpt": 32}
PYRAMIDS = {
    "stages": ("convnext_shapes", {}),
    "resnet": ("resnet10t", {}),
    "neck": ("test_vit", {"width": 16}),
    "blocks": ("test_vit", {"blocks": [0, 1, 3, 5]}),
    "patch14": ("vit_small_patch14_dinov2", {"blocks": [0, 1, 2, 3], "img_size": 70}),
}
REFUSED = {
    ("fpn", "blocks"): "each at twice the stride before",
    ("fpn", "patch14"): "each at twice the stride before",
    ("unet", "patch14"): "cannot from 14 px",
    ("deeplabv3plus", "blocks"): "4 times the first or more",
    ("deeplabv3plus", "patch14"): "4 times the first or more",
    ("deeplabv3plus", "neck"): "would train nothing",
}
TAKEN = [(head, p) for head in HEADS for p in PYRAMIDS if (head, p) not in REFUSED]


def made(head, pyramid="stages", width=None):
    torch.manual_seed(0)
    name, settings = PYRAMIDS[pyramid]
    below = create_pyramid(name, None, **settings)
    width = width or WIDTH.get(head, 16)
    return SegmentationNet(below, create_head(head, below.channels, below.strides, 3, width))


@pytest.mark.parametrize(("head", "pyramid"), TAKEN)
def test_every_pixel_gets_logits_and_every_parameter_a_gradient(head, pyramid):
    net = made(head, pyramid)
    with torch.no_grad():
        for parameter in net.pyramid.parameters():
            parameter += 0.05  # residual branches that begin at zero pass no gradient on
    logits = net(torch.randn(2, 3, 65, 97))
    assert logits.shape == (2, CLASSES, 65, 97)
    (logits * torch.randn_like(logits)).sum().backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize(("head", "pyramid"), REFUSED)
def test_strides_that_a_head_cannot_take(head, pyramid):
    with pytest.raises(ValueError, match=REFUSED[head, pyramid]):
        made(head, pyramid)


@pytest.mark.parametrize(("head", "pyramid"), TAKEN)
def test_what_is_padded_is_cropped_at_the_right_and_below(head, pyramid):
    """Zeros that the pyramid adds are the same as zeros in the image, of which all is asked."""
    net, image = made(head, pyramid).eval(), torch.randn(1, 3, 50, 37)
    divisor = net.pyramid.divisor
    padded = F.pad(image, (0, -37 % divisor, 0, -50 % divisor))
    with torch.no_grad():
        torch.testing.assert_close(net(image), net(padded)[..., :50, :37])


@pytest.mark.parametrize("head", HEADS)
def test_logits_lie_where_their_pixels_are(head):
    """What changes with a patch of the image is strongest at that patch."""
    net = made(head, "stages").eval()
    image = torch.randn(1, 3, 128, 128)
    image.requires_grad_()
    net(image)[0, :, 96:104, 32:40].sum().backward()
    strength = F.avg_pool2d(image.grad.abs().sum(1), 16)[0]
    row, column = divmod(int(strength.argmax()), 8)
    assert (row, column) == (6, 2)


def test_linear_is_linear_on_concatenated_maps():
    head = LinearHead((3, 5), (4, 8), CLASSES).eval()
    for norm in head.norms:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.bias)
    maps = [torch.randn(2, 3, 8, 12), torch.randn(2, 5, 4, 6)]
    resized = F.interpolate(maps[1], scale_factor=2, mode="bilinear")
    both = torch.cat([head.norms[0](maps[0]), head.norms[1](resized)], 1)
    weight = torch.cat([layer.weight for layer in head.layers], 1)[:, :, 0, 0]
    bias = sum(layer.bias for layer in head.layers)
    expected = torch.einsum("ki,nihw->nkhw", weight, both) + bias[:, None, None]
    torch.testing.assert_close(head(maps), expected)


@pytest.mark.parametrize(
    ("head", "cls", "options"),
    [
        ("unet", Unet, {"decoder_channels": (64, 32, 16, 8, 4)}),
        ("segformer", Segformer, {"decoder_segmentation_channels": 16}),
    ],
)
def test_the_same_network_as_the_librarys(head, cls, options):
    """The library's own model on the same ConvNeXt, which has no map at stride 2."""
    library = cls("tu-test_convnext", encoder_weights=None, classes=CLASSES, **options).eval()
    pyramid = create_pyramid("test_convnext", None)
    own = create_head(head, pyramid.channels, pyramid.strides, CLASSES, WIDTH.get(head, 16))
    net = SegmentationNet(pyramid, own).eval()
    names = net.pyramid.backbone.state_dict()
    encoder = library.encoder.model.state_dict()
    net.pyramid.backbone.load_state_dict(
        {
            name: encoder[name.replace("stages.", "stages_").replace("stem.", "stem_")]
            for name in names
        }
    )
    own.decoder.load_state_dict(library.decoder.state_dict())
    own.classifier.load_state_dict(library.segmentation_head.state_dict())
    image = torch.randn(1, 3, 64, 96)
    ours, theirs = net(image), library(image)
    if head == "segformer":  # it aligns corners where it resizes logits
        ours = F.interpolate(
            own(net.pyramid(image)), scale_factor=4, mode="bilinear", align_corners=True
        )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("head", [head for head in HEADS if head != "linear"])
def test_decoders_begin_as_the_library_begins_them(head):
    torch.manual_seed(1)
    made_head = made(head).head
    torch.manual_seed(1)
    convolution = next(m for m in made_head.decoder.modules() if isinstance(m, nn.Conv2d))
    again = nn.Conv2d(*convolution.weight.shape[1::-1], convolution.kernel_size)
    initialize_decoder(again)
    bound = again.weight.abs().max()
    assert 0.7 * bound < convolution.weight.abs().max() < 1.3 * bound


@pytest.mark.parametrize(
    ("head", "pyramid"), [("linear", "stages"), ("upernet", "neck"), ("dpt", "blocks")]
)
def test_adapters_act_and_merge(head, pyramid):
    net, image = made(head, pyramid).eval(), torch.randn(1, 3, 40, 50)
    heads = classifier_names(net)
    assert heads == (["pyramid.neck", "head"] if pyramid == "neck" else ["head"])
    report = inject(net, FLoRA(rank=2, targets=default_targets(net, FLoRA())), train=heads)
    assert all(row.layer.startswith("pyramid.backbone.") for row in report.rows)
    before = net(image)
    with torch.no_grad():
        for parameter in trainable_parameters(net)["adapters"].values():
            parameter += torch.randn_like(parameter) / 4
    adapted = net(image)
    assert not torch.allclose(before, adapted, atol=1e-3)
    merge(net)
    torch.testing.assert_close(net(image), adapted, atol=1e-3, rtol=1e-3)


def test_layer_decay_reaches_through_to_the_backbone():
    net = made("linear", "neck")
    heads = classifier_names(net)
    inject(net, FLoRA(rank=2, targets=default_targets(net, FLoRA())), train=heads)
    optimizer = build_optimizer(default_optimizer("FLoRA"), net, heads, None, layer_decay=0.5)
    rates = {group["name"]: group["lr"] / 5e-3 for group in optimizer.param_groups}
    # Six blocks below the head, of which the last is one layer below it.
    expected = {f"adapters_x{0.5**d:.3g}": 0.5**d for d in range(1, 7)}
    assert rates == pytest.approx({**expected, "head": 1.0, "head_1d": 1.0})
    names = {id(p): n for n, p in net.named_parameters()}
    (last,) = (group for group in optimizer.param_groups if group["name"] == "adapters_x0.5")
    assert all(".blocks.5." in names[id(p)] for p in last["params"])


def test_no_decay_of_position_embeddings():
    net = made("linear", "neck")
    optimizer = build_optimizer(default_optimizer("Full"), net, classifier_names(net))
    names = {id(p): n for n, p in net.named_parameters()}
    kept = {
        names[id(p)]
        for group in optimizer.param_groups
        for p in group["params"]
        if group["weight_decay"] == 0 and p.ndim > 1
    }
    assert kept == {"pyramid.backbone.pos_embed", "pyramid.backbone.cls_token"} | {
        name for name in names.values() if name.endswith("reg_token")
    }


def test_normalization_is_the_backbones():
    assert normalization(made("linear", "stages"))[0] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("head", "width", "said"),
    [
        ("unt", 64, "no segmentation head is called 'unt': there are linear, unet"),
        ("fpn", 80, "its width is a multiple of 64, not 80"),
        ("linear", 3, "the width of a head must be at least 16, not 3"),
    ],
)
def test_mistakes(head, width, said):
    with pytest.raises(ValueError, match=said):
        made(head, "stages", width)


def test_dpt_needs_four_maps():
    with pytest.raises(ValueError, match="dpt takes four maps, not 2"):
        create_head("dpt", (8, 8), (16, 16), CLASSES)


def test_no_classes():
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        create_head("linear", (8,), (16,), 0)


def test_a_missing_library_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("segmentation_models_pytorch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'litflora\[dense\]'"):
        create_head("unet", (8, 8), (4, 8), CLASSES)
    assert create_head("linear", (8, 8), (4, 8), CLASSES)  # needs none
