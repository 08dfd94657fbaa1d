"""Small data sets of conversations about images, each in the layout that its datamodule reads."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = (40, 30)  # width and height of every image
Record = dict[str, Any]


def picture(path: Path, red: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (red, 0, 0)).save(path)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def record(own: Any = 1, image: Any = "1.jpg", **more: Any) -> Record:
    mark = "<image>\n" if image else ""
    turns = [
        {"from": "human", "value": f"{mark}What is this?"},
        {"from": "gpt", "value": f"Number {own}."},
    ]
    found = {"id": own, "image": image, "conversations": turns, **more}
    return found if image else {key: value for key, value in found.items() if key != "image"}


def records() -> list[Record]:
    """About four images, about two at once, and without any."""
    two = record(5, ["1.jpg", "2.jpg"])
    two["conversations"][0]["value"] = "Here is <image> and"
    two["conversations"] += [
        {"from": "human", "value": "here <image>. Which is brighter?"},
        {"from": "gpt", "value": "The second."},
    ]
    system = {"from": "system", "value": "You are terse."}
    told = record("text", None)
    told["conversations"].insert(0, system)
    return [*(record(n, f"{n}.jpg") for n in (1, 2, 3, 4)), two, told]


def write_llava(root: Path, given: Any = None, name: str = "train.json") -> Path:
    for number in range(1, 5):
        picture(root / f"{number}.jpg", 50 * number)
    found = records() if given is None else given
    if name.endswith(".jsonl"):
        (root / name).write_text("\n".join(map(json.dumps, found)) + "\n\n")
    else:
        write_json(root / name, found)
    return root


def write_vqa_rad(root: Path) -> Path:
    rows = []
    for number in range(8):
        image = f"synpic{number % 4}.jpg"
        picture(root / "VQA_RAD Image Folder" / image)
        rows.append(
            {
                "qid": number,
                "phrase_type": ("test_para" if number > 5 else "freeform"),
                "image_name": image,
                "question": f"Is it {number}?",
                "answer": number if number % 2 else "Yes",
                "answer_type": "OPEN" if number % 2 else "CLOSED ",
            }
        )
    write_json(root / "VQA_RAD Dataset Public.json", rows)
    return root


def write_easy_vqa(root: Path) -> Path:
    for split, count in {"train": 4, "test": 2}.items():
        for number in range(count):
            picture(root / split / "images" / f"{number}.png")
        asked = [["is there a circle?", "yes", n] for n in range(count)]
        write_json(root / split / "questions.json", [*asked, ["what color?", "blue", 0]])
    return root


def write_vqav2(root: Path) -> Path:
    for name in ("train2014", "val2014", "test2015"):
        ids = (1, 2, 3)
        asked = [{"question_id": 10 * n, "image_id": n, "question": f"What {n}?"} for n in ids]
        for n in ids:
            picture(root / name / f"COCO_{name}_{n:012d}.jpg")
        write_json(root / f"v2_OpenEnded_mscoco_{name}_questions.json", {"questions": asked})
        told = [
            {
                "question_id": 10 * n,
                "multiple_choice_answer": "red",
                "answer_type": "yes/no" if n == 2 else "other",
                "answers": [{"answer": "red" if m else "pink"} for m in range(10)],
            }
            for n in reversed(ids)
        ]
        if name != "test2015":
            write_json(root / f"v2_mscoco_{name}_annotations.json", {"annotations": told})
    return root


def write_gqa(root: Path) -> Path:
    for name in ("train", "val", "testdev"):
        kinds = {"a": "query", "b": "verify", "c": "choose"}
        asked = {
            f"{name}_{own}": {
                "question": f"Is it {own}?",
                "imageId": own,
                "answer": "yes",
                "types": {"structural": kind},
            }
            for own, kind in kinds.items()
        }
        write_json(root / f"{name}_balanced_questions.json", asked)
    for own in "abc":
        picture(root / "images" / f"{own}.jpg")
    return root


def write_science_qa(root: Path) -> Path:
    splits = {"train": ["1", "2", "3"], "val": ["4"], "test": ["5"]}
    problems = {}
    for split, listed in splits.items():
        for own in listed:
            seen = "image.png" if own in "145" else None
            problems[own] = {
                "question": "Which is largest?",
                "choices": ["ant", "bee", "cat"],
                "answer": int(own) % 3,
                "hint": "Mind the cat." if own == "1" else "",
                "image": seen,
            }
            if seen:
                picture(root / "images" / split / own / seen)
    write_json(root / "problems.json", problems)
    write_json(root / "pid_splits.json", splits)
    return root


def write_captions(root: Path) -> Path:
    for name in ("train2017", "val2017"):
        images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in (3, 1)]
        told = [
            {"id": 10 * n + m, "image_id": n, "caption": f"Caption {m} of {n}.\n"}
            for m in (0, 1)
            for n in (1, 3)
        ]
        for image in images:
            picture(root / name / image["file_name"])
        listing = {"images": images, "annotations": told}
        write_json(root / f"annotations/captions_{name}.json", listing)
    return root


WRITERS = {
    "CocoCaptionsDataModule": write_captions,
    "EasyVQADataModule": write_easy_vqa,
    "GQADataModule": write_gqa,
    "LlavaDataModule": write_llava,
    "ScienceQADataModule": write_science_qa,
    "VQARADDataModule": write_vqa_rad,
    "VQAv2DataModule": write_vqav2,
}
