"""AdapterFolder: what is left of a fit, and what to do with it."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from ..adapters import save
from ..adapters.replacing import replacing
from ..adapters.sharded import is_sharded
from ._files import log_dir
from .checkpoints import BestCheckpoint

State = dict[str, torch.Tensor]

if TYPE_CHECKING:  # a task imports its callbacks, not they the task
    from ..module import TuningModule


class AdapterFolder(Callback):
    """Saves the tuned weights to ``<log folder>/adapter`` at the end of a fit.

    The folder holds the last weights or, where a ModelCheckpoint of one's own monitors a metric,
    the best; the `BestCheckpoint` of all the command line's runs does not count. It says how to
    rebuild model and data, so that ``litflora test --adapter FOLDER`` needs no more. An existing
    folder is left alone: the new one is then ``adapter-v1`` and so on.

    So that the gain can be told, the whole validation set is evaluated before training, in the
    place of Lightning's sanity check; ``num_sanity_val_steps: 0`` leaves it out.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self.message = ""
        self.run: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turns the sanity check into a validation of the start."""
        self.before = {}
        asked = trainer.num_sanity_val_steps != 0  # 0 says that no one wants to wait for it
        if asked and stage == "fit" and not trainer.fast_dev_run and trainer.ckpt_path is None:
            trainer.num_sanity_val_steps = float("inf")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the run's folder, while all processes can do it together."""
        self.run = log_dir(trainer)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the metrics of the start; a resumed run has brought its own."""
        if trainer.ckpt_path is None:
            self.before = _metrics(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The metrics of the start, for a run that is resumed."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the metrics of the start."""
        self.before = state_dict["before"]

    def on_fit_end(self, trainer: Trainer, pl_module: TuningModule) -> None:
        """Saves the folder."""
        assert self.run is not None
        folder = _fresh(self.run / "adapter")
        if trainer.fast_dev_run:
            return
        metadata, best = pl_module.metadata(trainer.datamodule), best_checkpoint(trainer)
        state = None if best is None else _state_of(best.best_model_path)
        best = None if state is None else best
        # A folder of the name is a whole adapter.
        with replacing(folder) if trainer.is_global_zero else nullcontext(folder) as place:
            _save(trainer, pl_module, state, place, metadata)
        if not trainer.is_global_zero:
            return
        if best is None:
            name, after = pl_module.monitor, _metrics(trainer).get(pl_module.monitor)
        else:
            name, after = best.monitor, float(best.best_model_score)
        gain = (name, self.before.get(name), after)
        weights = "last" if best is None else "best"
        self.message = _message(folder, weights, gain, metadata.get("data"), pl_module.commands)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Says where the folder is, after the progress bar has gone."""
        if self.message:
            print(self.message)
        self.message = ""


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _fresh(folder: Path) -> Path:
    version, fresh = 0, folder
    while fresh.exists():
        version += 1
        fresh = folder.with_name(f"{folder.name}-v{version}")
    return fresh


def best_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    """The callback whose best weights a fit leaves; None if it leaves the last."""
    for callback in trainer.checkpoint_callbacks:
        chosen = isinstance(callback, ModelCheckpoint) and not isinstance(callback, BestCheckpoint)
        if chosen and callback.best_model_score is not None:
            return callback
    return None


def _state_of(checkpoint: str) -> State | None:
    """The weights in a checkpoint, None if it cannot be read: a fit is not lost for that."""
    try:
        # Moments stay in the file.
        return torch.load(checkpoint, "cpu", weights_only=True, mmap=True)["state_dict"]
    except (OSError, RuntimeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        rank_zero_warn(f"{checkpoint} cannot be read ({reason}): the adapter has the last weights")
        return None


def _save(
    trainer: Trainer,
    module: TuningModule,
    best: State | None,
    folder: Path,
    metadata: dict[str, Any],
) -> None:
    """Saves the weights, or the best instead; every process must call it."""
    if isinstance(trainer.strategy, FSDPStrategy):
        _save_flattened(trainer, module, best, folder, metadata)
    elif trainer.is_global_zero or is_sharded(module.net):  # of which each has a part to give
        if best is None:
            save(module.net, folder, metadata=metadata)
        else:
            _save_best(module, best, folder, metadata)


def _save_best(module: TuningModule, best: State, folder: Path, metadata: dict[str, Any]) -> None:
    frozen = module.frozen_keys()
    last = {key: v.clone() for key, v in module.state_dict().items() if key not in frozen}
    module.load_state_dict(best)
    save(module.net, folder, metadata=metadata)
    module.load_state_dict(last)  # fit leaves the last weights in the module, as always


def _save_flattened(
    trainer: Trainer,
    module: TuningModule,
    best: State | None,
    folder: Path,
    metadata: dict[str, Any],
) -> None:
    """Saves what FSDP1 has made pieces of, from a network that is made anew."""
    state = trainer.strategy.lightning_module_state_dict() if best is None else best
    if trainer.is_global_zero:
        whole = module.anew()
        whole.configure_model()
        whole.load_state_dict(state)
        save(whole.net, folder, metadata=metadata)


def _message(
    folder: Path,
    weights: str,
    gain: tuple[str, float | None, float | None],
    data: dict[str, Any] | None,
    commands: dict[str, str],
) -> str:
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    lines = ["", f"adapter  {folder} ({megabytes:.2f} MB, the {weights} weights)"]
    metric, before, after = gain
    if after is not None:
        told = "" if before is None else f"{before:.4f} before tuning, "
        lines.append(f"{metric:8} {told}{after:.4f} after")
    name = shlex.quote(str(folder))
    if data is not None:
        photos = "predict_root" in data["init_args"]  # others predict their own test images
        where = " --data.init_args.predict_root FOLDER" if photos else ""
        where += " --data.init_args.question TEXT" if "question" in data["init_args"] else ""
        lines += [
            f"test     litflora test --adapter {name}",
            f"predict  litflora predict --adapter {name}{where}",
        ]
    lines += [f"{what:8} {command.format(adapter=name)}" for what, command in commands.items()]
    return "\n".join(lines)
