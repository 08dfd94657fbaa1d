"""A run that goes on from any checkpoint ends, bit for bit, as one that was never disturbed."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny import module, save_base, trainer

from litflora.adapters import FLoRA
from litflora.callbacks import EMA, BestCheckpoint, LastCheckpoint
from litflora.checkpoint_io import AtomicCheckpointIO
from litflora.datamodules import ShapesDataModule
from litflora.datamodules.scenes import KINDS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*WeightAveraging doesn't support sharding",
    "ignore:.*smaller than the logging interval",
    "ignore:.*exists and is not empty",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


class Album(LastCheckpoint):
    """Keeps a copy of every checkpoint."""

    state_key = "LastCheckpoint"

    def save(self, trainer):
        super().save(trainer)
        folder, epochs = Path(trainer.default_root_dir), trainer.fit_loop.epoch_progress.current
        moment = "epoch" if epochs.processed == epochs.started else "step"
        number = len(list(folder.glob("*.ckpt")))
        shutil.copy(
            self.last_model_path, folder / f"{number:02} {moment} {trainer.global_step}.ckpt"
        )


class Rows(CSVLogger):
    """What is logged, and at which step."""

    def __init__(self, folder):
        super().__init__(folder)
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, {k: float(v) for k, v in metrics.items() if k != "epoch"}))


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=0, factor=0.5, threshold=10.0
    )


def run(base, folder, ckpt_path=None, workers=0, ema=False, scheduler=None, **options):
    folder.mkdir()
    torch.manual_seed(5)
    chosen = {"lr_scheduler": scheduler} if scheduler else {}
    made = module(
        base,
        tuning=FLoRA(rank=2, dropout=0.2),
        mixup=0.3,
        num_classes=len(KINDS),
        class_names=list(KINDS),
        **chosen,
    )
    data = ShapesDataModule(
        train_samples=22, val_samples=4, img_size=32, batch_size=4, num_workers=workers
    )
    callbacks = [*([EMA(0.6)] if ema else []), BestCheckpoint(), Album(every_n_steps=1)]
    logger = Rows(folder)
    settings = {
        "max_epochs": 3,
        "log_every_n_steps": 1,
        "callbacks": callbacks,
        "enable_checkpointing": True,
        "plugins": [AtomicCheckpointIO()],
        "logger": logger,
        **options,
    }
    fit = trainer(folder, **settings)
    fit.fit(made, data, ckpt_path=ckpt_path, weights_only=True)
    return fit, made, logger.rows


def state(fit, made):
    """All that a run has come to."""
    found = dict(made.state_dict())
    optimizer = fit.optimizers[0].state_dict()
    for number, moments in optimizer["state"].items():
        found |= {f"{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    found["lr"] = torch.tensor([group["lr"] for group in optimizer["param_groups"]])
    found["step"] = torch.tensor([fit.global_step, fit.current_epoch])
    for config in fit.lr_scheduler_configs:
        plain = {
            k: v for k, v in config.scheduler.state_dict().items() if isinstance(v, int | float)
        }
        found |= {f"schedule.{name}": torch.tensor(float(value)) for name, value in plain.items()}
    return found


MOMENTS = {
    "plain": {},
    "accumulating": {"accumulate_grad_batches": 4},
    "validating within epochs": {"val_check_interval": 2, "ema": True},
    "validating every other epoch": {"check_val_every_n_epoch": 2},
    "cut epochs, accumulating": {"limit_train_batches": 5, "accumulate_grad_batches": 2},
    "workers": {"workers": 1},
    "plateau": {"scheduler": plateau},
    "steps": {"max_steps": 15, "max_epochs": -1},
    "steps in epochs": {"max_steps": 18, "max_epochs": -1, "val_check_interval": 3},
}


@pytest.mark.parametrize("name", MOMENTS)
def test_goes_on_from_any_moment(base, tmp_path, name):
    options = MOMENTS[name]
    fit, made, rows = run(base, tmp_path / "whole", **options)
    expected = state(fit, made)
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(checkpoints) > 3
    bad = []
    for number, checkpoint in enumerate(checkpoints):
        again, resumed, later = run(base, tmp_path / f"{number}", ckpt_path=checkpoint, **options)
        found = state(again, resumed)
        assert found.keys() == expected.keys()
        different = [key for key, value in found.items() if not torch.equal(value, expected[key])]
        tail = rows[len(rows) - len(later) :] if later else []
        if different or later != tail:
            bad.append(
                (
                    checkpoint.name,
                    len(different),
                    different[:2],
                    [r[0] for r in later],
                    [r[0] for r in tail],
                )
            )
    for each in bad:
        print(each)
    assert not bad
