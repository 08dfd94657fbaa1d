"""The command line: recipes by name, a run and what it leaves, `--adapter`, inspect, merge."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from shell import (
    BACKBONE,
    CLASSES,
    SIDE,
    SMALL,
    files_below,
    litflora,
    make_base,
    make_photos,
    photo_args,
)

from litflora.adapters.measured import device_name, forget
from litflora.commands.train import LitFloraCLI

RECIPE = "classification/image_folder_vit_tiny"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with photos, a base, and one finished fit in ``runs``."""
    folder = tmp_path_factory.mktemp("workshop")
    photos, base = make_photos(folder / "photos"), make_base(folder / "base.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fit = litflora("fit", "--config", RECIPE, *photo_args(photos, base), *SMALL)
    assert fit.code == 0, fit.err
    (folder / "said.txt").write_text(fit.out)
    return folder


@pytest.fixture
def adapter(workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    return workshop / "runs" / RECIPE / "version_0" / "adapter"


def test_a_run_leaves_exactly_these_files(workshop):
    run = workshop / "runs" / RECIPE / "version_0"
    assert files_below(run) == {
        "adapter",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "checkpoints",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "hparams.yaml",
        "metrics.csv",
    }


def test_a_fit_ends_by_saying_what_to_do_next(workshop):
    said = (workshop / "said.txt").read_text()
    folder = f"runs/{RECIPE}/version_0/adapter"
    for command in ("test --adapter", "predict --adapter", "merge"):
        assert f"litflora {command} {folder}" in said
    assert "before" in said
    assert "after" in said


def test_the_saved_config_runs_again_beside_the_first_run(workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    config = Path("runs", RECIPE, "version_0", "config.yaml")
    before = config.read_text()
    again = litflora("test", "--config", config)
    assert again.code == 0, again.err
    assert config.read_text() == before
    assert Path("runs", RECIPE, "version_1", "metrics.csv").is_file()


def test_test_needs_the_adapter_folder_alone(adapter, workshop):
    tested = litflora("test", "--adapter", adapter, *SMALL)
    assert tested.code == 0, tested.err
    run = workshop / "runs" / "test" / "version_0"
    assert {"confusion_matrix.png", "metrics.csv", "config.yaml"} <= files_below(run)
    header, values = list(csv.reader((run / "metrics.csv").open()))
    assert 0 <= float(values[header.index("test/acc")]) <= 1


def test_test_uses_the_trained_weights(adapter, workshop, monkeypatch):
    """A test of the adapter gives other numbers than one of the untuned base."""
    recipe = ["--config", RECIPE, *photo_args(workshop / "photos", workshop / "base.safetensors")]
    losses = []
    for args in (["--adapter", adapter], recipe):
        result = litflora("test", *args, *SMALL)
        losses.append(next(line for line in result.out.splitlines() if "test/loss" in line))
    assert losses[0] != losses[1]


def test_what_follows_adapter_overrides_it(adapter, tmp_path, capsys):
    other = make_photos(tmp_path / "other")
    result = litflora(
        "test", "--adapter", adapter, "--data.init_args.root", other, "--print_config"
    )
    assert result.code == 0, result.err
    assert f"root: {other}" in result.out
    assert f"adapter: {adapter}" in result.out


def test_predict_needs_no_classes_but_the_adapters(adapter, workshop):
    photos = workshop / "photos" / "test" / "bee"
    moved = ("--data.init_args.root", "gone", "--data.init_args.predict_root", photos)
    result = litflora("predict", "--adapter", adapter, *moved, *SMALL)
    assert result.code == 0, result.err
    rows = list(csv.reader((workshop / "runs/predict/version_0/predictions.csv").open()))
    assert rows[0] == ["path", "predicted", *CLASSES]
    assert {Path(row[0]).name for row in rows[1:]} == {f"{n}.jpg" for n in range(4)}


def test_merged_file_is_plain_timm_with_the_same_logits(adapter, workshop, tmp_path):
    from litflora.module import from_adapter

    merged = litflora("merge", adapter, "--out", tmp_path / "m.safetensors")
    assert merged.code == 0, merged.err
    assert files_below(tmp_path) == {"m.safetensors"}
    (tmp_path / "mine").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("m.safetensors", "mine")]
    assert modes[0] == modes[1]  # others may read it, as any file of mine
    state = load_file(tmp_path / "m.safetensors")
    call = f"timm.create_model({BACKBONE!r}, num_classes=3, img_size={SIDE})"
    assert call in merged.out
    plain = eval(call, {"timm": timm}).eval()
    plain.load_state_dict(state, strict=True)
    module = from_adapter(adapter)
    module.configure_model()
    images = torch.rand(4, 3, SIDE, SIDE)
    with torch.no_grad():
        expected = module.eval().net(images)
        found = plain(images)
    assert not torch.equal(
        state["blocks.0.mlp.fc1.weight"], load_file("base.safetensors")["blocks.0.mlp.fc1.weight"]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_tuning_without_deltas_merges_too(workshop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos, base = workshop / "photos", workshop / "base.safetensors"
    args = ("--config", RECIPE, "--config", "tuning/norm", *photo_args(photos, base), *SMALL)
    assert litflora("fit", *args).code == 0
    merged = litflora("merge", f"runs/{RECIPE}/version_0/adapter", "--out", "m.safetensors")
    assert merged.code == 0, merged.err
    state, before = load_file("m.safetensors"), load_file(base)
    assert not torch.equal(state["norm.weight"], before["norm.weight"])
    assert torch.equal(state["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])


def test_merge_takes_a_base_that_has_moved(adapter, workshop, tmp_path):
    moved = tmp_path / "moved.safetensors"
    (workshop / "base.safetensors").rename(moved)
    try:
        lost = litflora("merge", adapter, "--out", tmp_path / "m.safetensors")
        found = litflora("merge", adapter, "--out", tmp_path / "m.safetensors", "--weights", moved)
    finally:
        moved.rename(workshop / "base.safetensors")
    assert (lost.code, found.code) == (2, 0)
    assert "base.safetensors does not exist" in lost.err


def test_merge_overwrites_only_if_told(adapter, tmp_path):
    out = tmp_path / "m.safetensors"
    out.write_text("mine")
    refused = litflora("merge", adapter, "--out", out)
    assert refused.code == 2
    assert "--force" in refused.err
    assert out.read_text() == "mine"
    assert litflora("merge", adapter, "--out", out, "--force").code == 0
    assert load_file(out)


def test_inspect_shows_the_same_of_a_recipe_and_of_its_adapter(adapter, workshop):
    args = photo_args(workshop / "photos", workshop / "base.safetensors")
    recipe = litflora("inspect", RECIPE, *args)
    saved = litflora("inspect", adapter)
    assert (recipe.code, saved.code) == (0, 0), recipe.err + saved.err
    for said in (recipe.out, saved.out):
        assert "blocks.0.attn.qkv.weight" in said
        assert "saved for backward" in said
        assert "one batch of 4 images of 32 x 32 pixels" in said
    table = recipe.out.split("for one batch")[0]
    assert table in saved.out
    assert "adapter_model.safetensors" in saved.out


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn", "retinanet", "fcos"])
def test_inspect_shows_a_detector(detector):
    small = ("--model.head_width", 64, "--data.img_size", 64, "--data.batch_size", 1)
    options = ("--model.detector", detector, "--model.detector_options", "null")
    shown = litflora("inspect", "detection/shapes", *options, *small)
    assert shown.code == 0, shown.err
    assert "saved for backward" in shown.out
    assert "one batch of 1 images of 64 x 64 pixels" in shown.out


def test_calibrate_times_a_detector(tmp_path, monkeypatch):
    monkeypatch.setenv("LITFLORA_PATHS", str(tmp_path / "paths.json"))
    forget()
    small = ("--model.head_width", 16, "--data.img_size", 64, "--data.batch_size", 1)
    told = litflora("calibrate", "detection/shapes", *small, "--trainer.accelerator", "cpu")
    forget()
    assert told.code == 0, told.err
    assert "for batches of 1 images" in told.out


def test_inspect_fetches_nothing_and_names_what_trains_in_place(monkeypatch):
    def offline(*args, **kwargs):
        raise AssertionError("weights were fetched")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    shown = litflora(
        "inspect", "quickstart", "--model.tuning", "BitFit", "--model.weights", "pretrained"
    )
    assert shown.code == 0, shown.err
    assert "trained in place: stem.0.bias" in shown.out


def test_the_folder_of_a_run_is_not_its_adapter(adapter):
    assert litflora("inspect", adapter.parent).err.strip().endswith(f"Did you mean {adapter}?")


def test_inspect_follows_overrides_and_writes_nothing(workshop, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = photo_args(workshop / "photos", workshop / "base.safetensors")
    shown = litflora("inspect", RECIPE, *args, "--config", "tuning/lora")
    assert "[peft]" not in shown.out
    assert litflora("inspect", RECIPE, *args, "--config", "tuning/probe").out.startswith(
        "trainable"
    )
    assert files_below(tmp_path) == set()


@pytest.fixture
def calibrate(workshop, tmp_path, monkeypatch):
    """Runs `litflora calibrate` on the recipe, with a file of timed paths of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITFLORA_PATHS", str(tmp_path / "paths.json"))
    forget()
    args = [*photo_args(workshop / "photos", workshop / "base.safetensors"), *SMALL]
    yield lambda *more, command="calibrate": litflora(command, RECIPE, *args, *more)
    forget()


def test_calibrate_times_a_recipe_and_inspect_follows(calibrate, tmp_path):
    told = calibrate("--trainer.precision", "32-true")
    assert told.code == 0, told.err
    file = tmp_path / "paths.json"
    assert f"{file}: every fit on this device follows it" in told.out
    timed = json.loads(file.read_text())
    (weights,) = timed.values()
    assert list(timed) == [f"{device_name(torch.device('cpu'))}, torch {torch.__version__}"]
    assert all(key in told.out for key in weights)
    for rows in weights.values():
        rows.update(dict.fromkeys(rows, "merged"))
    file.write_text(json.dumps(timed))
    forget()
    shown = calibrate(command="inspect").out
    assert re.search(
        rf"^\d+ paths as `litflora calibrate` timed them: {file}$", shown, re.MULTILINE
    )
    assert re.search(r"qkv\.weight .* merged$", shown, re.MULTILINE)
    file.unlink()
    assert files_below(tmp_path) == set()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", "bfloat16"), ("bf16", "bfloat16"), ("32", "float32"), ("64-true", "float64")],
)
def test_calibrate_computes_as_the_fit_does(calibrate, precision, dtype):
    told = calibrate("--trainer.precision", precision)
    assert set(re.findall(r"rank \d+ (\w+)", told.out)) == {dtype}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--config", "tuning/probe"), "there is nothing to time"),
        (("--trainer.precision", "bf16-true"), "half precision"),
        (("--model.tuning.init_args.dropout", "0.1"), "there is nothing to time"),
    ],
)
def test_calibrate_says_why_it_times_nothing(calibrate, tmp_path, more, message):
    told = calibrate(*more)
    assert told.code == 2
    assert message in told.err
    assert files_below(tmp_path) == set()


def test_calibrate_takes_no_adapter(adapter):
    told = litflora("calibrate", adapter)
    assert told.code == 2
    assert "is a folder: give a recipe" in told.err


def test_a_reader_who_has_seen_enough_gets_no_error():
    command = f"{sys.executable} -m litflora recipes | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("quickstart\n", "")


def test_inspect_takes_other_weights_anywhere(adapter, workshop, tmp_path):
    other = make_base(tmp_path / "other.safetensors", seed=1)
    told = litflora("inspect", "--weights", other, adapter)
    assert told.code == 2
    assert told.err == litflora("inspect", adapter, "--weights", other).err
    args = photo_args(workshop / "photos", workshop / "gone.safetensors")
    assert litflora("inspect", RECIPE, "--weights", other, *args).code == 0
    assert "leave out --a" in litflora("inspect", adapter, "--a").err


def test_recipes_lists_what_each_is_and_its_command():
    listed = litflora("recipes").out
    assert listed == litflora("recipes", "list").out
    assert listed.startswith("quickstart\n")
    assert "litflora fit --config quickstart\n" in listed


def test_recipes_copy_never_overwrites_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert litflora("recipes", "copy", "tuning/flora").code == 0
    assert Path("flora.yaml").read_text() == litflora("recipes", "show", "tuning/flora").out
    Path("flora.yaml").write_text("mine")
    refused = litflora("recipes", "copy", "tuning/flora")
    assert (refused.code, Path("flora.yaml").read_text()) == (2, "mine")
    assert litflora("recipes", "copy", "tuning/flora", "--force").code == 0
    assert litflora("recipes", "copy", "tuning/lora", "other.yaml").code == 0
    assert files_below(tmp_path) == {"flora.yaml", "other.yaml"}


def test_a_file_goes_before_a_recipe_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text(litflora("recipes", "show", "classification/shapes").out)
    printed = litflora("fit", "--config", "quickstart", "--print_config").out
    assert "max_epochs: 8" in printed


def test_interpolation_crosses_files_and_follows_overrides(tmp_path):
    extra = tmp_path / "extra.yaml"
    extra.write_text("model: {init_args: {label_smoothing: '${trainer.gradient_clip_val}'}}")
    args = ("--config", "quickstart", "--config", extra, "--trainer.gradient_clip_val", "0.25")
    assert "label_smoothing: 0.25" in litflora("fit", *args, "--print_config").out


def test_short_class_names_are_known():
    tuning = "tuning: {class_path: LoRA}"
    model = f"class_path: ClassificationModule, init_args: {{backbone: test_vit, {tuning}}}"
    short = f"{{model: {{{model}}}, data: ShapesDataModule}}"
    printed = litflora("fit", "--config", short, "--print_config")
    assert printed.code == 0, printed.err
    assert "LoRA" in printed.out


@pytest.mark.parametrize("args", [["--help"], ["recipes"], ["--version"], ["merge", "--help"]])
def test_light_commands_load_no_torch(args):
    code = (
        "import sys; from litflora.cli import main\n"
        f"try: main({args!r})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'timm', 'jsonargparse'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_help_names_every_command():
    said = litflora("--help").out
    for command in ("fit", "validate", "test", "predict", "recipes", "inspect", "merge"):
        assert f"    {command} " in said


def test_help_of_fit_and_test_name_their_options():
    assert "--adapter" in litflora("test", "--help").out
    fit = litflora("fit", "--help").out
    assert "--adapter" not in fit
    assert "recipe" in fit


def test_debug_raises_what_is_otherwise_told():
    with pytest.raises(FileNotFoundError, match="quickstrt"):
        litflora("fit", "--config", "quickstrt", "--debug")


def test_python_m_litflora_is_litflora():
    done = subprocess.run(
        [sys.executable, "-m", "litflora", "--version"], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("litflora ")


def test_predictions_are_not_kept_once_they_are_written(adapter):
    ran = LitFloraCLI("predict", ["--adapter", str(adapter), *SMALL])
    assert not ran.trainer.predict_loop.return_predictions


def test_adapter_of_another_library_says_what_is_missing(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    told = litflora("test", "--adapter", tmp_path)
    assert told.code == 2
    assert len(told.err.splitlines()) <= 3
