"""DetectionModule on drawn scenes: what is logged, written, saved and read again."""

import copy
import csv
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import save_file
from shell import litflora
from tiny import trainer
from torch.optim import Adam

from litflora import DetectionModule, SegmentationModule
from litflora.adapters import FLoRA, Frozen, LoRA, adapter_names, merge
from litflora.average_precision import SUMMARY, AveragePrecision
from litflora.callbacks import AdapterFolder
from litflora.datamodules import (
    CocoDataModule,
    CocoFolderDataModule,
    PennFudanDataModule,
    ShapesDetectionDataModule,
    ShapesSegmentationDataModule,
)
from litflora.heads.detectors import DETECTORS
from litflora.module import from_adapter

SIZE = 48
# Fresh heads are unsure, and few finds make fast tests.
EAGER = {
    "faster_rcnn": {"box_score_thresh": 0.0, "box_detections_per_img": 6},
    "mask_rcnn": {"box_score_thresh": 0.0, "box_detections_per_img": 6},
    "retinanet": {"score_thresh": 0.0, "detections_per_img": 6},
    "fcos": {"score_thresh": 0.0, "detections_per_img": 6},
}
INSIDE = "detector.backbone.pyramid.backbone."


def scenes(train=4, **options):
    counts = {"train_samples": train, "val_samples": 3, "test_samples": 3}
    sizes = {"img_size": SIZE, "batch_size": 2, "eval_batch_size": 2}
    return ShapesDetectionDataModule("source", **{**counts, **sizes, **options})


def module(detector="mask_rcnn", **options):
    settings = {
        "backbone": "convnext_shapes",
        "num_classes": 10,
        "weights": "embedded",
        "detector": detector,
        "head_width": 64 if detector == "fcos" else 32,
        "anchor_scale": None if detector == "fcos" else 2.0,
        "detector_options": EAGER.get(detector),
        "img_size": SIZE,
    }
    return DetectionModule(**{**settings, **options})


def built(**options):
    made = module(**options)
    made.configure_model()
    return made


def trained(made):
    return {name for name, p in made.net.named_parameters() if p.requires_grad}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A Mask R-CNN after one epoch, its run's folder, its data and its Trainer."""
    folder = tmp_path_factory.mktemp("fit")
    seed_everything(0)
    tuned, data = module(tuning=FLoRA(rank=2)), scenes()
    run = trainer(folder, callbacks=[AdapterFolder()])
    run.fit(tuned, data)
    return tuned.eval(), folder, data, run


@pytest.fixture(scope="module")
def merged(fitted, tmp_path_factory):
    """What `litflora merge` made of it, and what it printed."""
    file = tmp_path_factory.mktemp("merged") / "whole.safetensors"
    made = litflora("merge", fitted[1] / "adapter", "--out", file)
    assert made.code == 0, made.err
    return file, made.out


# A run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", DETECTORS)
def test_training_lowers_the_loss(detector, tmp_path):
    def loss():
        torch.manual_seed(0)
        with torch.no_grad():
            return sum(tuned.train()(list(images), targets).values()).item()

    seed_everything(0)
    tuned, data = module(detector, head_lr=0.01), scenes(2)
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    tuned.configure_model()
    before = loss()
    run = trainer(tmp_path, max_epochs=8, limit_val_batches=0)
    run.fit(tuned, data)
    assert loss() < 0.95 * before
    logged = run.callback_metrics
    parts = [value for name, value in logged.items() if name != "train/loss"]
    assert len(parts) == {"retinanet": 2, "fcos": 3, "faster_rcnn": 4, "mask_rcnn": 5}[detector]
    torch.testing.assert_close(logged["train/loss"], sum(parts))


def decided(detector):
    """A detector whose fresh head takes objects for several classes."""
    seed_everything(0)
    tuned = built(detector=detector)
    with torch.no_grad():
        tuned.net.detector.roi_heads.box_predictor.cls_score.weight *= 50
    return tuned.eval()


def almost(found, shift):
    """A truth that is much like what was found: moved a little, and more with each object."""
    moved = {key: value for key, value in found.items() if key != "scores"}
    moved["boxes"] = found["boxes"] + shift * torch.arange(len(found["boxes"]))[:, None]
    moved["labels"] = found["labels"].clone()
    moved["iscrowd"] = torch.zeros_like(found["labels"])
    moved["area"] = torch.full(found["labels"].shape, 300.0)
    return moved


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn"])
def test_metrics_are_those_of_what_detect_finds(detector, tmp_path):
    tuned, data = decided(detector), scenes()
    kinds = ["box", "mask"] if detector == "mask_rcnn" else ["box"]
    names = {f"{kind}_{name}" for kind in kinds for name in SUMMARY}
    for split in ("val", "test"):
        data.setup("validate" if split == "val" else "test")
        judge, pairs = AveragePrecision(detector == "mask_rcnn"), []
        for image, _, _ in data.datasets[split]:
            found = tuned.eval().detect(image)
            pairs.append((image, almost(found, 0.4)))
            judge.update([found], [pairs[-1][1]])
        data.datasets[split].pairs = pairs
        expected = judge.compute()
        assert 0.05 < expected["box_map"] < 0.95
        run = trainer(tmp_path)
        (logged,) = (run.validate if split == "val" else run.test)(tuned, data, verbose=False)
        assert set(logged) == {f"{split}/{name}" for name in names}
        for name in names:
            assert logged[f"{split}/{name}"] == pytest.approx(expected[name].item(), abs=1e-6), name


def test_validation_logs_the_precisions(fitted):
    logged = fitted[3].callback_metrics
    kinds = {f"val/{kind}_{name}" for kind in ("box", "mask") for name in SUMMARY}
    assert {name for name in logged if name.startswith("val/")} == kinds
    assert fitted[0].monitor in kinds


def test_the_classes_precisions_are_in_a_table(tmp_path):
    tuned, data = decided("mask_rcnn"), scenes()
    data.setup("test")
    judge, pairs = AveragePrecision(masks=True, per_class=True), []
    for image, _, _ in data.datasets["test"]:
        found = tuned.detect(image)
        target = almost(found, 0.4)
        target["labels"][found["labels"] == 5] = 9
        pairs.append((image, target))
        judge.update([found], [target])
    data.datasets["test"].pairs = pairs
    trainer(tmp_path).test(tuned, data, verbose=False)
    values = judge.compute()
    labels, precisions = values["classes"].tolist(), values["box_map_per_class"].tolist()
    assert {-1, 0} < set(precisions)  # classes that are found and not there, and the other way
    expected = dict(zip(labels, precisions, strict=True))
    with (tmp_path / "class_ap.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == data.class_names
    told = [float(row["ap"]) for row in rows]
    assert 0.05 < np.nanmax(told) < 1
    wanted = [expected.get(label, -1) for label in range(10)]
    wanted = [value if value >= 0 else float("nan") for value in wanted]
    assert told == pytest.approx(wanted, abs=1e-6, nan_ok=True)


def test_the_gallery_shows_the_same_samples_before_and_after(fitted):
    folder = fitted[1] / "gallery"
    assert sorted(file.name for file in folder.iterdir()) == ["epoch_000.png", "epoch_001.png"]
    before, after = (
        np.asarray(Image.open(file).convert("RGB")) for file in sorted(folder.iterdir())
    )
    assert before.shape[1] == after.shape[1]
    third = before.shape[1] // 3
    assert (before[: third // 2, : third // 2] == after[: third // 2, : third // 2]).mean() > 0.99


def test_a_step_in_mixed_precision(tmp_path):
    seed_everything(0)
    tuned, data = module(tuning=FLoRA(rank=2)), scenes(2)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0, precision="bf16-mixed")
    run.fit(tuned, data)
    assert run.callback_metrics["train/loss"].isfinite()


# What is tuned -----------------------------------------------------------------------------------


def test_neck_and_head_train_and_the_backbone_is_adapted(fitted):
    net = fitted[0].net
    names = trained(fitted[0])
    inner = {name for name in names if name.startswith(INSIDE)}
    outer = {name for name, _ in net.named_parameters() if not name.startswith(INSIDE)}
    assert names - inner == outer
    assert all(".adapters." in name for name in inner)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize(
    ("backbone", "kinds"),
    [
        ("convnext_shapes", {"depthwise", "downsampling", "linear"}),
        ("convnext_atto", {"depthwise", "downsampling", "1x1"}),
    ],
)
def test_every_kind_of_layer_is_adapted_and_trains(task, backbone, kinds, tmp_path):
    seed_everything(0)
    weights = "embedded" if backbone == "convnext_shapes" else None
    settings = {"backbone": backbone, "weights": weights, "tuning": FLoRA(rank=2)}
    settings |= {"optimizer": partial(Adam, lr=0.01), "lr_scheduler": None}
    if task == "detection":
        tuned, data = module("faster_rcnn", **settings), scenes(2)
    else:
        tuned = SegmentationModule(num_classes=11, head="linear", img_size=SIZE, **settings)
        data = ShapesSegmentationDataModule(train_samples=2, img_size=SIZE, batch_size=2)
    tuned.configure_model()
    layers = {name: net for name, net in tuned.net.named_modules() if hasattr(net, "adapters")}
    assert kinds == {kind_of(layer) for layer in layers.values()}
    start = {name: value.clone() for name, value in tuned.net.named_parameters()}
    trainer(tmp_path, max_epochs=3, limit_val_batches=0).fit(tuned, data)
    for name, value in tuned.net.named_parameters():
        adapted = name.partition(".adapters.")[0] in layers and ".adapters." in name
        assert torch.equal(value, start[name]) != value.requires_grad, name
        assert value.requires_grad or not adapted, name


def kind_of(layer):
    if not isinstance(layer, torch.nn.Conv2d):
        return "linear"
    if layer.groups > 1:
        return "depthwise"
    return "1x1" if layer.kernel_size == (1, 1) else "downsampling"


@pytest.mark.parametrize(
    ("detector", "backbone", "neck"),
    [
        ("mask_rcnn", "convnext_shapes", ["fpn"]),
        ("fcos", "convnext_shapes", ["fpn", "coarser"]),
        ("faster_rcnn", "test_vit", ["pyramid.neck"]),
        ("retinanet", "test_vit", ["pyramid.neck", "coarser"]),
    ],
)
def test_parts_are_all_that_has_parameters(detector, backbone, neck):
    with pytest.warns(UserWarning, match="weights is null"):
        net = built(detector=detector, backbone=backbone, weights=None).net
    parts = net.parts()
    assert parts["neck"] == [f"detector.backbone.{name}" for name in neck]
    named = [name for names in parts.values() for name in names]
    counted = [id(p) for name in named for p in net.get_submodule(name).parameters()]
    assert sorted(counted) == sorted(map(id, net.parameters()))


# Saved and read again ----------------------------------------------------------------------------

ELSEWHERE = """
import sys, torch
from litflora import from_adapter
tuned = from_adapter(sys.argv[1])
tuned.configure_model()
torch.set_num_threads(1)
image = torch.load(sys.argv[2])
torch.save((tuned.class_names, tuned.eval().detect(image)), sys.argv[3])
"""


def test_another_process_finds_the_same_bit_for_bit(fitted, tmp_path):
    tuned, folder, data, _ = fitted
    image = data.datasets["val"][0][0]
    torch.save(image, tmp_path / "image.pt")
    paths = folder / "adapter", tmp_path / "image.pt", tmp_path / "found.pt"
    subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, paths)], check=True)
    names, found = torch.load(tmp_path / "found.pt")
    assert names == data.class_names
    assert len(found["boxes"]) == 6
    assert same(found, tuned.detect(image))


def test_merged_weights_fit_a_plain_detector(fitted, merged):
    tuned, _, data, _ = fitted
    code = [line.strip() for line in merged[1].splitlines() if line.startswith("    ")]
    space: dict = {}
    exec(code[0], space)
    expression = code[1].partition(".load_state_dict")[0]
    net = eval(expression, space)
    exec(f"net.{code[1][len(expression) + 1 :]}", {**space, "net": net})
    assert not adapter_names(net)
    image = data.datasets["val"][0][0]
    with torch.no_grad():
        (found,) = net.eval()([tuned.normalize(image[None])[0]])
    expected = tuned.detect(image)
    torch.testing.assert_close(found["boxes"], expected["boxes"], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-5, rtol=1e-4)
    assert torch.equal(found["labels"], expected["labels"])
    assert (found["masks"] == expected["masks"]).float().mean() > 0.999


def test_a_merged_file_is_tuned_part_by_part(fitted, merged, tmp_path):
    image = fitted[2].datasets["val"][0][0]
    options = {"tuning": FLoRA(rank=1), "neck_tuning": Frozen(), "head_tuning": LoRA(rank=1)}
    tuned = built(weights=str(merged[0]), **options).eval()
    expected = fitted[0].detect(image)
    torch.testing.assert_close(tuned.detect(image)["boxes"], expected["boxes"], atol=1e-3, rtol=0)
    names = trained(tuned)
    assert all(".adapters." in name for name in names)
    assert {name.partition(".adapters.")[0] for name in names if "roi_heads.box" in name} == {
        f"detector.roi_heads.box_{name}"
        for name in ("head.fc6", "head.fc7", "predictor.cls_score", "predictor.bbox_pred")
    }
    assert not [name for name in names if "backbone.fpn" in name]
    start = copy.deepcopy(tuned.train().net.state_dict())
    seed_everything(0)
    trainer(tmp_path, limit_val_batches=0, callbacks=[AdapterFolder()]).fit(tuned, scenes(2))
    again = from_adapter(tmp_path / "adapter")
    again.configure_model()
    assert same(again.eval().detect(image), tuned.eval().detect(image))
    changed = {k for k, value in tuned.net.state_dict().items() if not torch.equal(value, start[k])}
    assert changed
    assert all(".adapters." in key for key in changed)


def test_checkpoints_hold_what_trains_and_a_run_goes_on(tmp_path):
    def run(folder, **options):
        seed_everything(0)
        made = module(tuning=FLoRA(rank=2), lr_scheduler=None)
        keep = ModelCheckpoint(tmp_path / "kept", filename="{epoch}", save_top_k=-1)
        settings = {"callbacks": [keep], "enable_checkpointing": True, "limit_val_batches": 0}
        ckpt = options.pop("ckpt_path", None)
        made_by = trainer(tmp_path / folder, **{**settings, **options})
        made_by.fit(made, scenes(), ckpt_path=ckpt, weights_only=True)
        return made

    whole = run("whole", max_epochs=2)
    first = tmp_path / "kept" / "epoch=0.ckpt"
    state = torch.load(first, weights_only=True)["state_dict"]
    assert {key.removeprefix("net.") for key in state if key.startswith("net.")} >= trained(whole)
    assert f"net.{INSIDE}stem.0.weight" not in state
    resumed = run("resumed", max_epochs=2, ckpt_path=first)
    for name in trained(whole):
        assert torch.equal(resumed.net.get_parameter(name), whole.net.get_parameter(name)), name


# Prediction --------------------------------------------------------------------------------------


def coco_folder(root, **options):
    """Drawn scenes as a COCO folder: category ids have gaps, image ids are odd."""
    data = scenes(3)
    data.setup("fit")
    images, rows = [], []
    root.mkdir(parents=True, exist_ok=True)
    for number, (image, target, _) in enumerate(data.datasets["train"]):
        name = f"photo {number}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / name)
        images.append({"id": 901 - 7 * number, "file_name": name, "width": SIZE, "height": SIZE})
        for (x0, y0, x1, y1), label in zip(target["boxes"].tolist(), target["labels"], strict=True):
            ring = [[x0, y0, x1, y0, x1, y1, x0, y1]]
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": images[-1]["id"],
                    "category_id": 3 + 4 * int(label),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": ring,
                }
            )
    categories = [{"id": 3 + 4 * n, "name": name} for n, name in enumerate(data.class_names)]
    content = {"images": images, "annotations": rows, "categories": categories[::-1]}
    (root / "all.json").write_text(json.dumps(content))
    listings = {"train_json": "all.json", "val_json": "all.json"}
    return CocoFolderDataModule(str(root), crop_size=SIZE, batch_size=2, **listings, **options)


def test_predictions_have_the_ids_of_the_data(fitted, tmp_path):
    tuned = from_adapter(fitted[1] / "adapter")
    data = coco_folder(tmp_path / "data", masks=True)
    assert data.class_names == tuned.class_names
    trainer(tmp_path / "run").predict(tuned, data, return_predictions=False)
    written = json.loads((tmp_path / "run" / "predictions.json").read_text())
    tuned.eval()
    expected = []
    for number in range(3):
        pixels = np.asarray(Image.open(tmp_path / "data" / f"photo {number}.png"))
        found = tuned.detect(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        for box, label in zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True):
            expected.append((901 - 7 * number, 3 + 4 * label, box[0]))
    told = [(row["image_id"], row["category_id"], row["bbox"][0]) for row in written]
    assert [row[:2] for row in told] == [row[:2] for row in expected]
    assert [row[2] for row in told] == pytest.approx([row[2] for row in expected], abs=1e-3)
    assert all(row["segmentation"]["size"] == [SIZE, SIZE] for row in written)
    pictures = sorted(path.name for path in (tmp_path / "run" / "predictions").iterdir())
    assert pictures == [f"photo {number}.png.png" for number in range(3)]


def odd_files(folder):
    """Photos of 60 x 40 pixels as cameras and editors leave them."""
    folder.mkdir()
    gray = Image.fromarray(np.arange(2400, dtype=np.uint8).reshape(40, 60))
    color = Image.merge("RGB", (gray, gray.rotate(180), gray))
    gray.save(folder / "gray.png")
    gray.convert("1").save(folder / "bits.png")
    color.convert("CMYK").save(folder / "cmyk.jpg")
    color.convert("P").save(folder / "palette.png")
    color.convert("RGBA").save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    color.save(folder / "turned.jpg", exif=exif)
    return ["gray.png", "bits.png", "cmyk.jpg", "palette.png", "alpha.png", "turned.jpg"]


def test_odd_files_are_predicted_as_a_viewer_shows_them(fitted, tmp_path):
    names = odd_files(tmp_path / "odd")
    data = CocoFolderDataModule("gone", "gone.json", predict_root=str(tmp_path / "odd"))
    tuned = from_adapter(fitted[1] / "adapter")
    trainer(tmp_path / "run").predict(tuned, data, return_predictions=False)
    written = json.loads((tmp_path / "run" / "predictions.json").read_text())
    shapes = {row["image_id"]: row["segmentation"]["size"] for row in written}
    order = sorted(names)
    assert shapes == {
        number: [60, 40] if name == "turned.jpg" else [40, 60]
        for number, name in enumerate(order, 1)
    }
    pictures = sorted(path.name for path in (tmp_path / "run" / "predictions").iterdir())
    assert pictures == sorted(f"{name}.png" for name in names)


def test_sixteen_bits_are_refused_by_name(fitted, tmp_path):
    (tmp_path / "deep").mkdir()
    deep = np.arange(2400, dtype=np.uint16).reshape(40, 60) * 20
    Image.fromarray(deep).save(tmp_path / "deep" / "deep.png")
    said = litflora(
        *("predict", "--adapter", fitted[1] / "adapter"),
        *("--data", "CocoFolderDataModule", "--data.init_args.root", "gone"),
        *("--data.init_args.train_json", "gone.json"),
        *("--data.init_args.predict_root", tmp_path / "deep"),
        *("--trainer.accelerator", "cpu", "--trainer.default_root_dir", tmp_path / "runs"),
    )
    assert said.code == 2
    assert "deep.png has mode I;16; convert it to 8 bits a channel" in said.err


# Other data --------------------------------------------------------------------------------------


def pedestrians(root):
    """Photos as Penn-Fudan has them: of two people, and one to train on of nobody."""
    noise = np.random.default_rng(0)
    for kind in ("PNGImages", "PedMasks"):
        (root / kind).mkdir(parents=True)
    for number in range(4):
        ids = np.zeros((50, 60), np.uint8)
        if number:
            ids[5:35, 5:20], ids[20:45, 30:50] = 1, 2
        pixels = noise.integers(0, 100, (50, 60, 3), dtype=np.uint8) + 120 * (ids[..., None] > 0)
        Image.fromarray(pixels.astype(np.uint8)).save(root / "PNGImages" / f"{number}.png")
        Image.fromarray(ids).save(root / "PedMasks" / f"{number}_mask.png")
    return PennFudanDataModule(str(root), masks=True, crop_size=SIZE, batch_size=2, seed=2)


@pytest.mark.parametrize("detector", DETECTORS)
def test_one_class_is_enough(detector, tmp_path):
    seed_everything(0)
    tuned, data = module(detector, num_classes=1), pedestrians(tmp_path / "data")
    run = trainer(tmp_path / "run", num_sanity_val_steps=0)
    run.fit(tuned, data)
    assert tuned.class_names == ["pedestrian"]
    (tested,) = run.test(tuned, data, verbose=False)
    assert tested["test/box_map"] >= 0
    assert "test/box_map_per_class" not in tested
    with (tmp_path / "run" / "class_ap.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["ap"]) == pytest.approx(tested["test/box_map"], abs=1e-6)
    run.predict(tuned, data, return_predictions=False)
    written = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert {item["category_id"] for item in written} == {1}


REAL = {
    "vit": ("vit_tiny_patch16_224", "vit_tiny_patch16_224"),
    "convnext": ("convnext_atto", "convnext_atto_cifar10"),
}


@pytest.mark.parametrize("backbone", REAL)
@pytest.mark.parametrize("name", ["coco", "PennFudanPed"])
def test_real_photos_train_are_judged_and_predicted(name, backbone, shared_data, tmp_path):
    weights = shared_data / "weights" / f"{REAL[backbone][1]}.safetensors"
    for path in (shared_data / name, weights):
        if not path.exists():
            pytest.skip(f"{path} is missing")
    kind = CocoDataModule if name == "coco" else PennFudanDataModule
    data = kind(str(shared_data / name), masks=True, crop_size=96, batch_size=2)
    seed_everything(0)
    tuned = module(
        backbone=REAL[backbone][0],
        num_classes=data.num_classes,
        weights=str(weights),
        anchor_scale=4.0,
        img_size=96,
    )
    limits = {"limit_train_batches": 2, "limit_val_batches": 1, "limit_predict_batches": 1}
    run = trainer(tmp_path, num_sanity_val_steps=0, **limits)
    run.fit(tuned, data)
    assert run.global_step == 2
    assert run.callback_metrics["train/loss"].isfinite()
    assert {"val/box_map50", "val/mask_map50"} <= set(run.callback_metrics)
    run.predict(tuned, data, return_predictions=False)
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert {row["category_id"] for row in written} <= set(data.category_ids)
    assert {row["image_id"] for row in written} <= set(data.image_ids.values())


# The command line --------------------------------------------------------------------------------

SMALL = {
    "data": "ShapesDetectionDataModule",
    "data.init_args.train_samples": 2,
    "data.init_args.val_samples": 2,
    "data.init_args.test_samples": 2,
    "data.init_args.img_size": SIZE,
    "data.init_args.batch_size": 2,
}
RUN = {"trainer.max_epochs": 1, "trainer.accelerator": "cpu"}
RUN["trainer.enable_progress_bar"] = "false"


def options_of(given):
    return [str(each) for key, value in given.items() for each in (f"--{key}", value)]


def command(name, folder, **model):
    settings = {
        "backbone": "convnext_shapes",
        "weights": "embedded",
        "detector": "mask_rcnn",
        "head_width": 32,
        "img_size": SIZE,
        **model,
    }
    named = {"model": "litflora.detection.DetectionModule"}
    named |= {f"model.init_args.{key}": value for key, value in settings.items()}
    runs = {"trainer.default_root_dir": folder}
    return litflora(name, *options_of({**named, **SMALL, **RUN, **runs}))


def test_a_run_by_the_command_line(tmp_path):
    eager = '{"box_score_thresh": 0.0, "box_detections_per_img": 5}'
    fit = command("fit", tmp_path, detector_options=eager)
    assert fit.code == 0, fit.err
    adapter = next(tmp_path.glob("**/adapter"))
    again = ["--adapter", adapter, *options_of({**RUN, "trainer.default_root_dir": tmp_path})]
    tested = litflora("test", *again)
    assert tested.code == 0, tested.err
    assert "test/mask_map50" in tested.out
    assert "class     AP" in tested.out
    predicted = litflora("predict", *again)
    assert predicted.code == 0, predicted.err
    (path,) = tmp_path.glob("**/predictions.json")
    assert len(json.loads(path.read_text())) == 2 * 5
    assert f"10 predicted objects are in {path}" in predicted.out


# Mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"detector": "yolo"}, "no detector is called 'yolo': there are faster_rcnn, mask_rcnn"),
        ({"detector_options": {"nms": 1}}, "mask_rcnn takes no option 'nms': it takes rpn_"),
        ({"detector": "fcos", "head_width": 48}, "head_width must be 64, 96, .* not 48"),
        ({"head_width": 0}, "head_width must be at least 1, not 0"),
        ({"anchor_scale": 0.0}, "anchor_scale must be above 0, not 0"),
        ({"anchor_scale": -2.0}, "anchor_scale must be above 0, not -2"),
        ({"anchor_scale": float("nan")}, "anchor_scale must be above 0, not nan"),
        ({"img_size": 0}, r"img_size \(0, 0\) is too small for convnext_shapes: at least 32"),
        ({"img_size": [-32, 64]}, r"img_size \(-32, 64\) is too small"),
        ({"backbone": "test_vit", "img_size": 0}, "img_size 0 is not a multiple of the patch"),
        ({"backbone": "test_vit", "weights": None, "img_size": 16}, "must be at least 32, not 16"),
        ({"img_size": [32, 32, 3]}, r"img_size must be .*, not \[32, 32, 3\]"),
        ({"img_size": []}, r"img_size must be .*, not \[\]"),
        ({"num_classes": 0}, "detection needs at least 1 class, not 0"),
        ({"class_names": ["one"]}, "class_names has 1 entries, and there are 10 classes"),
        ({"backbone": "convnext_shape"}, "no timm model is called 'convnext_shape'"),
        ({"backbone": "volo_d1_224"}, "volo_d1_224 is no pyramid: its maps have strides"),
        ({"backbone": "vit_small_patch14_dinov2"}, "has patches of 14 px"),
        ({"drop_path": 1.0}, r"drop_path must lie in \[0, 1\), not 1.0"),
        ({"head_tuning": LoRA()}, "head_tuning LoRA keeps the head's base, which is random"),
    ],
)
def test_mistakes(options, said):
    with pytest.raises(ValueError, match=said):
        built(**{"weights": None, **options})


def test_data_without_masks_teach_no_masks(tmp_path):
    data = pedestrians(tmp_path / "data")
    data.masks = False
    for use in ("fit", "validate", "test"):
        tuned = module(num_classes=1)
        with pytest.raises(ValueError, match=r"set data\.init_args\.masks true"):
            getattr(trainer(tmp_path), use)(tuned, data)
        assert tuned.net is None
    trainer(tmp_path).predict(module(num_classes=1), data, return_predictions=False)


def test_images_are_trained_on_and_judged_at_one_size(tmp_path):
    with pytest.raises(ValueError, match=r"48 x 48 pixels .*made to fit 64 x 64 .*both the same"):
        trainer(tmp_path).fit(module(img_size=64), scenes(img_size=48))


def test_training_needs_targets():
    with pytest.raises(ValueError, match=r"needs targets: call eval\(\) to detect"):
        built().train().detect(torch.zeros(3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("detector", ["retinanet", "fcos"])
def test_heads_of_convolutions_alone_are_adapted(detector, tmp_path):
    made = built(detector=detector)
    path = tmp_path / "whole.safetensors"
    merge(made.net, unload=True)
    save_file(made.net.state_dict(), path)
    lora = {"neck_tuning": LoRA(rank=1), "head_tuning": LoRA(rank=1)}
    names = trained(built(detector=detector, weights=str(path), **lora))
    assert any("coarser.p6.adapters" in name for name in names)
    assert any("classification_head" in name and ".adapters." in name for name in names)


def test_a_precision_that_boxes_cannot_have(tmp_path):
    with pytest.raises(ValueError, match="precision bf16-true is too coarse for boxes: use bf16-"):
        trainer(tmp_path, precision="bf16-true").fit(module(), scenes())


def test_an_adapter_of_other_classes(fitted):
    folder = str(fitted[1] / "adapter")
    with pytest.raises(ValueError, match=r"knows 10 classes .*, and the data has 4 classes"):
        module(num_classes=4, adapter=folder)


def test_a_merged_file_of_other_classes(merged):
    with pytest.raises(ValueError, match=r"does not fit this net: it differs at .*cls_score"):
        built(num_classes=4, weights=str(merged[0]))


def test_mistakes_are_told_by_the_command_line(tmp_path):
    said = command("fit", tmp_path, detector="yolo")
    assert said.code == 2
    assert said.err.startswith("error: no detector is called 'yolo'")
    assert not list(tmp_path.iterdir())
