"""`litflora inspect data`: what is drawn, and when it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image
from shell import files_below, litflora, make_masks, make_photos, photo_args
from torchvision import tv_tensors
from torchvision.transforms import v2

from litflora.commands.samples import sheet
from litflora.datamodules import ShapesSegmentationDataModule
from litflora.datamodules.dense import DenseSamples
from litflora.drawing import BoxDrawing, LabelDrawing

PHOTOS = "classification/image_folder_vit_tiny"
MASKS = "segmentation/mask_folder_vit_tiny"
QUICK = ("inspect", "data", "quickstart", "--data.train_samples", 4, "--data.val_samples", 2)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def colors(path):
    return {tuple(color) for color in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)}


def test_photos_need_neither_backbone_nor_weights(here, tmp_path):
    photos = make_photos(tmp_path / "photos")
    args = photo_args(photos, tmp_path / "gone.safetensors")
    told = litflora("inspect", "data", PHOTOS, *args, "--config", "tuning/lora")
    assert told.code == 0, told.err
    assert told.out == (
        "data     9 train, 3 val images of 3 classes: ant, bee, cat\nsamples  samples.png\n"
    )
    assert files_below(here) == {"samples.png"}
    assert Image.open("samples.png").size > (1000, 700)


def test_masks_are_in_the_colours_of_the_legend(tmp_path):
    root = make_masks(tmp_path / "masks")
    options = ["--data.root", root, "--data.crop_size", 32, "--data.scale_range", "[1, 1]"]
    names = ["--data.class_names", "[ground, disc]"]
    told = litflora("inspect", "data", MASKS, *options, *names, "--samples", 2, "--out", "a.png")
    assert told.code == 0, told.err
    assert "4 train, 4 val images of 2 classes: ground, disc" in told.out
    assert {(0, 0, 0), (128, 0, 0)} <= colors("a.png")


def test_what_is_drawn_is_the_first_batch(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "litflora.commands.samples.sheet", lambda *args: seen.append(args) or sheet(*args)
    )
    options = {"domain": "source", "img_size": 32, "train_samples": 20, "batch_size": 6}
    given = [str(each) for key, value in options.items() for each in (f"--data.{key}", value)]
    recipe = "segmentation/shapes"
    assert litflora("inspect", "data", recipe, *given, "--samples", 6).code == 0
    ((_, dataset, keys),) = seen
    data = ShapesSegmentationDataModule(**options)
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))
    assert torch.equal(torch.stack([dataset[key][0] for key in keys]), images)


class Boxes:
    """Two images, each with a box in its left half."""

    def __getitem__(self, index):
        image = tv_tensors.Image(torch.full((3, 20, 20 + 20 * index), 90, dtype=torch.uint8))
        boxes = tv_tensors.BoundingBoxes(
            [[2.0, 4.0, 8.0, 16.0]], format="XYXY", canvas_size=image.shape[-2:]
        )
        return image, {"boxes": boxes, "labels": torch.tensor([1])}


def test_boxes_as_they_are_and_as_they_come_to_training():
    dataset = DenseSamples(Boxes(), ["a.jpg", "b" * 50], v2.RandomHorizontalFlip(p=1))
    figure = sheet(BoxDrawing(["cat", "dog"]), dataset, [0, 1])
    starts = [axis.patches[0].get_x() + 0.5 for axis in figure.axes]
    assert starts == [2, 12, 2, 32]
    assert [axis.texts[0].get_text() for axis in figure.axes] == ["dog"] * 4
    figure.draw_without_rendering()
    widths = [axis.get_position().width for axis in figure.axes]
    assert widths == pytest.approx([widths[0]] * 4, rel=0.02)  # though one is twice as wide as high
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["a.jpg", "in training", "…" + "b" * 35, "in training"]


def test_classes_are_named_and_no_more_room_is_taken_than_needed():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    dataset = DenseSamples([(image, n) for n in range(3)], "abc")
    figure = sheet(LabelDrawing(["cat", "dog", "owl"]), dataset, range(3))
    named = [axis.get_xlabel() for axis in figure.axes if axis.axison]
    assert named == ["cat", "cat", "dog", "dog", "owl", "owl"]
    assert len(figure.axes) == 8
    assert len(sheet(LabelDrawing(["cat"]), dataset, [0]).axes) == 2


def test_a_picture_is_replaced_only_if_told(here):
    (here / "samples.png").write_text("mine")
    refused = litflora(*QUICK)
    assert refused.code == 2
    assert "samples.png exists already: give another name, or --force" in refused.err
    assert (here / "samples.png").read_text() == "mine"
    assert litflora(*QUICK, "--force").code == 0
    assert Image.open("samples.png").format == "PNG"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", 0], "--samples must be 1 to 100, not 0"),
        (["--samples", 101], "not 101"),
        (["--samples", "few"], "invalid int value: 'few'"),
        (["--out", "a.jpg"], "is no PNG file: give a name that ends in .png"),
        (["--out", "no/a.png"], "there is no folder no to write to"),
        (["--data.root", "gone"], "no option 'root'"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(more, message, here):
    told = litflora(*QUICK, *more)
    assert told.code == 2
    assert message in told.err
    assert files_below(here) == set()


def test_what_is_no_recipe(here):
    assert "is a folder: give a recipe" in litflora("inspect", "data", here).err
    assert "no file or recipe called 'quick'" in litflora("inspect", "data", "quick").err
    assert "RECIPE" in litflora("inspect", "data").err


def test_without_matplotlib(here, monkeypatch):
    monkeypatch.setattr("litflora.commands.samples.find_spec", lambda name: None)
    told = litflora(*QUICK)
    assert (told.code, files_below(here)) == (2, set())
    assert told.err == "error: matplotlib draws the samples: pip install 'litflora[plots]'\n"


def test_data_of_somebody_else():
    told = litflora("inspect", "data", "quickstart", "--data", "tiny.Colours")
    assert told.code == 2
    assert "Colours cannot be shown" in told.err


def test_help_of_both_forms():
    assert "--samples N" in litflora("inspect", "data", "--help").out
    other = litflora("inspect", "--help").out
    assert "--samples" not in other
    assert "litflora inspect data RECIPE" in other
