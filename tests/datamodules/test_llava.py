"""LLaVA's format: what is read, how splits are made, and mistakes that are named."""

import json
from pathlib import Path
from typing import Any

import pytest
from conversation_files import picture, record, records, write_llava
from PIL import Image

from litflora.datamodules import LlavaDataModule
from litflora.datamodules import records as module
from litflora.datamodules.records import Records


def build(root: Path, given: Any = None, name: str = "train.json", **options: Any):
    write_llava(root, given, name)
    return LlavaDataModule(str(root), **{"train_file": name, "val_fraction": 0.2, **options})


def texts(conversation) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in conversation.turns]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_conversations_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    data = build(tmp_path, name=name, val_file=name)
    data.setup("fit")
    samples = data.datasets["train"]
    assert list(samples.names) == ["1", "2", "3", "4", "5", "text"]
    first, two, told = samples[0], samples[4], samples[5]
    assert texts(first) == [("user", "<image>\nWhat is this?"), ("assistant", "Number 1.")]
    assert first.images[0].shape == (3, 30, 40)
    assert [image[0].float().mean().round() for image in two.images] == [50, 100]
    assert texts(two)[2] == ("user", "here <image>. Which is brighter?")
    assert texts(told)[0] == ("system", "You are terse.")
    assert told.images == ()
    assert data.contents() == "6 train conversations, 7 val questions"


def test_an_evaluation_is_about_every_answer(tmp_path: Path) -> None:
    data = build(tmp_path, records()[3:], val_file="train.json")
    data.setup()
    for name in ("val", "test"):
        samples = data.datasets[name]
        assert list(samples.names) == ["4", "5", "5", "text"]
        _, first, second, told = samples
        assert texts(first) == [("user", "Here is <image> and"), ("assistant", "Number 5.")]
        assert (len(first.images), len(second.images), len(told.images)) == (1, 2, 0)
        assert texts(second)[:2] == texts(first)
        assert texts(second)[-1] == ("assistant", "The second.")
    assert data.contents().endswith(
        "4 test questions, of the validation set since there is no other"
    )


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 16])
def test_a_list_is_found_whatever_pieces_it_is_read_in(tmp_path: Path, monkeypatch, chunk) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    given = [{"id": n, "text": 'é, 漢字 \U0001f642 ] } " [ {' * n} for n in range(20)]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(given, indent=2, ensure_ascii=False), encoding="utf-8")
    found = Records(path)
    assert list(found) == given
    assert found.places.nbytes == 16 * len(given)
    path.write_text(json.dumps(given))
    assert list(Records(path)) == given


def test_validation_is_held_out_by_image_and_by_seed(tmp_path: Path) -> None:
    twice = [record(f"{n}{part}", f"{n}.jpg") for part in "ab" for n in (1, 2, 3, 4)]

    def held(seed: int) -> tuple[set[str], set[str]]:
        data = build(tmp_path, twice, seed=seed, val_fraction=0.25)
        data.setup()
        assert data.datasets["test"].names == data.datasets["val"].names
        train, val = (set(data.datasets[name].names) for name in ("train", "val"))
        return train, val

    train, val = held(0)
    assert len(val) == 2
    assert len({own[0] for own in val}) == 1
    assert train | val == {row["id"] for row in twice}
    assert not train & val
    assert held(0) == (train, val)
    assert any(held(seed)[1] != val for seed in range(1, 5))


def about_two(own: str, *images: str) -> dict[str, Any]:
    found = record(own, list(images))
    found["conversations"][0]["value"] = "<image> or <image>?"
    return found


def test_what_shares_any_image_is_held_out_together(tmp_path: Path) -> None:
    """Images 1 to 3 are linked by pairs, and so are 4 to 6; no two records have the same pair."""
    links = {"a": "12", "b": "45", "c": "23", "d": "56", "e": "46", "f": "13"}
    given = [about_two(own, *(f"{n}.jpg" for n in pair)) for own, pair in links.items()]
    for number in (5, 6):
        picture(tmp_path / f"{number}.jpg")
    seen = set()
    for seed in range(8):
        data = build(tmp_path, given, seed=seed, val_fraction=0.4)
        data.setup("fit")
        seen.add(frozenset(data.datasets["val"].names))
        assert set(data.datasets["train"].names) == links.keys() - set(data.datasets["val"].names)
    assert seen == {frozenset("acf"), frozenset("bde")}

    data = build(tmp_path, [*given, about_two("link", "1.jpg", "6.jpg")])
    with pytest.raises(ValueError, match=r"linked by images that they share: .*\(val_file\)"):
        data.setup("fit")


def test_validation_is_the_share_that_was_asked_for(tmp_path: Path) -> None:
    """A group that is larger stays in training."""
    chain = [about_two(f"chain{n}", f"{n}.jpg", f"{n + 1}.jpg") for n in (1, 2, 3)]
    texts = [record(f"text{n}", None) for n in range(6)]
    for seed in range(8):
        data = build(tmp_path, [*chain, *texts], seed=seed, val_fraction=0.2)
        data.setup("fit")
        held = set(data.datasets["val"].names)
        assert len(held) == 2
        assert held < {row["id"] for row in texts}


def test_prediction_asks_for_every_answer(tmp_path: Path) -> None:
    asked = record(7)
    asked["conversations"] = asked["conversations"][:1]
    write_llava(tmp_path, [*records(), asked], "ask.jsonl")
    data = build(tmp_path, predict_file="ask.jsonl")
    data.setup("predict")
    samples = data.datasets["predict"]
    assert list(samples.names) == ["1", "2", "3", "4", "5", "5", "text", "7"]
    assert [texts(samples[i])[-1][0] for i in range(8)] == ["user"] * 8
    assert [len(texts(samples[i])) for i in (4, 5)] == [1, 3]
    assert texts(samples[7]) == [("user", "<image>\nWhat is this?")]


def test_a_folder_of_images_gets_one_question(tmp_path: Path) -> None:
    for name in ("b/2.png", "1.png"):
        picture(tmp_path / "photos" / name)
    folder = str(tmp_path / "photos")
    data = LlavaDataModule("nowhere", predict_root=folder, question="What is it?")
    data.setup("predict")
    samples = data.datasets["predict"]
    assert samples.names == ["1.png", "b/2.png"]
    assert texts(samples[1]) == [("user", "<image>\nWhat is it?")]
    assert samples[1].images[0].shape == (3, 30, 40)
    with pytest.raises(ValueError, match="predict_root and question go together"):
        LlavaDataModule("nowhere", predict_root=folder)


def spoiled(root: Path) -> list[dict[str, Any]]:
    """One image is missing, one is cut off."""
    whole = picture(root / "cut.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    return [*records(), record("gone", "gone.jpg"), record("cut", "cut.png")]


def test_bad_images_are_named(tmp_path: Path) -> None:
    given = spoiled(tmp_path)
    data = build(tmp_path, given, val_file="train.json")
    with pytest.raises(FileNotFoundError, match=r"1 of 8 .*\n.*conversation gone: .*gone\.jpg"):
        data.setup("fit")
    data = build(tmp_path, [*given[:6], given[7]], val_file="train.json")
    data.setup("fit")
    with pytest.raises(ValueError, match=r"conversation cut: cannot read .*cut\.png"):
        data.datasets["train"][6]


def test_bad_images_are_left_out_and_counted(tmp_path: Path) -> None:
    data = build(tmp_path, spoiled(tmp_path), val_file="train.json", on_bad_image="skip")
    with pytest.warns(UserWarning, match=r"2 of 8 .*conversation gone: .*conversation cut: "):
        data.setup("fit")
    assert list(data.datasets["train"].names) == ["1", "2", "3", "4", "5", "text"]
    assert data.contents() == (
        "6 train conversations, 7 val questions, 2 train, 2 val left out for bad images"
    )
    data = build(tmp_path, spoiled(tmp_path)[6:], val_file="train.json", on_bad_image="skip")
    with pytest.raises(ValueError, match="none is left"):
        data.setup("fit")


def turns(*said: tuple[str, Any]) -> dict[str, Any]:
    return record(8, conversations=[{"from": who, "value": what} for who, what in said])


ASKED = ("human", "<image>\nWhat?")
MISTAKES = {
    "unknown role": (turns(ASKED, ("robot", "It.")), "from 'robot' is none of human, user, gpt"),
    "no answer": (turns(ASKED), "conversation 8 has no assistant turn"),
    "more marks": (turns(("human", "<image><image>"), ("gpt", "It.")), "2 <image> .* 1 image"),
    "forgotten mark": (turns(("human", "What?"), ("gpt", "It.")), "write <image> once for each"),
    "no text": (turns(ASKED, ("gpt", None)), "conversation 8: turn .* needs texts"),
    "no turns": (record(8, conversations="What?"), "conversation 8 has no list conversations"),
    "no path": (record(8, 3), "conversation 8: image is 3"),
    "no object": (["What?"], "record 7 is no object"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_names_file_and_conversation(tmp_path: Path, kind: str) -> None:
    wrong, said = MISTAKES[kind]
    data = build(tmp_path, [*records(), wrong], val_file="train.json")
    with pytest.raises(ValueError, match=rf"(?s)train\.json.*{said}"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"id": 1}', "it does not begin with \\[, at record 1"),
        ('[{"id": 1}, {"id": ', "at record 2"),
        ('[{"id": 1} {"id": 2}]', "no , and no \\] after it, at record 1"),
        ('[{"id": 1}] {}', "more comes after"),
        ('[{"id": 1},]', "at record 2"),
        ("[]", "holds no records"),
        ("", "does not begin with"),
    ],
)
def test_no_list_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"wrong\.json.*{said}"):
        Records(path)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"id": 1}\n\n{"id": \n')
    with pytest.raises(ValueError, match=r"wrong\.jsonl, line 3 is no JSON"):
        Records(path)


def test_a_missing_file_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"other\.json is missing"):
        build(tmp_path, val_file="other.json")
    with pytest.raises(FileNotFoundError, match="no folder"):
        LlavaDataModule(str(tmp_path / "nowhere"), train_file="train.json")
    with pytest.raises(ValueError, match="neither raise nor skip"):
        build(tmp_path, on_bad_image="ignore")
    with pytest.raises(ValueError, match="no conversations for train"):
        LlavaDataModule(str(tmp_path)).setup("fit")


def test_the_real_files(shared_data: Path) -> None:
    counts = {"vqa_rad_train": (149, 871), "vqa_rad_test": (96, 223)}
    counts |= {"coco_caption_train2017": (80, 240), "coco_caption_val2017": (50, 150)}
    for name, (conversations, asked) in counts.items():
        file = f"llava/{name}.json"
        data = LlavaDataModule(str(shared_data), file, file, on_bad_image="skip")
        data.setup("validate")
        samples = data.datasets["val"]
        found = [samples.conversations[index] for index in range(len(samples))]
        assert len(found) == asked
        assert len(samples.conversations.conversations) == conversations
        assert all(each.turns[-1].role == "assistant" for each in found)
        with Image.open(found[0].images[0]) as image:
            assert samples[0].images[0].shape[1:] == image.size[::-1]
