"""Conversations of files through the command line: fit, predict, and two processes."""

import csv
import json
import math

import pytest
from conversation_files import record, write_llava
from shell import SMALL, litflora, litflora_process

pytestmark = pytest.mark.filterwarnings("ignore:weights is null")

MODEL = {
    "tower": "test_vit",
    "layer": -1,
    "img_size": 32,
    "weights": "null",
    "language_model": "tiny",
    "max_new_tokens": 4,
    "tower_tuning": "litflora.adapters.Full",
    "language_tuning": "litflora.adapters.Full",
    "base_dtype": "null",
}
DATA = {"train_file": "train.json", "val_fraction": 0.3, "batch_size": 2, "num_workers": 0}
TRAINER = ("--trainer.precision=32", "--trainer.num_sanity_val_steps=0")


def arguments(root, runs):
    """Of a fit on eight conversations about images and eight without."""
    texts = [record(f"text{n}", None) for n in range(8)]
    write_llava(root, [*(record(str(n), f"{n % 4 + 1}.jpg") for n in range(8)), *texts])
    model = [f"--model.init_args.{key}={value}" for key, value in MODEL.items()]
    data = [f"--data.init_args.{key}={value}" for key, value in {**DATA, "root": root}.items()]
    return (*model, *data, *SMALL, *TRAINER, f"--trainer.default_root_dir={runs}")


def losses(folder):
    """Those of validation."""
    with (folder / "metrics.csv").open() as file:
        return [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]


def test_fit_on_packed_rows_and_predict_a_folder(tmp_path):
    given = arguments(tmp_path / "data", tmp_path)
    packed = "--data.init_args.pack=true"
    fit = litflora("fit", "--config", "vision_language/llava", *given, packed)
    assert fit.code == 0, fit.err
    run = tmp_path / "vision_language/llava/version_0"
    assert all(map(math.isfinite, losses(run)))
    asked = "--data.init_args.predict_root FOLDER --data.init_args.question TEXT"
    assert f"litflora predict --adapter {run / 'adapter'} {asked}" in fit.out

    folder = ("--data.init_args.predict_root", tmp_path / "data")
    predict = ("predict", "--adapter", run / "adapter", *folder)
    refused = litflora(*predict)
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "predict_root and question go together" in refused.err
    told = litflora(*predict, "--data.init_args.question", "What is this?")
    assert told.code == 0, told.err


SCALED = {"vqa_rad": "VQA_RAD", "coco_captions": "coco"}
PHOTOS = {"vqa_rad": "VQA_RAD/VQA_RAD Image Folder", "coco_captions": "coco/val2017"}
FEW = ("--trainer.limit_test_batches=2", "--trainer.limit_predict_batches=2")


@pytest.mark.parametrize("name", SCALED)
def test_real_data_train_evaluate_and_predict(name, shared_data, tmp_path):
    """A tower of ImageNet, and a language model from scratch: nobody expects right answers."""
    model = {**MODEL, "tower": "vit_tiny_patch16_224", "tower_tuning": "litflora.adapters.FLoRA"}
    model["weights"] = shared_data / "weights" / "vit_tiny_patch16_224.safetensors"
    data = {"root": shared_data / SCALED[name], "batch_size": 4, "eval_batch_size": 4}
    data["num_workers"] = 0
    given = [f"--model.init_args.{key}={value}" for key, value in model.items()]
    given += [f"--data.init_args.{key}={value}" for key, value in data.items()]
    small = ("--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1")
    where = f"--trainer.default_root_dir={tmp_path}"
    recipe = ("--config", f"vision_language/{name}")
    fit = litflora("fit", *recipe, *given, *SMALL, *TRAINER, *small, where)
    assert fit.code == 0, fit.err
    run = tmp_path / "vision_language" / name / "version_0"
    assert all(map(math.isfinite, losses(run)))
    adapter = ("--adapter", run / "adapter", *SMALL[:-2], *FEW)
    test = litflora("test", *adapter)
    assert test.code == 0, test.err
    assert ("test/bleu" in test.out, "test/exact_closed" in test.out) == (
        name == "coco_captions",
        name == "vqa_rad",
    )
    asked = ("--data.init_args.question", "What is this?", where)
    folder = ("--data.init_args.predict_root", shared_data / PHOTOS[name])
    predict = litflora("predict", *adapter, *folder, *asked)
    assert predict.code == 0, predict.err
    (path,) = tmp_path.rglob("answers.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 8
    assert all(line["question"].startswith("What is this?") for line in lines)
    assert all(line["image"] == str(shared_data / PHOTOS[name] / line["id"]) for line in lines)


@pytest.mark.slow
def test_two_processes_train_on_images_and_texts(tmp_path):
    """A process that has texts alone runs the tower, too, or the other would wait for it."""
    given = arguments(tmp_path / "data", tmp_path)
    given = [each for each in given if each != "--trainer.accelerator"]
    parts = ("--config", "vision_language/llava", "--config", "trainer/ddp_cpu")
    fit = litflora_process("fit", *parts, *[each for each in given if each != "cpu"])
    assert fit.code == 0, fit.err
    assert all(map(math.isfinite, losses(tmp_path / "vision_language/llava/version_0")))
