"""A run that goes on from any checkpoint ends, bit for bit, as one that was never disturbed."""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny import Colours, module, save_base, trainer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from litflora.adapters import FLoRA
from litflora.callbacks import EMA, BestCheckpoint, LastCheckpoint
from litflora.datamodules import ShapesDataModule
from litflora.datamodules.scenes import KINDS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*WeightAveraging doesn't support sharding",
    "ignore:.*smaller than the logging interval",
    "ignore:.*dirpath has changed",
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
        name = f"{number:02} {moment} {trainer.global_step}.ckpt"
        shutil.copy(self.last_model_path, folder / name)


class Rows(CSVLogger):
    """What is logged, and at which step."""

    def __init__(self, folder):
        super().__init__(folder)
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, {k: float(v) for k, v in metrics.items() if k != "epoch"}))


def plateau(optimizer):
    return ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=10.0)


def run(base, folder, keeper, ckpt_path=None, workers=0, ema=False, scheduler=None, **options):
    folder.mkdir()
    torch.manual_seed(5)
    chosen = {"lr_scheduler": scheduler} if scheduler else {}
    classes = {"num_classes": len(KINDS), "class_names": list(KINDS)}
    made = module(base, tuning=FLoRA(rank=2, dropout=0.2), mixup=0.3, **classes, **chosen)
    data = ShapesDataModule(
        train_samples=14, val_samples=4, img_size=32, batch_size=4, num_workers=workers
    )
    settings = {
        "max_epochs": 3,
        "log_every_n_steps": 1,
        "callbacks": [*([EMA(0.6)] if ema else []), BestCheckpoint(), keeper],
        "enable_checkpointing": True,
        "logger": Rows(folder),
        **options,
    }
    fit = trainer(folder, **settings)
    fit.fit(made, data, ckpt_path=ckpt_path, weights_only=True)
    return state(fit, made), fit.logger.rows


def state(fit, made):
    """All that a run has come to."""
    found = dict(made.state_dict())
    optimizer = fit.optimizers[0].state_dict()
    for number, moments in optimizer["state"].items():
        found |= {f"{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    found["lr"] = torch.tensor([group["lr"] for group in optimizer["param_groups"]])
    found["step"] = torch.tensor([fit.global_step, fit.current_epoch])
    for config in fit.lr_scheduler_configs:
        for name, value in config.scheduler.state_dict().items():
            if isinstance(value, int | float):
                found[f"schedule.{name}"] = torch.tensor(float(value))
    return found


CASES = {
    "plain": {},
    "accumulating": {"accumulate_grad_batches": 2},
    "validating within epochs": {"val_check_interval": 3, "ema": True},
    "validating at half and whole": {"val_check_interval": 0.5, "ema": True},
    "validating every other epoch": {"check_val_every_n_epoch": 2},
    "epochs cut short": {"limit_train_batches": 3, "accumulate_grad_batches": 2},
    "workers": {"workers": 1},
    "plateau": {"scheduler": plateau},
    "steps": {"max_steps": 10, "max_epochs": -1},
    "steps, validating by steps": {
        "max_steps": 10,
        "max_epochs": -1,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
    },
}
QUICK = ("validating within epochs", "workers", "plateau", "steps")


def goes_on(base, folder, case, chosen):
    expected, rows = run(base, folder / "whole", Album(every_n_steps=1), **CASES[case])
    checkpoints = sorted((folder / "whole").glob("*.ckpt"))
    moments = [checkpoint.stem.split()[-1] for checkpoint in checkpoints]
    assert len(moments) == len(set(moments)) > 3  # none before what will save anyway
    for number, checkpoint in enumerate(chosen(checkpoints)):
        resumed = run(base, folder / f"{number}", LastCheckpoint(), checkpoint, **CASES[case])
        found, later = resumed
        assert found.keys() == expected.keys()
        different = [key for key, value in found.items() if not torch.equal(value, expected[key])]
        assert not different, checkpoint.name
        assert later == rows[len(rows) - len(later) :], checkpoint.name
        steps = int(checkpoint.stem.split()[-1])
        assert len(later) >= sum(step >= steps for step, _ in rows), checkpoint.name


@pytest.mark.parametrize("case", QUICK)
def test_goes_on_from_a_moment_of_each_kind(base, tmp_path, case):
    """In the first epoch, in or after the second, and at the end."""
    goes_on(base, tmp_path, case, lambda all_: [*all_[1:-1:4], all_[-1]])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_goes_on_from_any_moment(base, tmp_path, case):
    goes_on(base, tmp_path, case, lambda all_: all_)


class Eager(DataLoader):
    """A loader that settles where a pass begins as it is asked for one, as torchdata's does."""

    first = given = 0

    def __iter__(self):
        begin, self.first = self.first, 0
        self.given = begin
        return self.rest(begin)

    def rest(self, begin):
        for batch in itertools.islice(super().__iter__(), begin, None):
            self.given += 1
            yield batch

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.first = state["given"]


class Strange(Colours):
    def train_dataloader(self):
        return Eager(self._data(0), batch_size=8)


class Seen(Callback):
    def __init__(self):
        self.sums = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.sums.append(batch[0].sum().item())


def test_a_loader_of_ones_own_goes_on_within_the_epoch(base, tmp_path):
    seen = {}
    for moment in (None, "00 step 1", "02 epoch 3"):
        folder = tmp_path / str(moment)
        seen[moment], keeper = Seen(), LastCheckpoint() if moment else Album(every_n_steps=1)
        options = {"max_epochs": 2, "enable_checkpointing": True}
        fit = trainer(folder, callbacks=[seen[moment], keeper], **options)
        path = moment and tmp_path / "None" / f"{moment}.ckpt"
        fit.fit(module(base), Strange(), ckpt_path=path, weights_only=True)
    whole = seen.pop(None).sums
    assert len(set(whole[:3])) == 3
    assert whole == whole[:3] * 2
    assert [each.sums for each in seen.values()] == [whole[1:], whole[3:]]


def test_what_was_given_out_is_not_loaded_again():
    data = ShapesDataModule(train_samples=20, val_samples=4, img_size=32, batch_size=4)
    data.setup("fit")
    whole, half = data.train_dataloader(), data.train_dataloader()
    whole.sampler.set_epoch(3)
    batches = [labels.tolist() for _, labels in whole]
    assert whole.state_dict() | {"epoch": 3, "batches": 5} == whole.state_dict()
    half.load_state_dict({"epoch": 3, "batches": 2})
    loaded, early = [], iter(half)
    images = half.dataset.images
    half.dataset.images = Counting(images, loaded)
    half.sampler.set_epoch(3)  # after the iterator was asked for, as Lightning does
    assert [labels.tolist() for _, labels in early] == batches[2:]
    assert len(loaded) == 12
    assert [labels.tolist() for _, labels in half] == batches  # the next pass is a whole one
    half.load_state_dict({"epoch": 3, "batches": 5})
    half.sampler.set_epoch(4)
    assert len(list(half)) == 5  # the epoch of the state is over


class Counting:
    def __init__(self, images, loaded):
        self.images, self.loaded = images, loaded

    def __getitem__(self, index):
        self.loaded.append(index)
        return self.images[index]
