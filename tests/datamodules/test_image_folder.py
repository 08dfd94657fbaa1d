"""Folders of images: layouts, splits, and what is said about mistakes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from litflora.datamodules import ImageFolderDataModule

Photo = Callable[..., Path]


def build(root: Path, **changes: Any) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), **{"img_size": 16, "batch_size": 4, **changes})


def names(data: ImageFolderDataModule, split: str) -> set[str]:
    return set(data.datasets[split].names)


def split_folders(root: Path, photo: Photo, *splits: str, classes: str = "ab") -> Path:
    for split in splits:
        for letter in classes:
            for number in range(10):
                photo(root / split / letter / f"{number}.jpg")
    return root


def test_one_folder_is_split_by_class_and_seed(photos: Path) -> None:
    data = build(photos, val_fraction=0.25)
    assert data.class_names == ["cat", "dog", "eel"]
    assert data.num_classes == 3
    data.setup()
    train, val, test = (names(data, split) for split in ("train", "val", "test"))
    assert len(train) + len(val) + len(test) == len(train | val | test) == 26
    labels = torch.tensor(data.datasets["test"].labels)
    assert torch.bincount(labels).tolist() == [3, 2, 2]
    again, other = build(photos, val_fraction=0.25), build(photos, val_fraction=0.25, seed=1)
    again.setup()
    other.setup()
    assert names(again, "val") == val != names(other, "val")


def test_split_folders_are_taken_as_they_are(tmp_path: Path, photo: Photo) -> None:
    data = build(split_folders(tmp_path, photo, "train", "val", "test"))
    data.setup()
    for split in ("train", "val", "test"):
        assert len(names(data, split)) == 20
        assert all(f"/{split}/" in name for name in names(data, split))


def test_missing_val_is_taken_from_train(tmp_path: Path, photo: Photo) -> None:
    data = build(split_folders(tmp_path, photo, "train", "test"))
    data.setup()
    assert [len(names(data, split)) for split in ("train", "val", "test")] == [18, 2, 20]
    assert all("/train/" in name for name in names(data, "val"))
    assert not names(data, "val") & names(data, "train")


def test_val_stands_in_for_a_missing_test(tmp_path: Path, photo: Photo) -> None:
    data = build(split_folders(tmp_path, photo, "train", "val"))
    data.setup()
    assert names(data, "test") == names(data, "val")
    assert len(names(data, "train")) == 20


def test_train_may_be_a_class(tmp_path: Path, photo: Photo) -> None:
    for name in ("bus", "car", "train"):
        for number in range(3):
            photo(tmp_path / name / f"{number}.jpg")
    assert build(tmp_path).class_names == ["bus", "car", "train"]


def test_links_are_followed_and_hidden_files_left_out(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "linked"
    (root / "cat" / ".cache").mkdir(parents=True)
    (root / "cat" / "more").symlink_to(photos / "cat")
    (root / "cat" / ".cache" / "00.png").write_bytes(b"")
    (root / "cat" / "._00.png").write_bytes(b"")
    (root / "dog").symlink_to(photos / "dog")
    data = build(root)
    data.setup()
    assert sum(len(samples) for samples in data.datasets.values()) == 20


def test_images_come_as_rgb_of_the_asked_size(tmp_path: Path) -> None:
    for letter in "ab":
        for number, mode in enumerate(["L", "RGBA", "P", "CMYK", "1"]):
            folder = tmp_path / letter
            folder.mkdir(exist_ok=True)
            suffix = "tif" if mode == "CMYK" else "png"
            Image.new(mode, (10 + number, 31)).save(folder / f"{number}.{suffix}")
    data = build(tmp_path)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64


def test_only_training_images_are_augmented(photos: Path) -> None:
    data, plain = build(photos), build(photos, augment=False)
    data.setup()
    plain.setup()
    key = 3 * len(data.datasets["train"])  # a later epoch of the first image
    for split, random in [("train", True), ("val", False), ("test", False)]:
        size = len(data.datasets[split])
        first, later = (data.datasets[split][epoch * size][0] for epoch in (0, 3))
        assert torch.equal(first, later) is not random
    assert torch.equal(plain.datasets["train"][0][0], plain.datasets["train"][key][0])


def test_evaluation_takes_the_middle_square(tmp_path: Path) -> None:
    image = Image.new("RGB", (48, 16))
    image.paste((255, 0, 0), (16, 0, 32, 16))
    for letter in "ab":
        for number in range(3):
            path = tmp_path / letter / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            image.save(path)
    data = build(tmp_path)
    data.setup("test")
    assert (data.datasets["test"][0][0][0] == 255).all()


def test_predict_takes_every_image_below_a_folder(
    photos: Path, tmp_path: Path, photo: Photo
) -> None:
    wanted = [photo(tmp_path / "new" / name) for name in ("x.jpg", "deep/er/y.png", "z.WEBP")]
    (tmp_path / "new" / "notes.txt").write_text("no image")
    data = build(photos, predict_root=str(tmp_path / "new"))
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    images, paths = batch
    assert images.shape == (3, 3, 16, 16)
    assert paths == sorted(map(str, wanted))


def test_predict_without_a_folder_takes_the_test_split(photos: Path) -> None:
    data = build(photos)
    data.setup("predict")
    data.setup("test")
    assert names(data, "predict") == names(data, "test")


def test_predicting_needs_no_labelled_images(tmp_path: Path, photo: Photo) -> None:
    photo(tmp_path / "new" / "x.jpg")
    data = build(tmp_path / "gone", predict_root=str(tmp_path / "new"))
    data.setup("predict")
    assert data.class_names == []
    assert len(data.datasets["predict"]) == 1


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder; expected .*train/<class>"):
        build(tmp_path / "nowhere")


def test_root_without_classes(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no class folders; expected"):
        build(tmp_path)


def test_empty_class(photos: Path) -> None:
    (photos / "fox").mkdir()
    data = build(photos)
    with pytest.raises(FileNotFoundError, match="fox holds no images"):
        data.setup("fit")


def test_missing_predict_root(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"predict_root .*nowhere is no folder"):
        build(photos, predict_root=str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    data = build(photos, predict_root=str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="no images below predict_root"):
        data.setup("predict")


def test_classes_of_the_splits_must_agree(tmp_path: Path, photo: Photo) -> None:
    split_folders(tmp_path, photo, "train", classes="abc")
    split_folders(tmp_path, photo, "test", classes="abd")
    with pytest.raises(ValueError, match="only in train c, only in test d"):
        build(tmp_path)


@pytest.mark.parametrize("fraction", [0, 0.5, 1.5])
def test_fraction_out_of_range(photos: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match=f"val_fraction={fraction} must lie between"):
        build(photos, val_fraction=fraction)


@pytest.fixture(params=["truncated.jpg", "text.png", "empty.jpeg"])
def broken(request: pytest.FixtureRequest, photos: Path, photo: Photo) -> Path:
    path = photo(photos / "dog" / request.param, size=(200, 200))
    whole = path.read_bytes()
    contents = {"truncated.jpg": whole[: len(whole) // 2], "text.png": b"hi", "empty.jpeg": b""}
    path.write_bytes(contents[request.param])
    return path


def test_an_unreadable_image_is_named_when_loaded(photos: Path, broken: Path) -> None:
    data = build(photos, predict_root=str(photos))
    data.setup("predict")
    with pytest.raises(ValueError, match=rf"cannot read image .*{broken.name} \(.*replace or"):
        list(data.predict_dataloader())


def test_an_unreadable_image_is_named_by_a_worker_too(photos: Path) -> None:
    (photos / "cat" / "00.png").write_bytes(b"hi")
    data = build(photos, predict_root=str(photos), num_workers=1)
    data.setup("predict")
    with pytest.raises(ValueError, match=r"cannot read image .*cat/00.png"):
        list(data.predict_dataloader())


def test_unreadable_images_are_found_before_training(
    photos: Path, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cat" / "00.png").write_bytes(b"hi")
    data = build(photos, check_images=True)
    data.setup()
    with pytest.raises(ValueError, match="2 unreadable") as error:
        data.prepare_data()
    assert str(broken) in str(error.value)
    assert "cat/00.png" in str(error.value)
    assert "\n" not in str(error.value)


def test_good_images_pass_the_check(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = build(photos, check_images=True)
    data.setup()
    data.prepare_data()
    assert "Checking images" in capsys.readouterr().out


def test_real_photos(shared_data: Path) -> None:
    data = build(shared_data / "cifar10", img_size=96, batch_size=32)
    assert data.class_names[0] == "airplane"
    assert data.num_classes == 10
    data.setup()
    assert [len(data.datasets[split]) for split in ("train", "val", "test")] == [4500, 500, 1000]
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (32, 3, 96, 96)
