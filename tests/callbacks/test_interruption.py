"""Interruption: a signal ends the step, saves, and stops; the run goes on bit for bit."""

import os
import signal
from pathlib import Path

import pytest
import torch
import worlds
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from tiny import Colours, module, save_base, trainer
from torch.multiprocessing import ProcessExitedException

from litflora.adapters import FLoRA
from litflora.callbacks import EMA, BestCheckpoint, Interruption, LastCheckpoint
from litflora.datamodules import ShapesDataModule
from litflora.datamodules.scenes import KINDS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*smaller than the logging interval", "ignore:.*exists and is not empty"
)


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


class Send(Callback):
    """Sends signals to this process in a hook of a batch."""

    def __init__(self, hook, batch, *numbers):
        self.batch, self.numbers, self.steps, self.validated = batch, numbers, [], 0
        setattr(self, hook, self.send)

    def send(self, trainer, *_):
        if trainer.fit_loop.total_batch_idx == self.batch and not trainer.sanity_checking:
            for number in self.numbers:
                os.kill(os.getpid(), number)

    def on_train_batch_end(self, trainer, *_):
        self.steps.append(trainer.global_step)

    def on_validation_end(self, trainer, pl_module):
        self.validated += not trainer.sanity_checking


def fit(base, folder, *callbacks, guards=(), ckpt_path=None, **options):
    torch.manual_seed(0)
    classes = {"num_classes": len(KINDS), "class_names": list(KINDS)}
    made = module(base, tuning=FLoRA(rank=2, dropout=0.1), **classes)
    data = ShapesDataModule(train_samples=16, val_samples=4, img_size=32, batch_size=4)
    own = [*callbacks, *(guards or [Interruption()]), BestCheckpoint(), LastCheckpoint()]
    settings = {"max_epochs": 3, "enable_checkpointing": True, "log_every_n_steps": 1, **options}
    run = trainer(folder, callbacks=own, logger=CSVLogger(folder, name="", version=""), **settings)
    run.fit(made, data, ckpt_path=ckpt_path, weights_only=True)
    return made


def stopped(base, folder, send, **options):
    """The exit code, and the step of the checkpoint that is left."""
    with pytest.raises(SystemExit) as stop:
        fit(base, folder, send, **options)
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return stop.value.code, last["global_step"]


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(base, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    send = Send("on_before_backward", 5, signal.SIGTERM)
    assert stopped(base, tmp_path / "cut", send) == (143, 6)
    assert send.steps[-1] == 6  # the batch in which it came was the last
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert f"ckpt_path='{tmp_path / 'cut'}/" in capsys.readouterr().out  # there is no command
    rows = (tmp_path / "cut" / "metrics.csv").read_text().splitlines()
    assert rows[-1].split(",")[rows[0].split(",").index("step")] == "5"  # the last step is logged
    path = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    resumed = fit(base, tmp_path / "cut", ckpt_path=path).state_dict()
    whole = fit(base, tmp_path / "whole").state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_what_is_saved_has_the_hooks_of_all_callbacks_behind_it(base, tmp_path):
    guards = Interruption(), EMA(0.6)
    send = Send("on_before_backward", 5, signal.SIGTERM)
    assert stopped(base, tmp_path / "cut", send, guards=guards) == (143, 6)
    path = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    again = fit(base, tmp_path / "cut", guards=(Interruption(), EMA(0.6)), ckpt_path=path)
    whole = fit(base, tmp_path / "whole", guards=(EMA(0.6),)).state_dict()
    resumed = again.state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_gradients_of_a_step_are_not_lost(base, tmp_path):
    send = Send("on_before_backward", 4, signal.SIGINT)
    assert stopped(base, tmp_path, send, accumulate_grad_batches=3) == (130, 3)
    assert len(send.steps) == 7  # an epoch of four batches in two steps, and three batches


def test_a_validation_is_waited_for(base, tmp_path):
    send = Send("on_validation_start", 3, signal.SIGTERM)
    assert stopped(base, tmp_path, send) == (143, 5)
    assert send.validated == 1
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


def test_a_second_ctrl_c_stops_at_once(base, tmp_path, capsys):
    send = Send("on_before_backward", 5, signal.SIGINT, signal.SIGINT)
    code, step = stopped(base, tmp_path, send)
    assert (code, step) == (1, 4)  # Lightning's code, which the command line makes 130
    assert "go on with" in capsys.readouterr().out


def test_it_says_when_nothing_is_saved(base, tmp_path, capsys):
    send = Send("on_before_backward", 1, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit):
        fit(base, tmp_path, send)
    assert "nothing is saved" in capsys.readouterr().out


def test_slurm_still_requeues(base, tmp_path, monkeypatch):
    """SIGUSR1 is Lightning's: it saves, and asks SLURM to start the job again."""
    stub = tmp_path / "bin" / "scontrol"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(stub.parent), prepend=os.pathsep)
    slurm = {"NTASKS": "1", "JOB_ID": "77", "JOB_NAME": "fit", "PROCID": "0", "LOCALID": "0"}
    for name, value in {**slurm, "NODELIST": "localhost", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    send = Send("on_train_batch_start", 5, signal.SIGUSR1)
    fit(base, tmp_path, send)
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == 5


class Kill(Send):
    """Tells the first process nothing: the signal comes to the second alone."""

    def send(self, trainer, *_):
        if trainer.global_rank == 1:
            super().send(trainer)


def test_a_signal_to_one_process_stops_all(base, tmp_path):
    with pytest.raises(ProcessExitedException, match="exit code 143"):
        worlds.run(signalled, base, tmp_path)
    # Both draw by the seed of the first, which checkpoints hold.
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["2 70", "2 70"]


def signalled(base, folder):
    os.environ.pop("PL_GLOBAL_SEED", None)  # an earlier test's, which Lightning would seed by
    torch.manual_seed(70 + int(os.environ["RANK"]))
    kill = Kill("on_train_batch_start", 1, signal.SIGTERM)
    run = trainer(
        folder,
        callbacks=[kill, Interruption(), Note()],
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=5,
    )
    run.fit(module(base), Colours(n=32))


class Note(Callback):
    """Writes how many steps a process has made, and the seed that it draws by."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        path = Path(trainer.default_root_dir, f"{trainer.global_rank}.txt")
        path.write_text(f"{trainer.global_step} {pl_module._seed}")
