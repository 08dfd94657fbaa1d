"""What a detection leaves to look at: gallery, results, pictures, and scores of classes."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from PIL import Image
from tiny import trainer
from torch.utils.data import DataLoader
from torchvision.ops import box_convert

from litflora.callbacks import ClassTable, DetectionWriter, Gallery
from litflora.callbacks._files import picture_path
from litflora.drawing import BoxDrawing

NAMES, PALETTE = ["cat", "dog", "owl"], [(200, 40, 0), (0, 60, 220), (0, 130, 60)]
SIZE = (40, 60)


def scene(seed, masks=True):
    """An image, and its objects as a module finds them."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 255, (3, *SIZE), generator=generator, dtype=torch.uint8)
    count = 1 + seed % 3
    corner = torch.rand(count, 2, generator=generator) * 20
    boxes = torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator) * 14], 1)
    labels = torch.randint(0, len(NAMES), (count,), generator=generator)
    found = {"boxes": boxes, "labels": labels, "scores": torch.linspace(0.9, 0.2, count)}
    if masks:
        found["masks"] = torch.rand(count, *SIZE, generator=generator) > 0.5
    return image, found


class Finder(LightningModule):
    """A stand-in for a module that detects: it knows what is in each image."""

    drawing = BoxDrawing
    class_names = NAMES

    def __init__(self, masks=True):
        super().__init__()
        self.masks = masks
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.known = {scene(n)[0].sum().item(): scene(n, masks)[1] for n in range(6)}

    def detect(self, image):
        return self.known[image.sum().item()]

    def training_step(self, batch, batch_idx):
        return self.weight * 1

    def validation_step(self, batch, batch_idx): ...

    def test_step(self, batch, batch_idx): ...

    def predict_step(self, batch, batch_idx):
        images, names = batch
        return {"names": list(names), "found": [self.detect(image) for image in images]}

    def class_scores(self):
        return "AP", [0.5, float("nan"), 0.25]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Scenes(LightningDataModule):
    """Images named ``root/in/<n>.jpg``, with ids of their own."""

    class_names, palette, category_ids = NAMES, PALETTE, [3, 7, 11]

    def __init__(self, root="root"):
        super().__init__()
        self.root = root
        samples = [(scene(n)[0], scene(n, masks=n % 2 == 0)[1], self.name(n)) for n in range(6)]
        for _, target, _ in samples:
            del target["scores"]
        self.datasets = {"val": samples, "predict": [(image, name) for image, _, name in samples]}
        self.image_ids = {self.name(n): 100 + n for n in range(6)}

    def name(self, n):
        return f"{self.root}/in/{n}.jpg"

    def train_dataloader(self):
        return DataLoader(range(2))

    def val_dataloader(self):
        return DataLoader(range(2))

    test_dataloader = val_dataloader

    def predict_dataloader(self):
        def listed(batch):
            return tuple(map(list, zip(*batch, strict=True)))

        return DataLoader(self.datasets["predict"], batch_size=4, collate_fn=listed)


def predict(folder, masks=True, data=None, **options):
    run = trainer(folder, callbacks=[DetectionWriter()], **options)
    data = data or Scenes()
    run.predict(Finder(masks), data, return_predictions=False)
    return json.loads((folder / "predictions.json").read_text())


def test_a_gallery_of_detections(tmp_path):
    run = trainer(tmp_path, callbacks=[Gallery(samples=3)])
    run.fit(Finder(), Scenes())
    files = sorted((tmp_path / "gallery").iterdir())
    assert [file.name for file in files] == ["epoch_000.png", "epoch_001.png"]
    before, after = (np.asarray(Image.open(file).convert("RGB")) for file in files)
    assert before.shape[1] > 1000
    assert (before == after).all()  # nothing was learnt
    shown = {tuple(color) for color in before.reshape(-1, 3).tolist()}
    targets = [target for _, target, _ in Scenes().datasets["val"][::2]]
    assert {PALETTE[n] for target in targets for n in target["labels"].tolist()} <= shown


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("reader", ["pycocotools.coco", "faster_coco_eval"])
def test_results_are_read_by_cocos_tools(masks, reader, tmp_path, capsys):
    coco = pytest.importorskip(reader)
    written = predict(tmp_path, masks)
    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": 100 + n, "height": SIZE[0], "width": SIZE[1]} for n in range(6)],
        "categories": [{"id": n, "name": str(n)} for n in Scenes.category_ids],
        "annotations": [],
        "info": {},
    }
    truth.createIndex()
    read = truth.loadRes(str(tmp_path / "predictions.json"))
    for n in range(6):
        _, found = scene(n)
        rows = read.loadAnns(read.getAnnIds(imgIds=[100 + n]))
        boxes = box_convert(torch.tensor([row["bbox"] for row in rows]), "xywh", "xyxy")
        torch.testing.assert_close(boxes, found["boxes"], atol=2e-3, rtol=0)
        assert [row["score"] for row in rows] == pytest.approx(found["scores"].tolist(), abs=1e-6)
        labels = [Scenes.category_ids.index(row["category_id"]) for row in rows]
        assert labels == found["labels"].tolist()
        if masks:
            again = torch.tensor(np.stack([read.annToMask(row) for row in rows])).bool()
            assert torch.equal(again, found["masks"])
    assert all(("segmentation" in row) == masks for row in written)
    named = {row["image_id"]: row["file_name"] for row in written}
    assert all(name == f"in/{number - 100}.jpg" for number, name in named.items())
    said = f"{len(written)} predicted objects are in {tmp_path / 'predictions.json'}"
    assert said in capsys.readouterr().out


def test_pictures_are_named_as_the_images_below_the_root(tmp_path):
    predict(tmp_path)
    pictures = sorted((tmp_path / "predictions").rglob("*.png"))
    names = [path.relative_to(tmp_path / "predictions").as_posix() for path in pictures]
    assert names == [f"in/{n}.jpg.png" for n in range(6)]
    drawn = Image.open(pictures[0]).convert("RGB")
    assert drawn.size == (660, 440)  # eleven times the image
    colors = {tuple(color) for color in np.asarray(drawn).reshape(-1, 3).tolist()}
    assert PALETTE[scene(0)[1]["labels"][0]] in colors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions", "predictions.json"]


class Plain(LightningDataModule):
    """Somebody else's data: neither ids nor colours."""

    def predict_dataloader(self):
        return Scenes().predict_dataloader()


def test_without_ids_names_stand_for_images_and_classes_count_from_one(tmp_path):
    written = predict(tmp_path, masks=False, data=Plain())
    assert {row["image_id"] for row in written} == {f"root/in/{n}.jpg" for n in range(6)}
    expected = [n + 1 for image in range(6) for n in scene(image)[1]["labels"].tolist()]
    assert [row["category_id"] for row in written] == expected


def test_nothing_found_is_an_empty_list(tmp_path, monkeypatch):
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0).long(),
        "scores": torch.zeros(0),
    }
    nothing["masks"] = torch.zeros(0, *SIZE).bool()
    monkeypatch.setattr(Finder, "detect", lambda self, image: nothing)
    assert predict(tmp_path) == []


def test_results_are_not_kept_in_memory(tmp_path, monkeypatch):
    """A batch's objects are in a file before the next batch comes."""
    seen = []

    def counting(self, batch, batch_idx):
        parts = list(tmp_path.glob(".predictions.*"))
        seen.append(sum(len(part.read_text().splitlines()) for part in parts))
        return original(self, batch, batch_idx)

    original = Finder.predict_step
    monkeypatch.setattr(Finder, "predict_step", counting)
    predict(tmp_path)
    assert seen[0] == 0
    assert seen[1] > 0


def test_a_failing_prediction_leaves_the_old_results(tmp_path, monkeypatch):
    (tmp_path / "predictions.json").write_text("old")

    def fails(self, batch, batch_idx):
        if batch_idx:
            raise OSError("disk full")
        return original(self, batch, batch_idx)

    original = Finder.predict_step
    monkeypatch.setattr(Finder, "predict_step", fails)
    with pytest.raises(OSError, match="disk full"):
        predict(tmp_path)
    assert (tmp_path / "predictions.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions", "predictions.json"]


def test_a_fast_dev_run_writes_nothing(tmp_path):
    run = trainer(tmp_path / "run", callbacks=[DetectionWriter()], fast_dev_run=True)
    run.predict(Finder(), Scenes())
    assert not (tmp_path / "run").exists()


def test_without_matplotlib_results_are_written_and_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("litflora.callbacks.detections.find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"no predictions are drawn: .*litflora\[plots\]"):
        assert predict(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.json"]


def test_masks_need_a_library_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    with pytest.raises(ImportError, match=r"litflora\[dense\]"):
        predict(tmp_path)


def test_the_scores_of_classes_worst_first_and_unknown_last(tmp_path, capsys):
    trainer(tmp_path, callbacks=[ClassTable()]).test(Finder(), Scenes(), verbose=False)
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines[lines.index("class  AP") :]]
    assert [row for row in table if len(row) == 2] == [
        ["class", "AP"],
        *[["owl", "0.250"], ["cat", "0.500"], ["dog", "nan"]],
    ]
    with (tmp_path / "class_ap.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [["class", "ap"], ["cat", "0.500000"], ["dog", "nan"], ["owl", "0.250000"]]


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("photos/a/b.jpg", "a/b.jpg.png"),
        ("photos/../else/b.jpg", "b.jpg.png"),
        ("elsewhere/b.jpg", "b.jpg.png"),
    ],
)
def test_no_picture_leaves_the_folder_of_predictions(name: str, drawn: str) -> None:
    data = SimpleNamespace(predict_root="photos")
    assert picture_path(data, Path("run"), name) == Path("run/predictions", drawn)
