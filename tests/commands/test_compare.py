"""`litflora compare`: what it runs, how it chooses, what it leaves, and when it refuses."""

import csv
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
from html import escape
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from markup import Reader
from safetensors.torch import load_file, save_file
from shell import files_below, litflora, make_base, make_photos, photo_args

from litflora.adapters import AdapterError, FLoRA, LoRA
from litflora.callbacks import Interruption
from litflora.commands import run_lock
from litflora.commands.compare import (
    axes,
    bar,
    data,
    equal,
    folder,
    kept,
    limits,
    plan,
    running,
    versions,
)
from litflora.commands.compare.choosing import Score, choose
from litflora.commands.compare.class_accuracy import ClassAccuracy

TINY = {
    "--data.train_samples": 20,
    "--data.val_samples": 10,
    "--data.test_samples": 12,
    "--data.batch_size": 10,
    "--data.img_size": 32,
    "--trainer.max_epochs": 2,
    "--trainer.accelerator": "cpu",
}
OPTIONS = [word for key, value in TINY.items() for word in (key, value)]


def compare(out, *axes):
    return litflora("compare", "quickstart", *axes, "--out", out, *OPTIONS)


def rows_of(out):
    with (out / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


AXES = ["--tunings", "FLoRA", "tuning/probe", "--ranks", 2, "--seeds", 1]
AXES += ["--lrs", "1e-3", "5e-2", "tuning/probe=1e-2"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished compare: FLoRA at two rates, and probing, which has no rank."""
    out = tmp_path_factory.mktemp("compare") / "out"
    told = compare(out, *AXES)
    assert told.code == 0, told.err
    return out, told


def test_there_is_a_row_for_each_run(done):
    out, told = done
    rows = rows_of(out)
    axes = [(row["tuning"], row["rank"], row["lr"], row["seed"]) for row in rows]
    flora = [("FLoRA", "2", lr, "1") for lr in ("0.001", "0.05")]
    assert axes == [*flora, ("tuning/probe", "", "0.01", "1")]
    assert all(row["val/acc"] and float(row["seconds"]) > 0 for row in rows)
    assert [bool(row["test/acc"]) for row in rows] == [row["chosen"] == "1" for row in rows]
    assert sum(row["chosen"] == "1" for row in rows) == 2
    parameters = {row["tuning"]: int(row["parameters"]) for row in rows}
    assert parameters["tuning/probe"] < parameters["FLoRA"]
    assert int(rows[0]["saved_bytes"]) > int(rows[-1]["saved_bytes"]) > 0
    assert "3 runs, 0 found done" in told.out
    assert "more found" not in told.out
    assert told.out.startswith("data     20 train, 10 validate, 12 test\nwarning: only 10 validate")
    assert "FLoRA-r2-lr0.05-seed1: val/acc" in told.err


def test_the_files_that_are_left(done):
    out, _ = done
    tops = {path.name for path in out.iterdir()}
    assert tops == {"compare.txt", "report.html", "results.csv", "results.md", "runs"}
    run = out / next(row["folder"] for row in rows_of(out) if row["chosen"] == "1")
    kept = files_below(run)
    assert {"fit.json", "test.json", "log.txt", "metrics.csv", "test/class_accuracy.csv"} <= kept
    assert "adapter/adapter_model.safetensors" in kept
    assert not any(name.endswith(".ckpt") for name in kept)
    table = (out / "results.md").read_text().splitlines()
    said = table[5]
    assert said.startswith("Figures are of one seed. Rates are chosen by validation alone. Tries")
    assert "one rate only for tuning/probe; 2 rates for FLoRA." in said
    assert table[7].startswith("    litflora compare quickstart --tunings FLoRA tuning/probe ")
    assert f"    litflora test --adapter {run / 'adapter'}" in table
    assert table[0].startswith("| tuning | test/acc | val/acc | lr | parameters |")


def test_the_command_of_a_row_makes_the_same_run(done, tmp_path, monkeypatch):
    out, _ = done
    row = rows_of(out)[1]
    monkeypatch.chdir(tmp_path)
    again = litflora(*shlex.split(row["command"])[1:])
    assert again.code == 0, again.err
    there, here = (
        load_file(next(root.rglob("adapter_model.safetensors")))
        for root in (out / row["folder"], tmp_path)
    )
    assert there.keys() == here.keys()
    assert all(there[key].equal(here[key]) for key in there)


def test_a_finished_compare_runs_nothing(done, monkeypatch):
    out, _ = done
    before = (out / "results.csv").read_text()
    monkeypatch.setattr(running.train, "run", lambda *_: pytest.fail("a run was repeated"))
    told = compare(out, *AXES)
    assert told.code == 0, told.err
    assert "3 runs, 3 found done" in told.out
    assert (out / "results.csv").read_text() == before


# Runs that are played ---------------------------------------------------------------------------


class Played:
    """Stands for `train.run`: gives planted metrics by learning rate."""

    def __init__(self, val, test, stop_at=None, fails=(), diverges=(), callbacks=(), unreadable=0):
        self.val, self.test, self.stop_at, self.unreadable = val, test, stop_at, unreadable
        self.fails, self.diverges, self.callbacks = fails, diverges, callbacks
        self.calls = []

    def __call__(self, command, args, watching):
        rate = float(args[args.index("--model.lr") + 1])
        self.calls.append((command, rate, int(args[args.index("--seed_everything") + 1])))
        if self.stop_at == len(self.calls):
            raise KeyboardInterrupt
        if rate in self.fails:
            raise RuntimeError(f"no good at {rate}")
        if rate in self.diverges:
            raise FloatingPointError("loss or gradients were not finite")
        if command == "fit":
            keep_adapter(Path(json.loads(args[-1])["trainer"]["default_root_dir"], "adapter"))
        elif self.unreadable:
            self.unreadable -= 1
            raise AdapterError("checksums differ")
        planted = {"val/acc": self.val.get(rate), "test/acc": self.test.get(rate)}
        found = {name: value for name, value in planted.items() if value is not None}
        trainer = SimpleNamespace(
            callback_metrics=found, checkpoint_callbacks=[], callbacks=self.callbacks
        )
        return SimpleNamespace(model=SimpleNamespace(monitor="val/acc"), trainer=trainer)


def keep_adapter(folder):
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(9)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


@pytest.fixture
def play(monkeypatch):
    def replace(*args, **kwargs):
        played = Played(*args, **kwargs)
        monkeypatch.setattr(running.train, "run", played)
        monkeypatch.setattr(bar.gc, "collect", lambda: 0)  # no Trainer is left behind
        return played

    return replace


LORA = ("--tunings", "LoRA", "--lrs", "1e-3", "1e-2", "--seeds", 3, 4)
VAL, TEST = {0.001: 0.5, 0.01: 0.7}, {0.001: 0.9, 0.01: 0.1}


def test_the_rate_is_chosen_by_validation_and_no_other_is_tested(play, tmp_path):
    played = play(VAL, TEST)
    assert compare(tmp_path / "out", *LORA).code == 0
    tests = [call[1:] for call in played.calls if call[0] == "test"]
    assert tests == [(0.01, 3), (0.01, 4)]  # though 0.001 would have been better there
    assert {row["test/acc"] for row in rows_of(tmp_path / "out")} == {"", "0.1"}


def test_a_compare_that_was_killed_goes_on_where_it_was(play, tmp_path):
    first = play(VAL, TEST, stop_at=3)
    told = compare(tmp_path / "out", *LORA)
    assert told.code == 130
    assert "\nstopped  2 of 4 runs done; the same command goes on\nreport   " in told.out
    assert len(rows_of(tmp_path / "out")) == 4  # what is known so far is written
    second = play(VAL, TEST)
    told = compare(tmp_path / "out", *LORA)
    assert told.code == 0, told.err
    assert "4 runs, 2 found done" in told.out
    assert [*first.calls[:2], *second.calls] == [
        *(("fit", rate, seed) for seed in (3, 4) for rate in (0.001, 0.01)),
        *(("test", 0.01, seed) for seed in (3, 4)),
    ]


def test_a_failed_run_stops_no_other_and_is_tried_again(play, tmp_path):
    play(VAL, TEST, fails=[0.01])
    told = compare(tmp_path / "out", *LORA)
    assert told.code == 2
    assert "2 runs have failed: the same command tries them again" in told.err
    rows = rows_of(tmp_path / "out")
    assert [row["failed"] for row in rows] == ["", ""] + 2 * ["RuntimeError: no good at 0.01"]
    assert [row["chosen"] for row in rows] == ["1", "1", "0", "0"]
    assert "no good at 0.01" in (tmp_path / "out" / "report.html").read_text()
    assert "no good at 0.01" in (tmp_path / "out" / rows[2]["folder"] / "log.txt").read_text()
    again = play(VAL, TEST)
    assert compare(tmp_path / "out", *LORA).code == 0
    assert [call[:2] for call in again.calls] == 2 * [("fit", 0.01)] + 2 * [("test", 0.01)]


def test_what_is_new_alone_is_run(play, tmp_path):
    play(VAL, TEST)
    assert compare(tmp_path / "out", *LORA).code == 0
    seeds = play(VAL, TEST)
    assert compare(tmp_path / "out", *LORA, 5).code == 0
    assert {seed for _, _, seed in seeds.calls} == {5}
    other = play(VAL, TEST)
    more = ["--data.domain", "source"]
    told = litflora("compare", "quickstart", *LORA, "--out", tmp_path / "out", *OPTIONS, *more)
    assert "4 runs, 0 found done" in told.out
    assert "4 more found with other options, data, libraries or device: kept" in told.out
    assert len(other.calls) == 6


def test_without_rates_each_tuning_has_its_own(play, tmp_path):
    played = play({0.005: 0.5, 0.001: 0.5}, {0.005: 0.5, 0.001: 0.5})
    told = compare(tmp_path / "out", "--tunings", "FLoRA", "LoRA", "--ranks", 2, 8)
    assert told.code == 0, told.err
    assert [call[1] for call in played.calls if call[0] == "fit"] == [0.005, 0.005, 0.001, 0.001]


def test_two_at_once_are_refused(play, tmp_path):
    play(VAL, TEST)
    with run_lock.released():
        folder.take(tmp_path / "out", "quickstart")
        with run_lock.released():  # that of a run within lets go of none but its own
            pass
        told = compare(tmp_path / "out", *LORA)
    assert told.code == 2
    assert "is being written by another compare" in told.err
    folder.take(tmp_path / "out", "quickstart")  # which is free again


# What may go wrong in the middle -----------------------------------------------------------------


ONE_RATE = ("--tunings", "LoRA", "--lrs", "1e-3", "--seeds", 3, 4)


def test_a_value_that_is_no_number_is_a_result(play, tmp_path):
    played = play({0.001: 0.5, 0.01: math.nan}, {0.001: math.inf})
    told = compare(tmp_path / "out", *LORA)
    assert told.code == 0, told.err
    assert [call[1] for call in played.calls if call[0] == "test"] == [0.001, 0.001]
    assert "| nan | 0.5000 ± 0.0000 | 0.001 |" in (tmp_path / "out" / "results.md").read_text()
    assert "<td>nan</td>" in (tmp_path / "out" / "report.html").read_text()


def test_a_rate_that_diverges_is_a_result_and_not_tried_again(play, tmp_path):
    play(VAL, TEST, diverges=[0.01])
    told = compare(tmp_path / "out", *LORA)
    assert told.code == 0, told.err
    assert "LoRA-r8-lr0.01-seed3: val/acc nan after" in told.err
    rows = rows_of(tmp_path / "out")
    assert [row["val/acc"] for row in rows] == ["0.5", "0.5", "nan", "nan"]
    assert [row["chosen"] for row in rows] == ["1", "1", "0", "0"]
    again = play(VAL, TEST)
    assert compare(tmp_path / "out", *LORA).code == 0
    assert not again.calls


def test_a_test_that_logs_nothing_is_told(play, tmp_path):
    play({0.001: 0.5}, {})
    told = compare(tmp_path / "out", *ONE_RATE)
    assert told.code == 2
    assert "failed: no test/acc was logged: a compare needs a test" in told.err


def test_nothing_is_chosen_before_all_rates_have_run(play, tmp_path):
    play(VAL, TEST, stop_at=4)
    assert compare(tmp_path / "out", *LORA).code == 130
    assert {row["chosen"] for row in rows_of(tmp_path / "out")} == {"0"}
    html = (tmp_path / "out" / "report.html").read_text()
    assert "<td>0.5000</td><td>not done</td>" in html
    assert "(chosen)" not in html


def test_a_page_that_breaks_does_not_hide_what_has_happened(play, tmp_path, monkeypatch):
    play(VAL, TEST, stop_at=3)
    monkeypatch.setattr(running.results, "page", lambda *_: 1 / 0)
    assert compare(tmp_path / "out", *LORA).code == 130
    assert len(rows_of(tmp_path / "out")) == 4  # the tables are written after each run


def test_a_signal_in_the_last_validation_ends_the_compare(play, tmp_path):
    late = Interruption()
    late._received = signal.SIGTERM
    played = play(VAL, TEST, callbacks=[late])
    assert compare(tmp_path / "out", *LORA).code == 143
    assert len(played.calls) == 1
    play(VAL, TEST)
    assert "4 runs, 1 found done" in compare(tmp_path / "out", *LORA).out


@pytest.fixture
def passed_over():
    """A handler of SIGTERM: without one, a signal that nobody minds would end the tests."""
    handler = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, before)


def test_a_signal_outside_of_a_fit_ends_the_compare(play, tmp_path, monkeypatch, passed_over):
    play(VAL, TEST)
    monkeypatch.setattr(running, "_tested", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    told = compare(tmp_path / "out", *ONE_RATE)
    assert told.code == 143
    assert "\nstopped  2 of 2 runs done; the same command goes on\nreport   " in told.out
    assert signal.getsignal(signal.SIGTERM) is passed_over


def test_checkpoints_that_stay_cost_no_result(play, tmp_path, monkeypatch):
    play({0.001: 0.5}, {0.001: 0.5})
    seen = []
    monkeypatch.setattr(
        running.shutil,
        "rmtree",
        lambda path, ignore_errors: seen.append((path.parent / "fit.json").is_file()),
    )
    assert compare(tmp_path / "out", *ONE_RATE).code == 0
    assert seen == [True, True]


@pytest.mark.parametrize(("diverges", "total"), [([], 6), ([0.001, 0.01], 4)])
def test_the_bar_counts_tests_and_looks_far_back(diverges, total, play, tmp_path, monkeypatch):
    shown = []
    progress = bar.progress

    def watched():
        shown.append(progress())
        return shown[0]

    monkeypatch.setattr(running, "progress", watched)
    play(VAL, TEST, diverges=diverges)
    assert compare(tmp_path / "out", *LORA).code == 0
    (task,) = shown[0].tasks
    assert (task.completed, task.total) == (total, total)
    assert shown[0].speed_estimate_period > 600


def test_models_are_let_go_of_before_the_first_run(play, tmp_path, monkeypatch):
    seen = []
    run_all = running.run_all
    watched = lambda cells, *rest: seen.extend(cells) or run_all(cells, *rest)  # noqa: E731
    monkeypatch.setattr(running, "run_all", watched)
    play({0.001: 0.5}, {0.001: 0.5})
    assert compare(tmp_path / "out", *ONE_RATE).code == 0
    assert [cell.made for cell in seen] == [None]


# What is damaged or half done --------------------------------------------------------------------


def test_what_is_damaged_is_made_again(play, tmp_path):
    play(VAL, TEST)
    assert compare(tmp_path / "out", *LORA).code == 0
    low3, low4, high3, high4 = (
        tmp_path / "out" / each["folder"] for each in rows_of(tmp_path / "out")
    )
    (low3 / "fit.json").write_bytes(b"\xff{")
    shutil.rmtree(low4 / "adapter")
    weights = high3 / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (high4 / "test.json").write_text("[1]")
    again = play(VAL, TEST)
    told = compare(tmp_path / "out", *LORA)
    assert told.code == 0, told.err
    assert "4 runs, 1 found done" in told.out
    fits = [("fit", 0.001, 3), ("fit", 0.01, 3), ("fit", 0.001, 4)]
    assert again.calls == [*fits, ("test", 0.01, 3), ("test", 0.01, 4)]


@pytest.mark.parametrize(
    "text",
    ['{"metric": "val/acc", "val": 0', "[]", "{}", "1", '{"metric": "val/acc"}', '{"test": 0.5}'],
)
def test_a_damaged_result_is_none(text, tmp_path):
    run = plan.Run("LoRA", 8, 0.1, 3, "r", (), {})
    kept.write(tmp_path, run, kept.TEST, {"metric": "test/acc", "test": math.nan})
    assert kept.read(tmp_path, run, kept.TEST)["metric"] == "test/acc"
    (kept.folder_of(tmp_path, run) / "test.json").write_text(text)
    assert kept.read(tmp_path, run, kept.TEST) == {}


def test_an_adapter_that_no_test_can_read_is_made_again(play, tmp_path):
    played = play({0.001: 0.5}, {0.001: 0.5}, unreadable=1)
    told = compare(tmp_path / "out", *ONE_RATE)
    assert told.code == 0, told.err
    seeds = [(command, seed) for command, _, seed in played.calls[2:]]
    assert seeds == [("test", 3), ("fit", 3), ("test", 3), ("test", 4)]


def test_what_a_killed_process_has_left_goes(play, tmp_path):
    play({0.001: 0.5}, {0.001: 0.5})
    assert compare(tmp_path / "out", *ONE_RATE).code == 0
    run = tmp_path / "out" / rows_of(tmp_path / "out")[0]["folder"]
    before = files_below(tmp_path)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    (run / ".test.12-34.json").touch()
    (tmp_path / "out" / ".report.12-34.html").touch()
    assert compare(tmp_path / "out", *ONE_RATE).code == 0
    assert files_below(tmp_path) == before


# What the runs are told ---------------------------------------------------------------------------


def drafts(recipe, *tunings, options=()):
    tuning = dict.fromkeys(tunings, ())
    return [
        draft
        for name in tunings
        for draft in plan._drafts(axes.Axes(recipe, tunings, (), tuning, (0,), options), name)
    ]


def test_each_method_has_its_own_defaults():
    lora, flora = drafts("quickstart", "LoRA", "FLoRA")  # whose recipe has FLoRA at rank 4
    assert lora.made.model.tuning == LoRA()
    assert flora.made.model.tuning == FLoRA()
    (told,) = drafts("quickstart", "LoRA", options=("--model.tuning.alpha", "3"))
    assert told.made.model.tuning == LoRA(alpha=3)


def test_a_rate_of_the_recipe_is_kept(tmp_path):
    overlay = tmp_path / "own.yaml"
    overlay.write_text("model:\n  init_args:\n    lr: 0.3\n")
    (own,) = drafts("quickstart", "LoRA", options=("--config", str(overlay)))
    assert own.rates == (None,)
    per_module = tmp_path / "parts.yaml"
    per_module.write_text(
        "model:\n  init_args:\n    tuning:\n      class_path: litflora.adapters.PerModule\n"
        "      init_args:\n        modules:\n          stages:\n            class_path: FLoRA\n"
    )
    (parts,) = drafts("quickstart", str(per_module))
    assert parts.rates == (0.005,)  # FLoRA's, as in a fit


def test_rates_are_told_in_full(play, tmp_path):
    rate = "0.0012345678"
    play({float(rate): 0.5}, {float(rate): 0.5})
    assert compare(tmp_path / "out", "--tunings", "LoRA", "--lrs", rate).code == 0
    assert f"--model.lr {rate} " in rows_of(tmp_path / "out")[0]["command"]


def test_names_of_runs_fit_on_a_disk():
    run = plan.Run(f"{'long/' * 60}end.yaml", 8, 0.1, 3, "r", (), {})
    assert len(run.short_name) == 80
    assert run.short_name.endswith("_end.yaml-r8-lr0.1-seed3")


def budget(**changes):
    data = {"class_path": "x.Shapes", "init_args": {"batch_size": 8, **changes.pop("data", {})}}
    return {"data": data, "trainer": {"max_epochs": 3, **changes}}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (budget(max_epochs=4), "trainer.max_epochs is 4 for b, and 3 for a:\nleave it to the"),
        (budget(limit_train_batches=2), "trainer.limit_train_batches is 2 for b"),
        (budget(data={"batch_size": 9}), "data.batch_size is 9 for b, and 8 for a"),
        (budget(data={"root": "x"}), "data.root is x for b, and None for a"),
        (
            budget(callbacks=[{"class_path": "litflora.callbacks.BatchSizeFinder"}]),
            "BatchSizeFinder would search for the batch size of each run of b",
        ),
        (
            budget(callbacks=[{"class_path": "lightning.pytorch.callbacks.EarlyStopping"}]),
            "EarlyStopping would choose the length of each run of b",
        ),
        (
            budget(callbacks=[{"class_path": "litflora.callbacks.LearningRateFinder"}]),
            "LearningRateFinder would search for the learning rate",
        ),
    ],
)
def test_budgets_are_equal(other, message):
    equal.check({"a": budget(), "b": budget(callbacks=[{"class_path": "x.LISA"}])})
    with pytest.raises(ValueError, match=message):
        equal.check({"a": budget(), "b": other})


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"limit_val_batches": 0.0}, "limit_val_batches is 0: no run would validate"),
        ({"limit_test_batches": 0}, "no run would be tested; give more"),
        ({"limit_train_batches": 0}, "no run would train"),
        ({"max_epochs": 0}, "trainer.max_epochs is 0: no run would train"),
        ({"max_steps": 0}, "trainer.max_steps is 0: no run would train"),
        ({"fast_dev_run": 1}, "fast_dev_run leaves no adapter to test: leave it out;\n--trainer."),
        ({"barebones": True}, "barebones leaves no adapter"),
        ({"check_val_every_n_epoch": 4}, "is 4, and the last of 3 epochs would end without a val"),
        ({"check_val_every_n_epoch": 2}, "is 2, and the last of 3 epochs"),
        ({"max_steps": 150}, "can end a run after its last validation,\nby which rates are ch"),
        ({"val_check_interval": 0.3}, "trainer.max_steps and trainer.val_check_interval can end"),
        ({"check_val_every_n_epoch": 3, "max_steps": -1, "fast_dev_run": False}, ""),
        ({"val_check_interval": 1.0, "max_steps": None}, ""),
        ({"check_val_every_n_epoch": 4, "max_epochs": -1}, ""),
    ],
)
def test_limits_that_doom_every_run(trainer, message):
    if not message:
        limits.check({"max_epochs": 3, **trainer})
        return
    with pytest.raises(ValueError, match=message):
        limits.check({"max_epochs": 3, **trainer})


def test_weights_are_kept_by_what_rates_are_chosen_by(tmp_path):
    def keeping(metric):
        callback = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"monitor": metric},
        }
        return cells_with({"trainer": {"callbacks+": [callback]}}, tmp_path)

    assert keeping("val/acc")
    assert keeping(None)
    told = "weights of the best val/f1, and rates are chosen by val/acc:\nhave it monitor that"
    with pytest.raises(ValueError, match=told):
        keeping("val/f1")


def test_few_that_validate_are_told():
    sizes = {"train": 2000, "val": 100, "test": 7}
    unlimited = {"limit_train_batches": None, "limit_val_batches": 1.0}
    assert data.told(sizes, unlimited) == "data     2,000 train, 100 validate, 7 test"
    assert "\nwarning: only a part of those" in data.told(sizes, {"limit_val_batches": 1})
    line = data.told({"val": 99}, {"limit_val_batches": 1})
    assert line.startswith("data     99 validate (limit_val_batches 1)\nwarning: only 99 validate,")
    assert data.told({}, {}) == ""  # data that do not say


def test_what_runs_depend_on_names_them():
    found = versions.environment("cpu")
    assert found["libraries"]["torch"] == torch.__version__
    assert found["device"] == platform.machine()


def test_data_are_fetched_before_they_are_hashed(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(plan.data, "check", lambda *_: seen.append("set up"))
    monkeypatch.setattr(versions.Versions, "of", lambda *_: seen.append("hashed"))
    plan.cells(axes.Axes("quickstart", ("Probe",), (), {"Probe": ()}, (0,), ()), tmp_path)
    assert seen == ["set up", "hashed"]


def cells_with(overlay, tmp_path, tuning="Probe"):
    file = tmp_path / "overlay.yaml"
    file.write_text(json.dumps(overlay))
    told = (*map(str, OPTIONS), "--config", str(file))
    return plan.cells(axes.Axes("quickstart", (tuning,), (), {tuning: ()}, (0,), told), tmp_path)


def photos_of_a_monitor(folder):
    return {
        "class_path": "litflora.callbacks.SourceMonitor",
        "init_args": {
            "data": {
                "class_path": "litflora.datamodules.ImageFolderDataModule",
                "init_args": {"root": folder, "img_size": 32},
            }
        },
    }


def kept_in(folder):
    return {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": folder},
    }


@pytest.mark.parametrize(("callback", "names"), [(photos_of_a_monitor, 2), (kept_in, 1)])
def test_what_a_callback_reads_counts_and_not_what_it_writes(callback, names, tmp_path):
    classes = [tmp_path / "photos" / split / name for split in ("train", "test") for name in "ab"]
    found = set()
    for number in range(2):
        for of_class in classes:
            of_class.mkdir(parents=True, exist_ok=True)
            (of_class / f"{number}.jpg").touch()
        overlay = {"trainer": {"callbacks+": [callback(str(tmp_path / "photos"))]}}
        (cell,), _ = cells_with(overlay, tmp_path)
        found.add(cell.all_runs[0].name)
    assert len(found) == names


def test_options_that_replace_the_tuning_of_a_recipe_are_refused(tmp_path):
    other = {"model": {"init_args": {"tuning": {"class_path": "litflora.adapters.BitFit"}}}}
    with pytest.raises(ValueError, match="the options replace DoRA by BitFit"):
        cells_with(other, tmp_path, "tuning/dora")


def test_class_names_are_written_in_utf_8(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "text_encoding", lambda encoding, _=2: encoding or "ascii")
    counted = ClassAccuracy()
    labels = torch.tensor([0])
    outputs = {"probs": torch.ones(1, 1), "labels": labels}
    counted.on_test_batch_end(None, None, outputs, None, 0)
    named = SimpleNamespace(class_names=["Käfer"])
    counted.on_test_end(SimpleNamespace(log_dir=tmp_path), named)
    assert "Käfer,1.0" in (tmp_path / "class_accuracy.csv").read_text(encoding="utf-8")


def test_a_lock_is_never_on_a_file_that_was_replaced(tmp_path):
    left = tmp_path / ".compare.1-2.txt"  # of a process that was killed
    left.write_text("")
    folder.check(tmp_path, "quickstart")
    (tmp_path / "compare.txt").write_text("")
    before = (tmp_path / "compare.txt").stat().st_ino
    with run_lock.released():
        folder.take(tmp_path, "quickstart")
    assert (tmp_path / "compare.txt").stat().st_ino == before
    assert "litflora compare" in (tmp_path / "compare.txt").read_text()


# Choosing ---------------------------------------------------------------------------------------


def accuracies(*values):
    return [None if value is None else Score("val/acc", value) for value in values]


@pytest.mark.parametrize(
    ("scores", "rate"),
    [
        ({1.0: accuracies(0.2, 0.4), 2.0: accuracies(0.35, 0.35)}, [2.0]),
        ({1.0: accuracies(0.3), 2.0: accuracies(0.3)}, [1.0]),  # of equal ones the first
        ({1.0: accuracies(0.9, None), 2.0: accuracies(0.1, 0.1)}, [2.0]),  # one has failed
        ({1.0: accuracies(math.nan), 2.0: accuracies(0.1)}, [2.0]),
        ({1.0: accuracies(None)}, []),
        ({None: accuracies(0.1)}, [None]),
        ({1.0: [Score("val/loss", 0.3)], 2.0: [Score("val/loss", 0.2)]}, [2.0]),
    ],
)
def test_the_best_mean_over_all_seeds_is_chosen(scores, rate):
    assert choose(scores) == rate


def version(path, out="out"):
    return versions.Versions(path / out).of({"root": [str(path)]})[str(path)]


def test_the_version_of_a_folder_follows_names_sizes_and_times(tmp_path):
    photo = tmp_path / "a" / "x.jpg"
    photo.parent.mkdir()
    photo.write_text("12")
    os.utime(photo, (1, 1))
    seen = [version(tmp_path)]
    for own in ("out/fit.json", ".cache/x", ".x"):  # the compare's own, and what is hidden
        (tmp_path / own).parent.mkdir(exist_ok=True)
        (tmp_path / own).write_text("1")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    assert version(tmp_path) == seen[0]
    photo.write_text("123")
    os.utime(photo, (1, 1))
    seen.append(version(tmp_path))
    os.utime(photo, (2, 2))
    seen.append(version(tmp_path))
    photo.rename(tmp_path / "a" / "y.jpg")
    assert len({*seen, version(tmp_path)}) == 4


def test_the_version_of_a_file_is_what_is_in_it(tmp_path):
    weights = tmp_path / "weights.pt"
    weights.write_text("12")
    os.utime(weights, (1, 1))
    before = version(weights)
    os.utime(weights, (2, 2))
    assert version(weights) == before
    weights.write_text("21")
    assert version(weights) != before
    assert versions.Versions(tmp_path).of({"prompt": "x" * 300}) == {}  # longer than a name may be


def test_a_file_of_the_home_folder_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "weights.pt").write_text("12")
    named = {"weights": "~/weights.pt"}
    before = versions.Versions(tmp_path / "out").of(named)
    (tmp_path / "weights.pt").write_text("21")
    assert versions.Versions(tmp_path / "out").of(named)["~/weights.pt"] != before["~/weights.pt"]


def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    seen = []
    walk = os.walk
    monkeypatch.setattr(versions.os, "walk", lambda path: seen.append(path) or walk(path))
    read = versions.Versions(tmp_path / "out")
    assert read.of([str(tmp_path)]) == read.of([str(tmp_path)])
    assert seen == [tmp_path]


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tunings", "FLORA"], "no 'FLORA'; did you mean 'FLoRA'?\n       there are "),
        (["--tunings", "sorcery"], "there is no 'sorcery'"),
        (["--tunings", "tuning/none"], "no file or recipe called 'tuning/none'"),
        (["--tunings", "LoRA", "--ranks", "2.5"], "--ranks takes whole numbers of at least 1"),
        (["--tunings", "LoRA", "--ranks", "0"], "not '0'"),
        (["--tunings", "LoRA", "--ranks", "9999"], "LoRA r=9999: no weight has that rank"),
        (["--tunings", "LoRA", "--seeds", "a"], "--seeds takes whole numbers from 0 to 42949"),
        (["--tunings", "LoRA", "--seeds", str(2**32)], "not '4294967296'"),
        (["--tunings", "LISA"], "there is no 'LISA'; did you mean 'tuning/lisa'?"),
        (["--tunings", "tuning/lora", "--lrs", "LoRA=1e-3"], "did you mean 'tuning/lora=1e-3'?"),
        (["--tunings", "LoRA", "--trainer.limit_val_batches", "0"], "no run would validate"),
        (["--tunings", "LoRA", "--lrs", "-1"], "--lrs"),
        (["--tunings", "LoRA", "--lrs", "fast"], "--lrs takes numbers above 0, or NAME=RATE"),
        (["--tunings", "LoRA", "--lrs", "Full=1"], "'Full' is none of the tunings LoRA"),
        (["--tunings", "LoRA", "--model.lr", "1"], "compare sets --model.lr itself: give --lrs"),
        (
            ["--tunings", "AdaLoRA"],
            "no budget by itself, and no rank would change:\n       name tun",
        ),
        (["--tunings", "LoRA", "--adapter", "x"], "compare sets --adapter itself: give --tunings"),
        (["--tunings", "LoRA", "--config", "tuning/full"], "the options replace LoRA by Full"),
        (["--tunings", "LoRA", "--model.tuning.class_path=Full"], "compare sets --model.tuning.cl"),
        (["--tunings", "LoRA", "--config", "trainer/lr_finder"], "would search for the learning"),
        (["--tunings", "LoRA", "LoftQ"], "set base_dtype to nf4"),
        (["--tunings", "LoRA", "--trainer.devices=2"], "a compare runs on one"),
        (["--tunings", "LoRA", "--model.tuning.rnk", "1"], "LoRA has no option 'rnk'"),
        (["--tunings", "LoRA", "--model.tuning.targets", "[nowhere]"], "nowhere"),
        ([], "--tunings"),
    ],
)
def test_mistakes_are_told_before_the_first_run(more, message, play, tmp_path):
    played = play(VAL, TEST)
    told = compare(tmp_path / "out", *more)
    assert told.code == 2
    assert message in told.err
    assert not played.calls
    assert files_below(tmp_path) == set()


def test_a_folder_of_something_else_is_left_alone(play, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    told = compare(tmp_path, *LORA)
    assert told.code == 2
    assert "holds something else than a compare: give a free folder" in told.err
    assert files_below(tmp_path) == {"thesis.tex"}


def test_a_folder_that_cannot_be_made_is_refused(play, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "x"):
        told = compare(out, "--tunings", "LoRA")
        assert told.code == 2
        assert told.err.startswith(f"error: --out {out}: {tmp_path / 'file'} is no folder that")
    told = compare(tmp_path / ("x" * 300), "--tunings", "LoRA")
    assert told.code == 2
    assert told.err.startswith("error: cannot write or read, File name too long: ")


def test_a_folder_has_one_recipe(play, tmp_path):
    play({0.001: 0.5}, {0.001: 0.5})
    out = tmp_path / "out"
    assert compare(out, *ONE_RATE).code == 0
    before = (out / "results.md").read_text()
    told = litflora("compare", "classification/shapes", *ONE_RATE, "--out", out, *OPTIONS)
    assert told.code == 2
    assert told.err == f"error: {out} holds a compare of quickstart: give another --out\n"
    assert (out / "results.md").read_text() == before
    folder.check(out, "quickstart.yaml")
    (out / "compare.txt").write_text("`litflora compare` writes here\n")  # as older ones say
    folder.check(out, "classification/shapes")


def test_a_folder_among_the_data_is_refused(play, tmp_path):
    root = make_photos(tmp_path / "photos")
    base = make_base(tmp_path / "base.safetensors")
    before = files_below(tmp_path)
    for out in (root / "train" / "out", root / "out"):
        small = [*ONE_RATE, "--out", out, *photo_args(root, base)]
        told = litflora("compare", "classification/image_folder_vit_tiny", *small)
        assert told.code == 2
        assert f"--out {out} is inside {root}, and would become a part of the data" in told.err
    assert files_below(tmp_path) == before
    data.check_apart(tmp_path / "photos-out", {"init_args": {"root": str(root)}})


@pytest.mark.slow
def test_a_recipe_whose_parts_have_tunings_of_their_own(tmp_path):
    told = litflora(
        "compare", "vision_language/shapes", "--tunings", "LoRA", "--out", tmp_path / "out"
    )
    assert told.code == 2
    assert "language_tuning, beside which tuning has no effect" in told.err


@pytest.mark.parametrize(
    ("names", "chooses", "message"),
    [
        ([], False, "have no test split"),
        (["a"], True, "would choose the rates"),
        (["a"], False, ""),
    ],
)
def test_data_without_a_test_split(names, chooses, message):
    splits = {"val": SimpleNamespace(names=["a"]), "test": Split(names)}
    module = SimpleNamespace(datasets=splits, prepare_data=lambda: None, setup=lambda stage: None)
    made = SimpleNamespace(model=None, datamodule=module)
    if not message:
        data.check(made, chooses)
        return
    with pytest.raises(ValueError, match=message):
        data.check(made, chooses)


class Split:
    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)


# The page ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def html(done):
    return (done[0] / "report.html").read_text()


def test_the_page_is_whole_and_asks_for_nothing(html):
    reader = Reader(html)
    assert reader.open == []
    assert not re.search(r"https?://|@import|url\(", html)
    assert not reader.all("script")
    sources = [attrs.get("src") or attrs.get("href") for _, attrs in reader.found]
    assert all(source.startswith("data:") for source in sources if source)


def test_the_page_is_for_everybody(html):
    reader = Reader(html)
    assert reader.titled == len(reader.all("svg")) >= 4
    assert all(attrs["alt"] for attrs in reader.all("img"))
    headings = [tag for tag, _ in reader.found if tag in ("h1", "h2")]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    marks = [attrs for attrs in reader.all("g") if "mark" in attrs["class"]]
    assert marks
    assert all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in marks)
    assert "default-src 'none'" in html
    assert "prefers-color-scheme:dark" in html
    assert any(attrs.get("name") == "viewport" for attrs in reader.all("meta"))
    assert reader.all("html") == [{"lang": "en"}]


def test_the_page_says_what_came_out(html, done):
    for heading in ("Results", "What it costs", "Learning curves", "Classes", "Commands"):
        assert f"<h2>{heading}</h2>" in html
    for row in rows_of(done[0]):
        assert (row["command"] in html) == (row["chosen"] == "1")
    assert "triangle" in html


# A browser --------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_finds_no_error_and_fetches_nothing(html, tmp_path):
    measure = "document.title=`width ${this.contentDocument.documentElement.scrollWidth}`"
    frame = f'<iframe width="360" style="border:0" srcdoc="{escape(html)}" onload="{measure}">'
    file = tmp_path / "phone.html"  # no window is as narrow as a phone
    file.write_text(f"<!DOCTYPE html><title></title>{frame}</iframe>")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    seen = subprocess.run(
        [*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in seen.stderr  # where a fetch that the page's policy forbids is told, too
    assert "<title>width 360</title>" in seen.stdout
