import pytest
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet

from litflora.adapters import FLoRA, inject, merge
from litflora.backbones import create_pyramid, default_targets, normalization
from litflora.datamodules.transforms import MEAN_COLOR, whole
from litflora.heads import classifier_names
from litflora.heads.detection import DetectionNet
from litflora.heads.detectors import DETECTORS, finest_stride
from litflora.optim import build_optimizer, default_optimizer

KINDS = {
    "faster_rcnn": FasterRCNN,
    "mask_rcnn": MaskRCNN,
    "retinanet": RetinaNet,
    "fcos": FCOS,
}
BACKBONES = ("convnext_shapes", "test_vit")
# So few that the classes' scores of a fresh head pass.
EAGER = {
    "faster_rcnn": {"box_score_thresh": 0.0, "box_detections_per_img": 5},
    "mask_rcnn": {"box_score_thresh": 0.0, "box_detections_per_img": 5},
    "retinanet": {"score_thresh": 0.0, "detections_per_img": 5},
    "fcos": {"score_thresh": 0.0, "detections_per_img": 5},
}


def made(name, backbone="convnext_shapes", size=(64, 64), classes=3, **settings):
    torch.manual_seed(0)
    width = 64 if name == "fcos" else 32
    pyramid = create_pyramid(backbone, None, size, None, width, finest_stride(name))
    return DetectionNet(name, pyramid, classes, width, size, **settings)


def scene(size=64):
    """Two images: one of two objects, one of none."""
    masks = torch.zeros(2, size, size, dtype=torch.uint8)
    masks[0, 4:30, 8:40] = 1
    masks[1, 40:60, 30:60] = 1
    full = {
        "boxes": torch.tensor([[8.0, 4, 40, 30], [30, 40, 60, 60]]),
        "labels": torch.tensor([0, 2]),
        "masks": masks,
    }
    empty = {key: value[:0] for key, value in full.items()}
    return [torch.randn(3, size, size), torch.randn(3, size, size)], [full, empty]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", DETECTORS)
def test_every_parameter_gets_a_gradient_and_an_empty_image_is_one(name, backbone):
    net = made(name, backbone, anchor_scale=None if name == "fcos" else 2.0)
    assert type(net.detector) is KINDS[name]
    with torch.no_grad():
        for parameter in net.detector.backbone.parameters():
            parameter += 0.02  # residual branches that begin at zero pass no gradient on
    losses = net(*scene())
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("name", DETECTORS)
def test_what_is_found_lies_in_the_image_and_is_numbered_as_the_targets_are(name):
    classes = 3
    net = made(name, classes=classes, options=EAGER[name]).eval()
    sizes = [(50, 90), (130, 64)]
    with torch.no_grad():
        found = net([torch.randn(3, *size) for size in sizes])
    seen = set()
    for image, (height, width) in zip(found, sizes, strict=True):
        assert len(image["boxes"]) == len(image["labels"]) == len(image["scores"]) == 5
        assert image["boxes"].min() >= 0
        assert (image["boxes"].max(0).values <= torch.tensor([width, height] * 2)).all()
        assert (image["scores"].diff() <= 0).all()
        seen |= set(image["labels"].tolist())
        if name == "mask_rcnn":
            assert image["masks"].shape == (5, height, width)
            assert image["masks"].dtype == torch.bool
    assert seen <= set(range(classes))


@pytest.mark.parametrize("name", DETECTORS)
def test_a_label_is_found_under_the_number_it_was_taught_by(name):
    net, (images, targets) = made(name, options=EAGER[name]), scene()
    roi_heads, heads = getattr(net.detector, "roi_heads", None), getattr(net.detector, "head", None)
    last = heads.classification_head.cls_logits if heads else roi_heads.box_predictor.cls_score
    loss_name = "classification" if heads else "loss_classifier"
    outputs = 3 + net.first_label
    for label in range(3):
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(-3).view(-1, outputs)[:, net.first_label + label] = 3
            taught = [{**t, "labels": torch.full_like(t["labels"], label)} for t in targets]
            other = [{**t, "labels": (t["labels"] + 1) % 3} for t in taught]
            net.train()
            torch.manual_seed(0)
            right = net(images, taught)[loss_name]
            torch.manual_seed(0)
            assert right < net(images, other)[loss_name]
            assert (net.eval()(images)[0]["labels"] == label).all()


def test_anchors_follow_the_strides():
    def sides(name, scale=None):
        generator = getattr(made(name, anchor_scale=scale).detector, "anchor_generator", None)
        generator = generator or made(name, anchor_scale=scale).detector.rpn.anchor_generator
        return [level[0] for level in generator.sizes]

    # Lin et al. 2017 (FPN), table 1; Lin et al. 2017 (RetinaNet), section 4; FCOS has points.
    assert sides("faster_rcnn") == [32, 64, 128, 256, 512]
    assert sides("retinanet") == [32, 64, 128, 256, 512]
    assert sides("fcos") == [8, 16, 32, 64, 128]
    assert sides("faster_rcnn", 4) == [16, 32, 64, 128, 256]


def test_maps_have_the_strides_they_say():
    for name, backbone in [("faster_rcnn", "convnext_shapes"), ("retinanet", "test_vit")]:
        maps = made(name, backbone).detector.backbone
        sides = [features.shape[-1] for features in maps(torch.randn(1, 3, 128, 128)).values()]
        assert sides == [128 // stride for stride in maps.strides]


def test_images_of_an_evaluation_are_resized_and_those_of_a_training_are_not():
    net = made("faster_rcnn", size=(64, 96))
    image = torch.randn(3, 32, 40)
    for training, expected in ((True, (32, 40)), (False, (64, 80))):
        net.train(training)
        images, _ = net.detector.transform([image])
        assert images.image_sizes == [expected]
    padded = net.detector.transform([image])[0].tensors
    assert (padded[..., 80:] == 0).all(), "the mean colour"


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize(("height", "width"), [(1, 300), (400, 3), (1, 1)])
def test_strips_are_searched_too(name, height, width):
    net = made(name, options=EAGER[name]).eval()
    with torch.no_grad():
        (found,) = net([torch.randn(3, height, width)])
    assert len(found["boxes"]) > 0
    corners = torch.tensor([width, height, width, height])
    assert (found["boxes"] >= 0).all()
    assert (found["boxes"] <= corners + 1e-3).all()
    if name == "mask_rcnn":
        assert found["masks"].shape[1:] == (height, width)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_image_is_judged_alone(backbone):
    """Neither its neighbours in the batch nor their sizes change what is found."""
    net = made("mask_rcnn", backbone, options=EAGER["mask_rcnn"]).eval()
    images = [torch.randn(3, 64, 32), torch.randn(3, 40, 90), torch.randn(3, 64, 64)]
    with torch.no_grad():
        together, (alone,) = net(images), net(images[:1])
    torch.testing.assert_close(together[0]["boxes"], alone["boxes"], atol=1e-3, rtol=1e-3)


def test_images_are_judged_as_they_are_trained_on():
    """Resized and padded by the datamodules or by the net, an image gives the same maps."""
    size = (64, 96)
    photo = torch.randint(0, 256, (3, 150, 130), dtype=torch.uint8)
    sample = (
        tv_tensors.Image(photo),
        {
            "boxes": tv_tensors.BoundingBoxes(
                torch.zeros(0, 4), format="XYXY", canvas_size=(150, 130)
            ),
            "labels": torch.zeros(0).long(),
        },
    )
    trained_on, _ = whole(size)(sample)
    net = made("faster_rcnn", size=size).eval()
    mean = torch.tensor(MEAN_COLOR).view(3, 1, 1)
    judged = net.detector.transform([photo - mean.float()])[0].tensors[0]
    assert judged.shape[-2:] == trained_on.shape[-2:] == size
    assert (judged + mean - trained_on).abs().max() < 1


@pytest.mark.parametrize("backbone", BACKBONES)
def test_only_the_backbone_is_adapted_and_all_else_trains(backbone):
    net = made("mask_rcnn", backbone)
    heads = classifier_names(net)
    inside = "detector.backbone.pyramid.backbone."
    assert all(not name.startswith(inside) for name in heads)
    tuning = FLoRA(rank=2)
    tuning.targets = default_targets(net, tuning)
    inject(net, tuning, train=heads)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert all((".adapters." in name) == name.startswith(inside) for name in trained)
    outside = {name for name, _ in net.named_parameters() if not name.startswith(inside)}
    assert outside <= trained
    assert len(normalization(net)[0]) == 3


def test_layers_decay_from_the_heads_down():
    net = made("mask_rcnn")
    optimizer = build_optimizer(
        default_optimizer("Full", False), net, classifier_names(net), None, 0.5
    )
    rates = {}
    names = {id(p): name for name, p in net.named_parameters()}
    for group in optimizer.param_groups:
        rates |= {names[id(p)]: group["lr"] for p in group["params"]}
    inside = "detector.backbone.pyramid.backbone."
    top = max(rates.values())
    assert rates["detector.roi_heads.box_head.fc6.weight"] == top
    assert (
        rates[inside + "stem.0.weight"] < rates[inside + "stages.3.blocks.0.conv_dw.weight"] < top
    )


@pytest.mark.parametrize("name", DETECTORS)
def test_a_merged_detector_finds_what_the_adapted_one_does(name):
    net = made(name, options=EAGER[name])
    inject(net, FLoRA(rank=2, targets="all"), train=classifier_names(net))
    with torch.no_grad():
        for parameter in (p for n, p in net.named_parameters() if ".adapters." in n):
            parameter.normal_(std=0.1)
    net = net.double().eval()
    images = [torch.randn(3, 70, 64, dtype=torch.double)]
    with torch.no_grad():
        adapted = net(images)[0]
        merge(net, unload=True)
        merged = net(images)[0]
    assert not any(".adapters." in key for key in net.state_dict())
    for key, value in adapted.items():
        torch.testing.assert_close(merged[key], value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("yolo", {}, "no detector is called 'yolo': there are faster_rcnn, mask_rcnn"),
        ("fcos", {"box_nms_thresh": 0.5}, "fcos takes no option 'box_nms_thresh': it takes"),
        ("mask_rcnn", {"min_size": 300}, "mask_rcnn takes no option 'min_size'"),
        ("faster_rcnn", {"rpn_pre_nms_top_n_train": 1.5}, "whole number of 1 or more, not 1.5"),
        ("faster_rcnn", {"box_detections_per_img": 0}, "whole number of 1 or more, not 0"),
        ("faster_rcnn", {"box_score_thresh": 2}, r"box_score_thresh must lie in \[0, 1\], not 2"),
        ("retinanet", {"nms_thresh": float("nan")}, r"nms_thresh must lie in \[0, 1\], not nan"),
        ("fcos", {"center_sampling_radius": 0}, "center_sampling_radius must be above 0, not 0"),
        ("retinanet", {"bg_iou_thresh": 0.6}, "bg_iou_thresh 0.6 must not be above fg_iou_thresh"),
        (
            "mask_rcnn",
            {"box_bg_iou_thresh": 0.5, "box_fg_iou_thresh": 0.4},
            "box_bg_iou_thresh 0.5 must not be above box_fg_iou_thresh 0.4",
        ),
    ],
)
def test_mistakes(name, options, message):
    pyramid = create_pyramid("convnext_shapes", None)
    with pytest.raises(ValueError, match=message):
        DetectionNet(name, pyramid, 3, 32, (64, 64), options=options)


def test_fcos_has_groups_of_channels():
    pyramid = create_pyramid("convnext_shapes", None, finest=8)
    for width in (32, 80):
        with pytest.raises(ValueError, match=f"head_width must be 64, 96, .* not {width}"):
            DetectionNet("fcos", pyramid, 3, width, (64, 64))


def test_a_plain_vit_has_no_second_pyramid():
    assert isinstance(made("mask_rcnn", "test_vit").detector.backbone.fpn, nn.Identity)
    assert len(made("fcos", "test_vit").detector.backbone.pyramid.neck.levels) == 3
