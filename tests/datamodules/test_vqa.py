"""Data sets of questions and captions: each as the conversations that it is to be."""

from pathlib import Path

import pytest
from conversation_files import (
    WRITERS,
    write_captions,
    write_easy_vqa,
    write_gqa,
    write_json,
    write_science_qa,
    write_vqa_rad,
    write_vqav2,
)

from litflora import datamodules
from litflora.datamodules import (
    CocoCaptionsDataModule,
    EasyVQADataModule,
    GQADataModule,
    ScienceQADataModule,
    VQARADDataModule,
    VQAv2DataModule,
)

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def shown(data, split: str, index: int):
    """Question, answer, image's name, accepted answers, and whether it is closed."""
    found = data.datasets[split].conversations[index]
    (asked, told) = found.turns
    name = found.images[0].name if found.images else None
    return asked.text, told.text, name, found.accepted(), found.closed


def sizes(data) -> tuple[int, ...]:
    return tuple(len(data.datasets[name]) for name in ("train", "val", "test"))


def test_vqa_rad(tmp_path: Path) -> None:
    data = VQARADDataModule(str(write_vqa_rad(tmp_path)), val_fraction=0.25)
    data.setup()
    assert sum(sizes(data)[:2]) == 6
    assert list(data.datasets["test"].names) == ["6", "7"]
    closed = (f"<image>\nIs it 6?\n{SHORT}", "Yes", "synpic2.jpg", ("Yes",), True)
    assert shown(data, "test", 0) == closed
    assert shown(data, "test", 1)[1:] == ("7", "synpic3.jpg", ("7",), False)


def test_easy_vqa(tmp_path: Path) -> None:
    data = EasyVQADataModule(str(write_easy_vqa(tmp_path)), val_fraction=0.25)
    data.setup()
    assert sum(sizes(data)[:2]) == 5
    about = [{c.images[0] for c in data.datasets[name].conversations} for name in ("train", "val")]
    assert not about[0] & about[1]
    yes = (f"<image>\nis there a circle?\n{SHORT}", "yes", "1.png", ("yes",), True)
    assert shown(data, "test", 1) == yes
    assert shown(data, "test", 2)[1:] == ("blue", "0.png", ("blue",), False)


def test_vqav2(tmp_path: Path) -> None:
    data = VQAv2DataModule(str(write_vqav2(tmp_path)))
    data.setup()
    data.setup("predict")
    assert sizes(data) == (3, 3, 3)
    text, answer, name, people, closed = shown(data, "val", 1)
    assert (text, answer) == (f"<image>\nWhat 2?\n{SHORT}", "red")
    assert name == "COCO_val2014_000000000002.jpg"
    assert (people, closed) == (("pink", *["red"] * 9), True)
    assert shown(data, "val", 0)[4] is False
    predicted = data.datasets["predict"].conversations[2]
    assert len(predicted.turns) == 1
    assert predicted.images[0].name == "COCO_test2015_000000000003.jpg"


def test_gqa(tmp_path: Path) -> None:
    data = GQADataModule(str(write_gqa(tmp_path)))
    data.setup()
    assert list(data.datasets["test"].names) == ["testdev_a", "testdev_b", "testdev_c"]
    assert shown(data, "test", 0) == (
        f"<image>\nIs it a?\n{SHORT}",
        "yes",
        "a.jpg",
        ("yes",),
        False,
    )
    assert [shown(data, "train", i)[4] for i in range(3)] == [False, True, True]


def test_science_qa(tmp_path: Path) -> None:
    data = ScienceQADataModule(str(write_science_qa(tmp_path)))
    data.setup()
    assert sizes(data) == (3, 1, 1)
    choices = f"Which is largest?\nA. ant\nB. bee\nC. cat\n{LETTER}"
    first = (f"<image>\nMind the cat.\n{choices}", "B", "image.png", ("B",), True)
    assert shown(data, "train", 0) == first
    assert shown(data, "train", 1) == (choices, "C", None, ("C",), True)
    path = data.datasets["val"].conversations[0].images[0]
    assert path == tmp_path / "images/val/4/image.png"


def test_captions(tmp_path: Path) -> None:
    data = CocoCaptionsDataModule(str(write_captions(tmp_path)))
    data.setup()
    assert sizes(data) == (4, 2, 2)
    asked = "<image>\nProvide a one-sentence caption for the provided image."
    both = ("Caption 0 of 3.", "Caption 1 of 3.")
    assert shown(data, "val", 0) == (asked, both[0], "000000000003.jpg", both, None)
    assert shown(data, "train", 1)[:4] == (asked, both[1], "000000000003.jpg", both[1:])


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_every_image_that_is_named_is_read(name: str, tmp_path: Path) -> None:
    root = WRITERS[name](tmp_path)
    files = {"train_file": "train.json"} if name == "LlavaDataModule" else {}
    data = getattr(datamodules, name)(str(root), on_bad_image="skip", **files)
    data.setup()
    data.setup("predict")
    assert "left out" not in data.contents()
    for samples in data.datasets.values():
        for conversation in samples:
            assert all(image.shape == (3, 30, 40) for image in conversation.images)
            marks = sum(turn.text.count("<image>") for turn in conversation.turns)
            assert marks == len(conversation.images)


def test_mistakes_name_the_file(tmp_path: Path) -> None:
    root = write_vqa_rad(tmp_path / "rad")
    path = write_json(root / "VQA_RAD Dataset Public.json", [{"phrase_type": "freeform"}])
    with pytest.raises(ValueError, match=r"Public\.json: entry 1 .* no 'answer_type'"):
        VQARADDataModule(str(root)).setup("fit")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"Public\.json is missing"):
        VQARADDataModule(str(root)).setup("fit")
    root = write_vqav2(tmp_path / "vqa")
    write_json(root / "v2_mscoco_val2014_annotations.json", {"annotations": []})
    with pytest.raises(ValueError, match=r"val2014_questions\.json: entry 1 .* question 10 has no"):
        VQAv2DataModule(str(root)).setup("fit")
    root = write_science_qa(tmp_path / "science")
    write_json(root / "pid_splits.json", {"train": ["99"], "val": ["4"]})
    with pytest.raises(ValueError, match=r"entry 1 .* problem 99 is not in problems\.json"):
        ScienceQADataModule(str(root)).setup("fit")
    root = write_captions(tmp_path / "captions")
    write_json(root / "annotations/captions_val2017.json", {"images": [{"id": 1}]})
    with pytest.raises(ValueError, match="no COCO file of captions: it has no list 'annotations'"):
        CocoCaptionsDataModule(str(root)).setup("fit")


def test_the_real_data_sets(shared_data: Path) -> None:
    rad = VQARADDataModule(str(shared_data / "VQA_RAD"))
    easy = EasyVQADataModule(str(shared_data / "easy_vqa"))
    captions = CocoCaptionsDataModule(str(shared_data / "coco"))
    for data in (rad, easy, captions):
        data.setup()
    assert (sum(sizes(rad)[:2]), sizes(rad)[2]) == (871, 223)
    assert (sum(sizes(easy)[:2]), sizes(easy)[2]) == (9656, 2449)
    assert sizes(captions) == (400, 50, 50)
    assert sum(len(c.accepted()) for c in captions.datasets["val"].conversations) == 250
    asked = [c for name in ("train", "val", "test") for c in rad.datasets[name].conversations]
    assert sum(bool(each.closed) for each in asked) == 656
