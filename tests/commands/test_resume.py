"""`litflora fit --resume`: in the same folder, from the newest good checkpoint."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from shell import QUIET, files_below, litflora

from litflora.adapters.replacing import leftovers
from litflora.commands import resume, run_lock
from litflora.commands.resume import has_adapter, newest_checkpoint, open_checkpoint

RUN = Path("runs", "quickstart", "version_0")
LAST = RUN / "checkpoints" / "last.ckpt"
SMALL = {
    "data.train_samples": 24,
    "data.val_samples": 4,
    "data.img_size": 32,
    "data.batch_size": 4,
    "model.mixup": 0.2,
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 2,
    "trainer.log_every_n_steps": 1,
}
OFTEN = "trainer: {callbacks: [{class_path: LastCheckpoint, init_args: {every_n_steps: 2}}]}"


def fit(*more):
    options = [str(each) for key, value in SMALL.items() for each in (f"--{key}", value)]
    return litflora("fit", "--config", "quickstart", *options, *QUIET, *more)


def tensors(path=LAST):
    checkpoint = open_checkpoint(str(path))
    return checkpoint["state_dict"], checkpoint["optimizer_states"][0]["state"]


def same(found, expected):
    if isinstance(found, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(
            same(v, expected[k]) for k, v in found.items()
        )
    return all(same(a, b) for a, b in zip(found, expected, strict=True))


def rows(run=RUN):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that was not disturbed, and one that ended in its second epoch, at a step it saved."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        for name, stop in (("whole", None), ("cut", 9)):
            (folder / name).mkdir()
            patch.chdir(folder / name)
            if stop:
                patch.setattr("litflora.ClassificationModule.training_step", _stopping(stop))
            ran = fit("--config", OFTEN)
            assert ran.code == (130 if stop else 0), ran.err
    assert open_checkpoint(str(folder / "cut" / LAST))["global_step"] == 8
    return folder


def _stopping(step):
    from litflora import ClassificationModule

    plain = ClassificationModule.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step:
            with pytest.raises(ValueError, match="is being trained by another process"):
                run_lock.take(RUN)  # a first fit holds it
            raise KeyboardInterrupt
        return plain(self, batch, batch_idx)

    return training_step


@pytest.fixture
def cut(made, tmp_path, monkeypatch):
    """The run that was cut, in a folder of the test's own."""
    shutil.copytree(made / "cut", tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return made / "whole" / RUN


def test_it_goes_on_in_the_folder_as_if_nothing_had_been(cut, monkeypatch):
    read, plain = [], resume._check_sums
    monkeypatch.setattr(resume, "_check_sums", lambda path: (read.append(path), plain(path)))
    config = (RUN / "config.yaml").read_text()
    (LAST.parent / ".last.77-123.ckpt").write_bytes(b"half")  # a killed run was writing it
    with (RUN / "metrics.csv").open("a") as file:
        file.write("1,1")  # and was cut off within the row of step 10
    ran = litflora("fit", "--resume", RUN)
    assert ran.code == 0, ran.err
    assert f"resume   {RUN} goes on after step 8" in ran.out
    assert "val/acc" in ran.out
    assert "before tuning" in ran.out
    assert read == [str(LAST)]  # once
    assert files_below(RUN) == files_below(cut)
    assert same(tensors(), tensors(cut / "checkpoints" / "last.ckpt"))
    assert rows() == rows(cut)
    assert (RUN / "config.yaml").read_text() == config
    done = litflora("fit", "--resume", RUN)
    assert done.code == 2
    assert "has had 2 epochs already" in done.err


def test_the_best_stays_known_in_a_folder_that_has_moved(cut):
    checkpoint = torch.load(LAST, weights_only=True)
    best_of(checkpoint)["best_model_score"] = torch.tensor(2.0)  # no epoch to come is as good
    torch.save(checkpoint, LAST)
    RUN.rename("moved")
    before = Path("moved/checkpoints/best.ckpt").read_bytes()
    assert litflora("fit", "--resume", "moved").code == 0
    assert Path("moved/checkpoints/best.ckpt").read_bytes() == before
    after = best_of(open_checkpoint("moved/checkpoints/last.ckpt"))
    assert after["best_model_score"] == 2.0
    assert Path(after["best_model_path"]) == Path("moved/checkpoints/best.ckpt")
    assert {path.name for path in Path("moved/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def best_of(checkpoint):
    states = checkpoint["callbacks"].items()
    return next(state for key, state in states if key.startswith("BestCheckpoint"))


def test_a_torn_checkpoint_is_passed_over(cut):
    torn = LAST.read_bytes()[:-3000]
    LAST.write_bytes(torn)
    ran = litflora("fit", "--resume", RUN)
    assert ran.code == 0, ran.err
    assert f"passed over: {LAST} is damaged" in ran.out
    assert "goes on after step 6" in ran.out  # best.ckpt is of the first epoch's end
    assert same(tensors(), tensors(cut / "checkpoints" / "last.ckpt"))
    assert rows() == rows(cut)


def test_no_good_checkpoint_is_told(cut):
    for path in LAST.parent.iterdir():
        path.write_bytes(b"torn")
    before = files_below(RUN)
    told = litflora("fit", "--resume", RUN)
    assert told.code == 2
    assert "no checkpoint below" in told.err
    assert files_below(RUN) == before


def test_a_run_that_saved_nothing_starts_anew(cut):
    shutil.rmtree(LAST.parent)
    log = (RUN / "metrics.csv").read_bytes()
    ran = litflora("fit", "--resume", RUN)
    assert ran.code == 0, ran.err
    assert "starts anew" in ran.out
    assert f"the log so far is kept as {RUN / 'metrics.before.csv'}" in ran.out
    assert (RUN / "metrics.before.csv").read_bytes() == log
    assert same(tensors(), tensors(cut / "checkpoints" / "last.ckpt"))
    assert rows() == rows(cut)


def test_a_finished_run_without_checkpoints_is_not_trained_anew(cut):
    shutil.copytree(cut, "done")
    shutil.rmtree("done/checkpoints")
    with pytest.raises(ValueError, match="done is finished, and its checkpoints are gone"):
        resume.run_config(Path("done"))


def test_a_run_does_not_go_on_in_another_folder(cut):
    before = files_below(RUN)
    for option in ("--trainer.logger=false", "--trainer.logger.init_args.version=7"):
        told = litflora("fit", "--resume", RUN, option)
        assert told.code == 2
        assert f"{RUN} goes on in its own folder" in told.err
    assert files_below(RUN) == before
    assert [path.name for path in RUN.parent.iterdir()] == [RUN.name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: b"- a list",
        lambda text: b"trainer: {logger: [}",
        lambda text: b"\xff" + text,
        lambda text: text.replace(b"  logger:", b"  lager:", 1),
        lambda text: text[: text.index(b"ckpt_path:")],
    ],
)
def test_a_damaged_config_is_told(cut, damage):
    config = RUN / "config.yaml"
    config.write_bytes(damage(config.read_bytes()))
    with pytest.raises(ValueError, match=r"config\.yaml is not that of a run, or is damaged"):
        resume.run_config(RUN)


@pytest.mark.parametrize("damaged", [b"", b"1,0.5\n", b"step,loss\n1,\xff\n"])
def test_a_log_that_cannot_be_read_is_set_aside(tmp_path, capsys, damaged):
    for name in ("metrics.damaged.csv", "metrics.damaged.1.csv"):
        (tmp_path / "metrics.csv").write_bytes(damaged)
        resume.prepare(tmp_path, CSVLogger(tmp_path.parent, "", tmp_path.name), 4)
        assert (tmp_path / name).read_bytes() == damaged
        assert f"the log so far is kept as {tmp_path / name}" in capsys.readouterr().out
    assert len(files_below(tmp_path)) == 2


def test_a_row_with_too_many_fields_is_dropped(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n2,0.4,3,0.3\n3,0.2\n4,0.1\n")
    resume.prepare(tmp_path, CSVLogger(tmp_path.parent, "", tmp_path.name), 4)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "3"]


def test_a_run_that_was_killed_before_its_adapter_writes_it(cut):
    shutil.copytree(cut, "done")
    shutil.rmtree("done/adapter")
    ran = litflora("fit", "--resume", "done")
    assert ran.code == 0, ran.err
    weights = "adapter/adapter_model.safetensors"
    assert Path("done", weights).read_bytes() == (cut / weights).read_bytes()


def test_an_adapter_is_there_if_it_can_be_read(cut, tmp_path):
    shutil.copytree(cut / "adapter", tmp_path / "run" / "adapter")
    assert has_adapter(tmp_path / "run")
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert not has_adapter(tmp_path / "run")
    weights.unlink()
    assert not has_adapter(tmp_path / "run")


def test_the_checkpoint_that_has_come_furthest_is_taken_whatever_the_time_of_its_file(cut):
    best = LAST.with_name("best.ckpt")
    os.utime(LAST, (0, 0))
    found = newest_checkpoint(RUN)
    assert (found.path, found.steps, found.epochs) == (str(LAST), 8, 1)
    shutil.copy(LAST, best)
    for path in (best, LAST):
        os.utime(path, (0, 0))
    assert newest_checkpoint(RUN).path == str(LAST)


def test_options_win_and_what_differs_is_told(cut):
    ran = litflora("fit", "--resume", RUN, "--model.mixup", "0.5", "--trainer.max_epochs", "3")
    assert ran.code == 0, ran.err
    assert "model.mixup is 0.5, and was 0.2 when the checkpoint was made" in ran.out
    assert open_checkpoint(str(LAST))["hyper_parameters"]["mixup"] == 0.5
    assert open_checkpoint(str(LAST))["epoch"] == 2
    newer = fit("--ckpt_path", "last", "--trainer.max_epochs", "4")
    assert newer.code == 0, newer.err
    assert "model.mixup is 0.2, and was 0.5 when the checkpoint was made" in newer.out
    assert (RUN.parent / "version_1" / "checkpoints" / "last.ckpt").is_file()


def test_another_runs_folder_is_refused(cut):
    before = LAST.read_bytes()
    told = fit("--trainer.logger.init_args.version", "0")
    assert told.code == 2
    assert f"litflora fit --resume {RUN}" in told.err
    assert LAST.read_bytes() == before


def test_a_run_is_trained_by_one_process_at_a_time(cut):
    before = files_below(RUN)
    with run_lock.released():
        run_lock.take(RUN)
        told = litflora("fit", "--resume", RUN)
    assert told.code == 2
    assert f"{RUN} is being trained by another process" in told.err
    assert files_below(RUN) == before


def test_a_run_is_free_once_its_process_is_killed_though_workers_live(cut):
    child = "import os, runpy, sys, time; from pathlib import Path"
    child += "; runpy.run_path(sys.argv[1])['take'](Path(sys.argv[2]))"
    child += "; os.fork() or print(os.getpid(), flush=True); time.sleep(100)"
    command = [sys.executable, "-c", child, run_lock.__file__, str(RUN)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        try:
            with pytest.raises(ValueError, match="another process"):
                run_lock.take(RUN)
            process.kill()
            process.wait()
            with run_lock.released():
                run_lock.take(RUN)
        finally:
            process.kill()
            os.kill(worker, signal.SIGKILL)


def test_a_folder_that_is_no_run_is_told(cut):
    told = litflora("fit", "--resume", RUN / "checkpoints")
    assert told.code == 2
    assert "--resume takes the folder of a run" in told.err


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damage_anywhere_is_seen(made, tmp_path, damage):
    whole = (made / "cut" / LAST).read_bytes()
    (tmp_path / "a.ckpt").write_bytes(whole)
    assert newest_checkpoint(tmp_path).path == str(tmp_path / "a.ckpt")
    for place in range(2000, len(whole), len(whole) // 20):
        data = bytearray(whole)
        if damage == "cut":
            del data[place:]
        else:
            data[place] ^= 255
        (tmp_path / "a.ckpt").write_bytes(data)
        if newest_checkpoint(tmp_path):  # a byte between two records is nothing's
            assert damage == "flip"
            assert same(tensors(tmp_path / "a.ckpt"), tensors(made / "cut" / LAST))


def test_temporary_names_are_known(tmp_path):
    for name in (".last.77-123.ckpt", ".adapter.7-8"):
        (tmp_path / name).touch()
    for name in (".git", "last.ckpt", ".hidden.ckpt", ".v1.2-3.x.y"):
        (tmp_path / name).touch()
    assert {path.name for path in leftovers(tmp_path)} == {".last.77-123.ckpt", ".adapter.7-8"}
