"""SegmentationModule on drawn scenes: what is logged, written, saved and read again."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from PIL import Image
from shell import litflora
from tiny import trainer
from torch.utils.data import DataLoader

from litflora import SegmentationModule
from litflora.adapters import FLoRA, LoRA, Probe, adapter_names
from litflora.callbacks import AdapterFolder, Gallery
from litflora.datamodules import ShapesSegmentationDataModule
from litflora.drawing.masks import coloured
from litflora.module import from_adapter
from litflora.windows import SlidingWindow, Whole

SIZE = 32


def scenes(train: int = 8, **options):
    counts = {"train_samples": train, "val_samples": 3, "test_samples": 3}
    sizes = {"img_size": SIZE, "batch_size": 4, "eval_batch_size": 2}
    return ShapesSegmentationDataModule("source", **{**counts, **sizes, **options})


def module(**options):
    data = scenes()
    settings = {"weights": "embedded", "head_width": 32, "img_size": SIZE, **options}
    return SegmentationModule("convnext_shapes", 11, data.class_names, **settings)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A module after one epoch, its run's folder and its data."""
    folder = tmp_path_factory.mktemp("fit")
    seed_everything(0)
    tuned, data = module(tuning=FLoRA(rank=2)), scenes()
    run = trainer(folder, callbacks=[AdapterFolder()])
    run.fit(tuned, data)
    return tuned.eval(), folder, data, run


def test_names_are_the_datas_if_none_are_given(tmp_path):
    tuned, data = SegmentationModule("convnext_shapes", 11, weights=None, head="linear"), scenes(4)
    with pytest.warns(UserWarning, match="weights is null"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(tuned, data)
    assert tuned.class_names == data.class_names


def test_training_lowers_the_loss(tmp_path):
    seed_everything(0)
    tuned, data = module(), scenes(4)
    data.setup("fit")
    images, masks = next(iter(data.train_dataloader()))
    tuned.configure_model()
    tuned.eval()
    before = tuned.loss(tuned(images), masks).item()
    trainer(tmp_path, max_epochs=10, limit_val_batches=0).fit(tuned, data)
    tuned.eval()
    assert tuned.loss(tuned(images), masks).item() < 0.8 * before


@pytest.mark.parametrize("weight", [1.0, float("inf")])
def test_a_loss_that_is_no_number_is_told(weight, tmp_path, recwarn):
    tuned = module()
    tuned.loss.weights = {"cross_entropy": weight}
    trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(tuned, scenes(4))
    told = [str(each.message) for each in recwarn if "train/loss is" in str(each.message)]
    assert [text.split(":")[0] for text in told] == ["train/loss is inf after epoch 0"] * (
        weight == float("inf")
    )


def test_metrics_are_those_of_a_confusion_matrix(fitted, tmp_path):
    tuned, _, data, _ = fitted
    (logged,) = trainer(tmp_path).test(tuned, data, verbose=False)
    tuned.eval()
    counts = np.zeros((11, 11))
    for image, mask, _ in data.datasets["test"]:
        np.add.at(counts, (mask.numpy().ravel(), tuned.segment(image).numpy().ravel()), 1)
    hits, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    assert logged["test/miou"] == pytest.approx((hits[union > 0] / union[union > 0]).mean())
    assert logged["test/acc"] == pytest.approx(hits.sum() / counts.sum())
    assert 0 <= logged["test/boundary_f"] <= 1
    with (tmp_path / "class_iou.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == data.class_names
    present = union > 0
    told = np.array([float(row["iou"]) for row in rows])
    np.testing.assert_allclose(told[present], (hits[present] / union[present]), atol=1e-6)
    assert np.isnan(told[~present]).all()


def test_head_trains_and_the_backbone_is_adapted(fitted):
    net = fitted[0].net
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name for name in trained if name.startswith("head.")} == {
        f"head.{name}" for name, _ in net.head.named_parameters()
    }
    others = {name for name in trained if not name.startswith("head.")}
    assert others
    assert all(".adapters." in name and "pyramid.backbone.stages." in name for name in others)
    kinds = {name.split(".adapters.")[0].rsplit(".", 1)[1] for name in others}
    assert {"conv_dw", "fc1", "fc2", "1"} <= kinds  # depthwise, pointwise and downsampling


def test_a_saved_adapter_predicts_the_same_bit_for_bit(fitted):
    tuned, folder, data, _ = fitted
    again = from_adapter(folder / "adapter")
    again.configure_model()
    again.eval()
    assert again.class_names == data.class_names
    images = torch.stack([image for image, _, _ in data.datasets["val"]])
    with torch.no_grad():
        assert torch.equal(again(images), tuned(images))


def test_merged_weights_fit_a_plain_network(fitted, tmp_path):
    tuned, folder, data, _ = fitted
    made = litflora("merge", folder / "adapter", "--out", tmp_path / "merged.safetensors")
    assert made.code == 0, made.err
    space: dict = {}
    code = [line.strip() for line in made.out.splitlines() if line.startswith("    ")]
    exec(code[0], space)
    expression = code[1].partition(".load_state_dict")[0]
    net = eval(expression, space)
    exec(f"net.{code[1][len(expression) + 1 :]}", {**space, "net": net})
    assert not adapter_names(net)
    image = data.datasets["val"][0][0][None]
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(tuned.normalize(image)), tuned(image))


def test_the_gallery_shows_the_same_samples_before_and_after(fitted):
    folder = fitted[1] / "gallery"
    assert sorted(file.name for file in folder.iterdir()) == ["epoch_000.png", "epoch_001.png"]
    before, after = (
        np.asarray(Image.open(file).convert("RGB")) for file in sorted(folder.iterdir())
    )
    assert before.shape == after.shape
    half = before.shape[1] // 2
    assert (before[:, : half // 2] == after[:, : half // 2]).mean() > 0.99  # the images
    assert (before[:, half:] != after[:, half:]).any()  # the predictions


def test_gallery_colours():
    ids = torch.tensor([[0, 1], [255, 1]])
    assert coloured(ids, [(1, 2, 3), (4, 5, 6)]).tolist() == [
        [[1, 2, 3], [4, 5, 6]],
        [[160, 160, 160], [4, 5, 6]],
    ]


def test_a_gallery_of_nothing():
    with pytest.raises(ValueError, match="at least 1"):
        Gallery(samples=0)


class Plain(LightningDataModule):
    """Somebody else's data: no palette, no datasets."""

    def train_dataloader(self):
        return DataLoader([(torch.rand(3, SIZE, SIZE), torch.zeros(SIZE, SIZE).long())] * 4, 2)

    def val_dataloader(self):
        sample = torch.rand(3, 20, 30), torch.ones(20, 30).long(), "there/a b.jpg"
        return DataLoader([sample], collate_fn=lambda batch: tuple(zip(*batch, strict=True))[:2])

    def predict_dataloader(self):
        samples = [(torch.rand(3, 20, 30), name) for name in ("x/a.jpg", "x/a.png")]
        return DataLoader(samples, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))


def test_with_data_of_somebody_else(tmp_path):
    tuned = module(tuning=Probe())
    run = trainer(tmp_path)
    run.fit(tuned, datamodule=Plain())
    assert "val/miou" in run.callback_metrics
    assert not (tmp_path / "gallery").exists()
    run.predict(tuned, datamodule=Plain(), return_predictions=False)
    written = sorted(file.name for file in (tmp_path / "predictions").iterdir())
    assert written == ["a.jpg.png", "a.png.png"]
    assert Image.open(tmp_path / "predictions" / "a.jpg.png").size == (30, 20)


def test_predicted_masks_are_palette_pictures_of_class_ids(fitted, tmp_path):
    tuned, _, data, _ = fitted
    photos = tmp_path / "photos" / "inner"
    photos.mkdir(parents=True)
    data.setup("test")
    image = data.datasets["test"][0][0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(photos / "one.png")
    run = trainer(tmp_path / "run")
    loader = DataLoader([(image, str(photos / "one.png"))], collate_fn=_listed)
    run.predict(tuned, loader, return_predictions=False)
    tuned.eval()
    mask = Image.open(tmp_path / "run" / "predictions" / "one.png.png")
    assert mask.mode == "P"
    assert torch.equal(torch.tensor(np.asarray(mask)).long(), tuned.segment(image))


def _listed(batch):
    images, names = zip(*batch, strict=True)
    return list(images), list(names)


def test_a_window_over_the_whole_image_changes_nothing(fitted):
    tuned, _, data, _ = fitted
    image = data.datasets["val"][0][0]
    whole = tuned.segment(image)
    tuned.inference = SlidingWindow(SIZE)
    assert torch.equal(tuned.segment(image), whole)
    assert torch.equal(whole, tuned(image[None])[0].argmax(0))
    tuned.inference = Whole()


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_heads_by_name_over_a_vit(head, tmp_path):
    tuned = SegmentationModule(
        "test_vit", 11, weights=None, head=head, head_width=16, img_size=[SIZE, 48], tuning=LoRA()
    )
    with pytest.warns(UserWarning, match="weights is null"):
        tuned.configure_model()
    assert tuned(torch.rand(2, 3, SIZE, 48)).shape == (2, 11, SIZE, 48)
    assert tuned(torch.rand(2, 3, 50, 37)).shape == (2, 11, 50, 37)
    neck = {n for n, p in tuned.net.named_parameters() if "pyramid.neck." in n and p.requires_grad}
    assert neck


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "unt"}, "no segmentation head is called 'unt'"),
        ({"losses": {"dise": 1.0}}, "unknown loss 'dise'"),
        ({"class_weights": [1.0]}, "class_weights has 1 entries, and there are 11 classes"),
    ],
)
def test_mistakes(options, said):
    with pytest.raises(ValueError, match=said):
        module(**options).build()


def test_the_recipe_runs_and_its_adapter_is_tested(tmp_path):
    small = {
        "data.init_args.train_samples": 4,
        "data.init_args.val_samples": 2,
        "data.init_args.test_samples": 2,
        "data.init_args.img_size": SIZE,
        "data.init_args.batch_size": 2,
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": tmp_path,
    }
    options = [str(each) for key, value in small.items() for each in (f"--{key}", value)]
    fit = litflora("fit", "--config", "segmentation/shapes", *options)
    assert fit.code == 0, fit.err
    adapter = next(Path(tmp_path).glob("**/adapter"))
    tested = litflora("test", "--adapter", adapter, *options[6:-6], *options[-6:])
    assert tested.code == 0, tested.err
    assert "IoU" in tested.out


def test_a_batch_of_one_image_is_too_small_for_some_heads(tmp_path):
    made = module(head="upernet")
    with pytest.raises(ValueError, match=r"upernet has batch norms.*batch_size to 2 or more"):
        trainer(tmp_path, max_steps=1).fit(made, scenes(batch_size=1))
