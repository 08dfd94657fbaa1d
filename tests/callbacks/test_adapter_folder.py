import json
import os

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import NAMES, Colours, module, save_base, trainer

from litflora.adapters import FLoRA, read_config
from litflora.callbacks import AdapterFolder, BestCheckpoint
from litflora.module import from_adapter


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


def fit(base, folder, *callbacks, ckpt_path=None, tuning=None, data=None, **options):
    torch.manual_seed(0)
    made = module(base, tuning=tuning or FLoRA(rank=2), head_lr=1e-2)
    run = trainer(folder, callbacks=[AdapterFolder(), *callbacks], **options)
    run.fit(made, data or Colours(root=str(folder)), ckpt_path=ckpt_path, weights_only=True)
    return made, run


def outputs(made):
    return made.eval()(torch.full((1, 3, 32, 32), 0.5))


def test_two_files_that_rebuild_the_module(base, tmp_path):
    made, _ = fit(base, tmp_path)
    folder = tmp_path / "adapter"
    files = {"adapter_model.safetensors", "adapter_config.json"}
    assert {file.name for file in folder.iterdir()} == files
    again = from_adapter(folder)
    again.configure_model()
    assert torch.equal(outputs(again), outputs(made))


def test_it_says_how_to_rebuild_model_and_data(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(base.relative_to(tmp_path), tmp_path / "run")
    metadata = read_config(tmp_path / "run" / "adapter")["metadata"]
    assert metadata["task"] == "classification"
    assert metadata["class_names"] == NAMES
    assert metadata["img_size"] == 32
    model, data = metadata["model"], metadata["data"]
    assert model["class_path"] == "litflora.classification.ClassificationModule"
    assert model["init_args"]["weights"] == str(base)  # absolute, wherever the run was started
    assert model["init_args"]["tuning"]["class_path"] == "litflora.adapters.FLoRA"
    assert data["class_path"] == "tiny.Colours"
    assert data["init_args"]["root"] == str(tmp_path / "run")
    assert data["init_args"]["n"] == 24
    json.dumps(metadata)


def test_it_tells_the_gain_and_the_commands(base, tmp_path, capsys):
    _, run = fit(base, tmp_path, max_epochs=4)
    said = capsys.readouterr().out
    folder = tmp_path / "adapter"
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    after = run.callback_metrics["val/acc"].item()
    assert f"{folder} ({size:.2f} MB, the last weights)" in said
    assert f"{after:.4f} after" in said
    assert "before tuning" in said
    assert f"litflora test --adapter {folder}\n" in said
    assert f"litflora predict --adapter {folder}\n" in said
    assert f"litflora merge {folder} --out merged.safetensors" in said


def test_photos_are_predicted_from_a_folder(base, tmp_path, capsys):
    data = Colours()
    data.hparams["predict_root"] = None  # as datamodules of image files have it
    fit(base, tmp_path, data=data)
    assert "/adapter --data.init_args.predict_root FOLDER\n" in capsys.readouterr().out


def test_the_metric_before_is_that_of_the_whole_validation_set(base, tmp_path, capsys):
    torch.manual_seed(0)
    _, run = fit(base, tmp_path)
    before = next(c for c in run.callbacks if isinstance(c, AdapterFolder)).before
    torch.manual_seed(0)
    plain = module(base, tuning=FLoRA(rank=2))
    (metrics,) = trainer(tmp_path).validate(plain, Colours(), verbose=False)
    assert before == metrics
    assert f"{before['val/acc']:.4f} before tuning" in capsys.readouterr().out


def test_it_never_replaces_a_folder(base, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    fit(base, tmp_path)
    fit(base, tmp_path)
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["mine.txt"]
    assert (tmp_path / "adapter-v1" / "adapter_config.json").is_file()
    assert (tmp_path / "adapter-v2" / "adapter_config.json").is_file()


class Ruin(Callback):
    """Makes the last epoch the worst."""

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == trainer.max_epochs - 1:
            torch.nn.init.constant_(pl_module.net.head.weight, 0.0)


def test_the_best_weights_where_a_checkpoint_monitors(base, tmp_path, capsys):
    best = ModelCheckpoint(tmp_path, monitor="val/acc", mode="max")
    made, _ = fit(base, tmp_path, best, Ruin(), max_epochs=5, enable_checkpointing=True)
    again = from_adapter(tmp_path / "adapter")
    again.configure_model()
    expected = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert "the best weights" in capsys.readouterr().out
    assert not made.net.head.weight.any()  # the module keeps the last


def test_the_best_of_every_run_changes_nothing(base, tmp_path, capsys):
    made, _ = fit(base, tmp_path, BestCheckpoint(), Ruin(), max_epochs=5, enable_checkpointing=True)
    again = from_adapter(tmp_path / "adapter")
    again.configure_model()
    assert torch.equal(outputs(again), outputs(made))
    assert "the last weights" in capsys.readouterr().out


def test_the_gain_is_told_in_the_metric_that_is_monitored(base, tmp_path, capsys):
    best = ModelCheckpoint(tmp_path, monitor="val/loss", mode="min")
    _, run = fit(base, tmp_path, best, enable_checkpointing=True)
    before = next(c for c in run.callbacks if isinstance(c, AdapterFolder)).before["val/loss"]
    said = f"val/loss {before:.4f} before tuning, {best.best_model_score:.4f} after"
    assert said in capsys.readouterr().out


def test_a_resumed_run_remembers_its_start(base, tmp_path):
    every = ModelCheckpoint(tmp_path / "first", filename="{epoch}", save_top_k=-1)
    _, run = fit(base, tmp_path / "first", every, enable_checkpointing=True)
    before = next(c for c in run.callbacks if isinstance(c, AdapterFolder)).before
    checkpoint = tmp_path / "first" / "epoch=0.ckpt"
    _, again = fit(base, tmp_path / "second", max_epochs=2, ckpt_path=checkpoint)
    assert next(c for c in again.callbacks if isinstance(c, AdapterFolder)).before == before


def test_a_fast_dev_run_writes_nothing(base, tmp_path, capsys):
    fit(base, tmp_path / "run", fast_dev_run=True)
    assert not (tmp_path / "run").exists()
    assert "adapter" not in capsys.readouterr().out


class Tear(Callback):
    def on_train_end(self, trainer, pl_module):
        os.truncate(trainer.checkpoint_callback.best_model_path, 5000)


def test_a_best_that_cannot_be_read_leaves_the_last_weights(base, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    with pytest.warns(UserWarning, match="cannot be read .* the adapter has the last weights"):
        made, _ = fit(base, tmp_path, best, Tear(), enable_checkpointing=True)
    again = from_adapter(tmp_path / "adapter")
    again.configure_model()
    assert torch.equal(outputs(again), outputs(made))
