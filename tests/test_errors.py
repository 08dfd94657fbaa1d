"""A person's mistake gives at most three lines that say what would be right, and writes nothing."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversation_files import record, records, write_llava
from shell import (
    CLASSES,
    SMALL,
    files_below,
    litflora,
    make_base,
    make_photos,
    photo_args,
)

RECIPE = "classification/image_folder_vit_tiny"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Photos, a base and an adapter of it, which no test changes."""
    folder = tmp_path_factory.mktemp("made")
    photos, base = make_photos(folder / "photos"), make_base(folder / "base.safetensors")
    make_base(folder / "other.safetensors", seed=1)
    runs = ("--trainer.default_root_dir", folder)
    fit = litflora("fit", "--config", RECIPE, *photo_args(photos, base), *SMALL, *runs)
    assert fit.code == 0, fit.err
    (folder / RECIPE / "version_0" / "adapter").rename(folder / "adapter")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(made, *args):
    photos, base = made / "photos", made / "base.safetensors"
    return litflora("fit", "--config", RECIPE, *photo_args(photos, base), *SMALL, *args)


def assert_told(result, *parts):
    """The result is a mistake that was told well, and told with these parts."""
    assert result.code == 2, result.err
    lines = result.err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 3, result.err
    assert "Traceback" not in result.err
    assert "usage:" not in result.err
    for part in parts:
        assert part in result.err


# In a YAML file: what stands in it, and what is said of it.
IN_YAML = {
    "key of the model": ("model: {init_args: {bakbone: x}}", "'bakbone'", "'backbone'"),
    "key of the tuning": (
        "model: {init_args: {tuning: {init_args: {rnk: 4}}}}",
        "model.init_args.tuning.init_args",
        "'rnk'",
        "'rank'",
    ),
    "key of the data": ("data: {init_args: {rot: x}}", "'rot'", "'root'"),
    "key of the trainer": (
        "trainer: {max_epoch: 1}",
        "'trainer.max_epoch'",
        "'trainer.max_epochs'",
    ),
    "key of the optimizer": (
        "model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lrr: 1}}}}",
        "AdamW",
        "'lr'",
    ),
    "key at the top": ("trainr: {max_epochs: 1}", "'trainr.max_epochs'", "'trainer.max_epochs'"),
    "class": (
        "model: {init_args: {tuning: {class_path: litflora.adapters.Flora}}}",
        "no Flora in litflora.adapters",
        "'FLoRA'",
    ),
    "short class": ("model: {init_args: {tuning: Flora}}", "no class 'Flora'", "'FLoRA'"),
    "other kind of class": (
        "model: {init_args: {tuning: {class_path: torch.nn.Linear}}}",
        "torch.nn.Linear",
        "Tuning",
    ),
    "type of a number": ("trainer: {max_epochs: three}", "expected int", "'three'"),
    "type inside the tuning": (
        "model: {init_args: {tuning: {init_args: {spatial_rank: many}}}}",
        "tuning.init_args.spatial_rank: expected int or list[int], got 'many'",
    ),
    "syntax": ("model:\n  a: 1\n b: 2\n", "not valid YAML at line 3"),
    "no mapping": ("- model\n", "trainer, model and data"),
    "interpolation": ("model: {init_args: {backbone: '${nowhere}'}}", "nowhere"),
    "rank 0": ("model: {init_args: {tuning: {init_args: {rank: 0}}}}", "rank", "at least 1", "0"),
    "unknown backbone": ("model: {init_args: {backbone: tset_vit}}", "'tset_vit'", "'test_vit'"),
    "one target of two that matches nothing": (
        "model: {init_args: {tuning: {init_args: {targets: ['*.fc1', '*.fc9']}}}}",
        "*.fc9",
        "fc2",
    ),
    "a callback twice": (
        "trainer: {callbacks: [litflora.callbacks.LISA, litflora.callbacks.LISA]}",
        "trainer.callbacks has LISA twice",
    ),
    "missing data root": ("data: {init_args: {root: nowhere}}", "nowhere", "train/<class>"),
    "missing weights": ("model: {init_args: {weights: no.pth}}", "no.pth", "does not exist"),
    "weights of another backbone": (
        "model: {init_args: {backbone: test_convnext}}",
        "test_convnext",
    ),
    "size that the backbone cannot take": ("model: {init_args: {img_size: 30}}", "30", "32"),
    "empty batches": ("data: {init_args: {batch_size: 0}}", "batch_size", "at least 1", "0"),
    "fewer than no workers": ("data: {init_args: {num_workers: -1}}", "num_workers", "at least 0"),
    "no pixels": ("data: {init_args: {img_size: 0}}", "img_size", "at least 1"),
    "rate below zero": (
        "model: {init_args: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: -1}}}}",
        "optimizer",
        "-1",
    ),
    "head rate below zero": ("model: {init_args: {head_lr: -1}}", "head_lr", "-1"),
    "layer decay": ("model: {init_args: {layer_decay: 5}}", "layer_decay", "(0, 1]"),
    "smoothing": ("model: {init_args: {label_smoothing: 2}}", "label_smoothing", "[0, 1)"),
    "class weights": (
        "model: {init_args: {class_weights: [.nan, 1, 1]}}",
        "class_weights",
        "finite",
    ),
    "tuning that is no method": (
        "model: {init_args: {tuning: {class_path: litflora.adapters.DeltaTuning}}}",
        "FLoRA",
    ),
    "missing checkpoint": ("ckpt_path: no.ckpt", "no checkpoint file no.ckpt"),
    "unknown accelerator": ("trainer: {accelerator: gpuu}", "gpuu"),
}


def test_short_names_of_options_are_told_in_full(here):
    told = {
        ("--rank", "4"): "'model.init_args.tuning.init_args.rank'",
        ("--tuning", "LoRA"): "'model.init_args.tuning'",
        ("--batch_size", "4"): "'data.init_args.batch_size'",
        ("--trainer.max_epoch", "4"): "'trainer.max_epochs'",
    }
    told["--model.optimizer.lr", "1"] = "as in --model.init_args.optimizer AdamW"
    for option, full in told.items():
        assert_told(litflora("fit", "--config", "quickstart", *option), full)


def test_a_checkpoint_of_weights_alone_can_be_tested(made, here):
    assert fit(made).code == 0
    (whole,) = here.rglob("last.ckpt")
    checkpoint = torch.load(whole, weights_only=True)
    for key in ("loops", "optimizer_states", "lr_schedulers"):
        del checkpoint[key]
    torch.save(checkpoint, "weights.ckpt")
    photos = photo_args(made / "photos", made / "base.safetensors")
    words = ("test", "--config", RECIPE, *photos, *SMALL[:-2], "--ckpt_path", "weights.ckpt")
    tested = litflora(*words)
    assert tested.code == 0, tested.err


def test_no_recipe_points_to_recipes_and_adapters(here):
    assert_told(litflora("test"), "--config quickstart", "litflora recipes", "--adapter")


def test_the_last_checkpoint_is_one_of_this_recipe(made, here):
    assert_told(fit(made, "--ckpt_path", "last"), "no checkpoint", "image_folder_vit_tiny")
    first = fit(made)
    assert "9 train, 3 val images of 3 classes: ant, bee, cat" in first.out
    assert_told(fit(made, "--ckpt_path", "last"), "has had 1 epochs", "trainer.max_epochs")
    longer = fit(made, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert longer.code == 0, longer.err
    assert {path.name for path in here.glob(f"runs/{RECIPE}/*")} == {"version_0", "version_1"}
    (last,) = here.glob(f"runs/{RECIPE}/version_1/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("name", IN_YAML)
def test_mistake_in_yaml(name, made, here):
    text, *parts = IN_YAML[name]
    Path("mine.yaml").write_text(text)
    result = fit(made, "--config", "mine.yaml")
    assert_told(result, *parts)
    assert files_below(here) == {"mine.yaml"}


def test_a_recipe_that_is_no_text(made, here):
    Path("mine.yaml").write_bytes("# pr\u00fcfung".encode("latin-1"))
    assert_told(fit(made, "--config", "mine.yaml"), "mine.yaml", "UTF-8")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 torn"])
def test_a_torn_checkpoint(content, made, here):
    Path("torn.ckpt").write_bytes(content)
    assert_told(fit(made, "--ckpt_path", "torn.ckpt"), "torn.ckpt", "damaged")
    assert files_below(here) == {"torn.ckpt"}


def test_a_run_folder_that_cannot_be(made, here):
    Path("runs").write_text("mine")
    assert_told(fit(made), "runs", "trainer.default_root_dir")
    assert Path("runs").read_text() == "mine"


def test_a_base_file_that_is_no_state_dict(made, here):
    Path("text.pth").write_text("hello world")
    result = fit(made, "--model.init_args.weights", "text.pth")
    assert_told(result, "text.pth", "cannot be read")
    assert files_below(here) == {"text.pth"}


def test_a_checkpoint_of_another_tuning_does_not_win(made, here):
    """Lightning would take the checkpoint's settings for the person's, without a word."""
    photos, base = made / "photos", made / "base.safetensors"
    lora = (*photo_args(photos, base), *SMALL)
    assert litflora("fit", "--config", RECIPE, "--config", "tuning/lora", *lora).code == 0
    (checkpoint,) = Path("runs").rglob("last.ckpt")
    result = fit(made, "--ckpt_path", checkpoint, "--trainer.max_epochs", "2")
    assert_told(result, "another backbone, tuning or number of classes")


def test_the_file_with_the_mistake_is_named(made, here):
    Path("mine.yaml").write_text("model: {init_args: {bakbone: x}}")
    assert "in mine.yaml" in fit(made, "--config", "mine.yaml").err


# On the command line: the options, and what is said of them.
ON_LINE = {
    "key": (["--model.init_args.bakbone", "x"], "'bakbone'", "'backbone'"),
    "short form of a key": (["--trainer.max_epoc", "1"], "'trainer.max_epochs'"),
    "unknown option": (["--foo"], "'foo'", "trainer, model, data"),
    "recipe": (["--config", "tuning/flra"], "'tuning/flra'", "tuning/flora"),
    "recipe by its last part": (
        ["--config", "cifar10_vit_tiny"],
        "classification/cifar10_vit_tiny",
    ),
    "config file": (["--config", "mine.yaml"], "'mine.yaml'", "litflora recipes"),
}


@pytest.mark.parametrize("name", ON_LINE)
def test_mistake_on_the_command_line(name, made, here):
    args, *parts = ON_LINE[name]
    assert_told(fit(made, *args), *parts)
    assert files_below(here) == set()


def test_no_recipe_at_all(here):
    assert_told(litflora("fit"), "--config quickstart", "litflora recipes")


def test_unknown_command():
    assert_told(litflora("fti"), "'fit'")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("check", ["true", "false"])
def test_corrupt_jpeg(check, workers, made, here, tmp_path_factory):
    """Found before training if checked, else when it is loaded."""
    photos = make_photos(tmp_path_factory.mktemp("photos"))
    broken = photos / "train" / "bee" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    options = ("--data.init_args.check_images", check, "--data.init_args.num_workers", workers)
    result = fit(made, "--data.init_args.root", photos, *options)
    assert_told(result, str(broken), "replace or remove")
    assert files_below(here) == set()


def test_a_run_that_has_a_checkpoint_is_kept(made, here, tmp_path_factory, monkeypatch):
    """A mistake that shows after hours must not cost them."""
    from litflora.classification import ClassificationModule

    def fail(self):
        if self.current_epoch == 1:
            raise FileNotFoundError("a photo has gone: put it back")

    monkeypatch.setattr(ClassificationModule, "on_train_epoch_start", fail)
    fail.__globals__["__name__"], own = "litflora.test", __name__
    try:
        result = fit(made, "--trainer.max_epochs", "2")
    finally:
        fail.__globals__["__name__"] = own
    assert_told(result, "a photo has gone")
    assert list(here.rglob("*.ckpt"))


def test_a_failed_start_touches_no_earlier_run(made, here):
    earlier = ("--trainer.logger.init_args.name", "mine", "--trainer.logger.init_args.version", "a")
    assert fit(made, *earlier).code == 0
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    assert_told(fit(made, *earlier), "holds an earlier run")
    assert fit(made, "--model.init_args.weights", "no.pth").code == 2
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }


def test_adapter_for_another_base(made, here):
    other = ("--model.init_args.weights", made / "other.safetensors")
    assert_told(litflora("test", "--adapter", made / "adapter", *other, *SMALL), "base")
    merge = ("merge", made / "adapter", "--out", "m.safetensors")
    assert_told(litflora(*merge, "--weights", made / "other.safetensors"), "base")
    assert_told(litflora("merge", made / "adapter", "--out", ""), "--out", "no file name")
    assert files_below(here) == set()


def test_seven_classes_against_an_adapter_for_three(made, here, tmp_path_factory):
    photos = make_photos(tmp_path_factory.mktemp("photos"), tuple("abcdefg"), count=1)
    result = litflora(
        "test", "--adapter", made / "adapter", "--data.init_args.root", photos, *SMALL
    )
    assert_told(result, "3 classes", "7 classes", CLASSES[0])
    assert files_below(here) == set()


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flipped(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 0xFF
    path.write_bytes(data)


def _retold(path):
    config = json.loads(path.read_text())
    config["metadata"]["class_names"] = list(reversed(CLASSES))
    path.write_text(json.dumps(config))


def _cut_short(path):
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("adapter_model.safetensors", _truncated),
        ("adapter_model.safetensors", _flipped),
        ("adapter_model.safetensors", os.unlink),
        ("adapter_config.json", _retold),
        ("adapter_config.json", _cut_short),
        ("adapter_config.json", os.unlink),
    ],
)
@pytest.mark.parametrize("command", ["test", "merge", "inspect"])
def test_damaged_adapter(command, file, damage, made, here, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for each in (made / "adapter").iterdir():
        (copy / each.name).write_bytes(each.read_bytes())
    damage(copy / file)
    args = {
        "test": ["--adapter", copy, *SMALL],
        "merge": [copy, "--out", "m.safetensors"],
        "inspect": [copy],
    }
    assert_told(litflora(command, *args[command]), str(copy))
    assert files_below(here) == set()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "error: cannot write or read, No space left on device: x.png"),
        (errno.EACCES, "error: cannot write or read, Permission denied: x.png"),
    ],
)
def test_a_full_disk_is_no_bug(made, here, monkeypatch, code, said):
    def full(*args, **kwargs):
        raise OSError(code, os.strerror(code), "x.png")

    monkeypatch.setattr("timm.create_model", full)
    assert_told(fit(made), said)


def test_bugs_keep_their_traceback(made, here, monkeypatch):
    from litflora.classification import ClassificationModule

    def bug(*args):
        return {}["gone"]

    monkeypatch.setattr(ClassificationModule, "training_step", bug)
    with pytest.raises(KeyError, match="gone"):
        fit(made)


def test_values_that_only_torch_refuses_are_bugs(made, here, monkeypatch):
    import torch

    from litflora.classification import ClassificationModule

    monkeypatch.setattr(ClassificationModule, "training_step", lambda *_: torch.optim.SGD([], 0.1))
    with pytest.raises(ValueError, match="empty parameter list"):
        fit(made)


def test_a_process_of_its_own_says_no_more(made, here):
    """What Lightning and its warnings say of a run does not drown the mistake."""
    recipe = ["fit", "--config", RECIPE, *photo_args(made / "photos", made / "base.safetensors")]
    mistake = ["--model.init_args.tuning.init_args.targets", "nothing_like_it"]
    done = subprocess.run(
        [sys.executable, "-m", "litflora", *recipe, *mistake, *SMALL],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) <= 3, done.stderr
    assert "nothing_like_it" in done.stderr
    assert files_below(here) == set()


def turns(*said):
    return [{"from": who, "value": text} for who, text in said]


ASKED = ("human", "<image> What is it?")
CONVERSATIONS = {
    "nobody answers": (turns(ASKED), "conversation 9 has no assistant turn"),
    "more marks": (turns(("human", "<image><image>"), ("gpt", "It.")), "2 <image> in its text"),
    "unknown role": (turns(ASKED, ("robot", "It.")), "from 'robot' is none of human"),
    "bad image": (turns(ASKED, ("gpt", "It.")), "9.jpg"),
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_a_mistake_in_conversations(kind, here, tmp_path_factory):
    told, said = CONVERSATIONS[kind]
    image = "9.jpg" if kind == "bad image" else "1.jpg"
    wrong = record(9, image, conversations=told)
    root = write_llava(tmp_path_factory.mktemp("data"), [*records(), wrong])
    small = {"tower": "test_vit", "weights": "null", "language_model": "tiny"}
    small |= {"layer": -1, "img_size": 32, "language_tuning": "litflora.adapters.Full"}
    options = [f"--model.init_args.{key}={value}" for key, value in small.items()]
    given = ("--config", "vision_language/llava", *options, "--data.init_args.root", root)
    result = litflora("fit", *given, *SMALL)
    assert_told(result, said, "conversation 9")
    assert not files_below(here)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_length_that_no_conversation_has(workers, here, tmp_path_factory):
    root = write_llava(tmp_path_factory.mktemp("data"))
    short = ("--model.img_size", 64, "--model.max_length", 20, "--data.num_workers", workers)
    given = ("--config", "vision_language/shapes", "--config", "data/llava", "--data.root", root)
    result = litflora("fit", *given, *short, "--trainer.max_epochs", 1)
    assert_told(result, "within max_length 20", "raise it, or leave it out")
