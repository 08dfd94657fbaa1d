"""BestCheckpoint and LastCheckpoint: which files exist when, and whose they are."""

import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Colours, module, save_base, trainer

from litflora.adapters.replacing import replacing
from litflora.callbacks import BestCheckpoint, LastCheckpoint
from litflora.checkpoint_io import AtomicCheckpointIO
from litflora.commands.guards import checkpoints

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty")


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


def fit(base, folder, *callbacks, ckpt_path=None, **options):
    own = [*callbacks, BestCheckpoint(), LastCheckpoint()]
    settings = {"max_epochs": 2, "enable_checkpointing": True, **options}
    run = trainer(folder, callbacks=own, plugins=[AtomicCheckpointIO()], **settings)
    run.fit(module(base), Colours(), ckpt_path=ckpt_path, weights_only=True)
    return run


def opened(folder, name):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def test_both_are_there_once_an_epoch_has_ended(base, tmp_path):
    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append({path.name for path in tmp_path.glob("checkpoints/*")})

    seen = []
    fit(base, tmp_path, Look())
    assert seen == [set(), {"best.ckpt", "last.ckpt"}]


@pytest.mark.parametrize(
    ("monitor", "best"), [("val/acc", 1), ("val/loss", 2)], ids=["greatest", "least"]
)
def test_the_best_is_that_of_the_modules_metric(base, tmp_path, monkeypatch, monitor, best):
    monkeypatch.setattr("litflora.ClassificationModule.monitor", monitor)
    monkeypatch.setattr("litflora.ClassificationModule.on_validation_epoch_end", _course)
    fit(base, tmp_path, max_epochs=4, num_sanity_val_steps=0)
    assert opened(tmp_path, "best")["epoch"] == best
    last = opened(tmp_path, "last")
    assert last["epoch"] == 3
    (state,) = (v for k, v in last["callbacks"].items() if k.startswith("BestCheckpoint"))
    assert state["best_model_score"] == (0.8 if best == 1 else 0.1)


def _course(self):
    value = (0.5, 0.8, 0.1, 0.6)[self.current_epoch]
    self.log(self.monitor, value)


def test_a_run_without_validation_has_a_last(base, tmp_path):
    fit(base, tmp_path, limit_val_batches=0)
    assert {path.name for path in tmp_path.glob("checkpoints/*")} == {"last.ckpt"}


@pytest.mark.parametrize("steps", [2, 4])
def test_it_saves_every_so_many_steps(base, tmp_path, steps):
    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            path = tmp_path / "checkpoints" / "last.ckpt"
            saved.append(opened(tmp_path, "last")["global_step"] if path.exists() else 0)

    saved = []
    own = LastCheckpoint(every_n_steps=steps)
    run = trainer(tmp_path, callbacks=[Look(), own], max_epochs=2, enable_checkpointing=True)
    run.fit(module(base), Colours())
    assert saved == {2: [0, 0, 2, 3, 4, 4], 4: [0, 0, 0, 3, 4, 4]}[steps]


def test_another_runs_folder_is_refused(base, tmp_path):
    run = fit(base, tmp_path)
    before = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(FileExistsError, match="of an earlier run"):
        fit(base, tmp_path)
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == before
    path = run.checkpoint_callbacks[-1].last_model_path
    assert fit(base, tmp_path, ckpt_path=path, max_epochs=3).global_step == 9


@pytest.mark.parametrize("there", [True, False])
def test_all_processes_know_of_a_best_that_the_first_one_sees(base, tmp_path, monkeypatch, there):
    """A disk that they share may show them a file at different times."""
    run = fit(base, tmp_path)
    state = run.checkpoint_callbacks[0].state_dict()
    other = BestCheckpoint()
    other.setup(run, run.lightning_module, "fit")
    other.dirpath = str(tmp_path / ("elsewhere" if there else "checkpoints"))
    monkeypatch.setattr(run.strategy, "broadcast", lambda own, src=0: there)
    other.on_load_checkpoint(run, run.lightning_module, {})
    other.load_state_dict(state)
    assert (other.best_model_score == state["best_model_score"]) == there


class Config:
    """What the command line has read of a trainer."""

    enable_checkpointing, barebones = None, False

    def __init__(self, *callbacks):
        self.callbacks = list(callbacks) or None


def test_a_recipe_keeps_its_own():
    kinds = lambda found: [type(each) for each in found]  # noqa: E731
    assert kinds(checkpoints(Config())) == [BestCheckpoint, LastCheckpoint]
    own, often = ModelCheckpoint(monitor="val/acc"), LastCheckpoint(every_n_steps=5)
    assert kinds(checkpoints(Config(own))) == [LastCheckpoint]
    config = Config(often)
    assert checkpoints(config)[1] is often  # after the best, which it is to know
    assert config.callbacks == []
    config.enable_checkpointing = False
    assert checkpoints(config) == []


def test_a_save_that_fails_leaves_the_file_of_before(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"a": torch.ones(2)}, path)
    with pytest.raises(TypeError, match="cannot pickle"):
        io.save_checkpoint({"a": torch.zeros(2), "b": (each for each in ())}, path)
    assert io.load_checkpoint(path, weights_only=True)["a"].sum() == 2
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_what_is_written_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)

        def noted(*args, name=name, plain=plain):
            file = Path(f"/dev/fd/{args[0]}").resolve().name if name == "fsync" else ""
            calls.append(f"{name} {file}".strip())
            return plain(*args)

        monkeypatch.setattr(f"os.{name}", noted)
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    around = [f"fsync {temporary.name}", "replace", f"fsync {tmp_path.name}"]
    assert calls == around
    calls.clear()
    with replacing(tmp_path / "a", durable=False) as temporary:
        temporary.write_text("a picture")
    assert calls == ["replace"]
    calls.clear()
    with replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "b").touch()
    assert calls == ["fsync b", *(each.replace(".a.", ".folder.") for each in around)]
    assert (tmp_path / "folder" / "b").is_file()
    with pytest.raises(OSError, match="not empty"), replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "folder"}


def test_every_n_steps_has_a_bound():
    with pytest.raises(ValueError, match="every_n_steps must be at least 1"):
        LastCheckpoint(every_n_steps=0)


def test_a_run_that_has_moved_keeps_the_best_of_before(base, tmp_path):
    """Of a ModelCheckpoint of one's own, which knows its files by the folder's old name."""

    def fit(folder, epochs, rate, **options):
        best = ModelCheckpoint(folder / "checkpoints", "{epoch}", "val/loss")
        callbacks = [best, LastCheckpoint()]
        made = module(base, lr=rate, lr_scheduler=None)
        run = trainer(folder, callbacks=callbacks, enable_checkpointing=True, max_epochs=epochs)
        run.fit(made, Colours(), weights_only=True, **options)
        return best

    before = fit(tmp_path / "a", 1, 1e-3)
    (tmp_path / "a").rename(tmp_path / "b")
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    for group in saved["optimizer_states"][0]["param_groups"]:
        group["lr"] = 3.0  # what comes is worse
    torch.save(saved, last)
    after = fit(tmp_path / "b", 2, 1e-3, ckpt_path=last)
    assert after.best_model_score == before.best_model_score
    assert Path(after.best_model_path) == tmp_path / "b" / "checkpoints" / "epoch=0.ckpt"
    Path(after.best_model_path).unlink()
    assert fit(tmp_path / "b", 3, 1e-3, ckpt_path=last).best_model_path != after.best_model_path
