"""What happens to a run from outside: each fault is told, and nothing that was saved is lost."""

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from shell import QUIET, litflora

from litflora import ClassificationModule
from litflora.checkpoint_io import AtomicCheckpointIO
from litflora.commands.mistakes import explain
from litflora.commands.resume import open_checkpoint
from litflora.datamodules.base import Samples

RUN = Path("quickstart", "version_0")
SMALL = {
    "data.train_samples": 24,
    "data.val_samples": 4,
    "data.img_size": 32,
    "data.batch_size": 4,
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 2,
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small_disk(here):
    """A disk that holds two checkpoints, but not a third beside them."""
    disk = here / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", disk]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fit(folder, *more):
    options = {**SMALL, "trainer.default_root_dir": folder}
    shown = [str(each) for key, value in options.items() for each in (f"--{key}", value)]
    return litflora("fit", "--config", "quickstart", *shown, *QUIET, *more)


def test_a_full_disk_leaves_the_last_checkpoint(small_disk):
    often = "trainer: {callbacks: [{class_path: LastCheckpoint, init_args: {every_n_steps: 2}}]}"
    ran = fit(small_disk, "--config", often)
    assert ran.code == 2, ran.err
    assert "No space left on device" in ran.err
    folder = small_disk / RUN / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert open_checkpoint(str(folder / "last.ckpt"))["global_step"] == 4
    with pytest.raises(OSError, match="No space left"):  # of one large tensor, too
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(10**6)}, folder / "last.ckpt")
    assert open_checkpoint(str(folder / "last.ckpt"))["global_step"] == 4
    (folder / "best.ckpt").unlink()
    resumed = litflora("fit", "--resume", small_disk / RUN, "--trainer.limit_val_batches", "0")
    assert resumed.code == 0, resumed.err
    assert "goes on after step 4" in resumed.out


class Dying:
    """A sample's way into a batch, which ends the process that takes it once too often."""

    def __init__(self, most):
        self.most, self.plain, self.taken = most, Samples.__getitem__, 0

    def __call__(self, samples, key):
        self.taken += torch.utils.data.get_worker_info() is not None
        if self.taken > self.most:
            time.sleep(1)  # so that training has come to wait for it
            os.kill(os.getpid(), signal.SIGKILL)
        return self.plain(samples, key)


def test_a_killed_data_worker_is_told_and_the_state_saved(here, monkeypatch):
    dying = Dying(most=24 + 4 * 4)  # an epoch of six batches, and four batches
    with monkeypatch.context() as patch:
        patch.setattr(Samples, "__getitem__", lambda samples, key: dying(samples, key))
        ran = fit("runs", "--data.num_workers", "1", "--trainer.limit_val_batches", "0")
    assert ran.code == 2, ran.err
    assert "a process that loads data was killed" in ran.err
    assert "litflora fit --resume" in ran.err
    last = Path("runs") / RUN / "checkpoints" / "last.ckpt"
    assert open_checkpoint(str(last))["global_step"] == 10
    resumed = litflora("fit", "--resume", Path("runs") / RUN)
    assert resumed.code == 0, resumed.err
    assert "goes on after step 10" in resumed.out


@pytest.mark.parametrize(
    ("signals", "workers", "code"),
    [
        ([signal.SIGTERM], 0, 143),
        ([signal.SIGINT], 1, 130),
        ([signal.SIGINT, signal.SIGINT], 1, 130),
    ],
    ids=["SIGTERM", "Ctrl-C", "Ctrl-C twice"],
)
def test_exit_codes_of_signals(here, monkeypatch, signals, workers, code):
    plain = ClassificationModule.training_step

    def step(self, batch, batch_idx):
        for number in signals if self.trainer.global_step == 7 else ():
            for child in multiprocessing.active_children():  # as a terminal does, to all of them
                os.kill(child.pid, number)
            os.kill(os.getpid(), number)
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(ClassificationModule, "training_step", step)
    ran = fit("runs", "--data.num_workers", workers)
    assert ran.code == code, ran.err
    assert "litflora fit --resume runs/quickstart/version_0" in ran.out
    last = open_checkpoint(str(Path("runs") / RUN / "checkpoints" / "last.ckpt"))
    assert last["global_step"] == (8 if len(signals) == 1 else 6)  # twice: that of the epoch's end


@pytest.mark.filterwarnings("ignore:step .* was skipped")
def test_steps_of_no_numbers_end_the_run_and_keep_the_batch(here, monkeypatch):
    plain = ClassificationModule.training_step
    wrong = lambda self, batch, index: plain(self, batch, index) * float("nan")  # noqa: E731
    monkeypatch.setattr(ClassificationModule, "training_step", wrong)
    ran = fit("runs", "--data.batch_size", "2")  # in the first epoch, before anything is saved
    assert ran.code == 2, ran.err
    file = Path("runs") / RUN / "nonfinite" / "step_9_rank_0.pt"
    assert str(file) in ran.err
    assert torch.load(file, weights_only=True)["epoch"] == 0


def test_memory_that_ran_out_is_told_with_what_helps():
    for lack in (lambda: torch.empty(2**48), _no_gpu_memory):
        with pytest.raises(RuntimeError) as error:
            lack()
        told = explain(error.value)
        assert "data.init_args.batch_size" in told
        assert "trainer.accumulate_grad_batches" in told
        assert "model.init_args.activation_checkpointing blocks" in told
        assert "trainer.precision bf16-mixed" in told
        assert len(told.splitlines()) <= 3


def _no_gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
