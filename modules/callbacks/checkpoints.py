"""What a run can be resumed from: the last state, and the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from ..monitored import lower_is_better


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/best.ckpt``, the best by the module's ``monitor``.

    A loss is best where it is least, any other metric where it is greatest. A run that validates
    nothing has no best.
    """

    def __init__(self) -> None:
        super().__init__(filename="best", enable_version_counter=False)
        self._is_there = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the metric from the module."""
        self.monitor = getattr(pl_module, "monitor", "val/loss")
        self.mode = "min" if lower_is_better(self.monitor) else "max"
        super().setup(trainer, pl_module, stage)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses the folder of another run before anything takes long."""
        _check_own(self, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses the folder of another run."""
        _check_own(self, trainer)
        super().on_train_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves if it is better, as long as the metric is there at all."""
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves if it is better, as long as the metric is there at all."""
        if self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Looks for the file of before; what the first process sees holds for all."""
        there = Path(self.format_checkpoint_name({})).is_file()
        self._is_there = trainer.strategy.broadcast(there)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best of before where its file is, also if the folder has moved.

        A run that goes on in another folder has its best before it.
        """
        if state_dict["best_model_score"] is None or not self._is_there:
            return
        path = self.format_checkpoint_name({})
        moved = {"dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
        best = {path: state_dict["best_model_score"]}
        super().load_state_dict({**state_dict, **moved, "best_k_models": best})


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/last.ckpt``, the newest state that the run can go on from bit for bit.

    It is written after each epoch and each validation, every so many steps where that is asked
    for, and when a process that loads data is killed. It goes after the other callbacks, so that
    their state is in it.

    Attributes:
        due: Whether to save as soon as the run can go on from it; `Interruption` asks for it.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        """Sets how much a killed run loses.

        Args:
            every_n_steps: Save after so many steps of the optimizer, too.
        """
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, not {every_n_steps}")
        super().__init__(filename="last", enable_version_counter=False)
        self.every_n_steps = every_n_steps
        self.due = False

    @property
    def state_key(self) -> str:
        """One name, however often it saves: a resumed run may be told another rhythm."""
        return type(self).__qualname__

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses the folder of another run before anything takes long."""
        _check_own(self, trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses the folder of another run."""
        _check_own(self, trainer)
        super().on_train_start(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Tells other checkpoints of a run that goes on in its folder where their files are.

        They know them by the folder's name of then, and would forget a best that is elsewhere.
        """
        if trainer.ckpt_path is None or not _same(Path(trainer.ckpt_path).parent, self.dirpath):
            return
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key, {})
            if isinstance(callback, ModelCheckpoint) and "best_k_models" in state:
                _move(state, str(callback.dirpath), trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves every so many steps, and if it is due, unless a later hook will."""
        often = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if (often or self.due) and resumable(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after a validation within an epoch; the end of an epoch saves after it."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and not trainer.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after an epoch."""
        self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves it at that: the last epoch's end has saved."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Saves if data stop coming between two batches, as when their process is killed.

        Data that are wrong raise errors of other types: nothing is saved for a mistake. Of several
        processes the others are still at work, and none can save alone.
        """
        alone = trainer.world_size == 1
        if isinstance(exception, RuntimeError) and alone and _between(trainer):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Writes the file; all processes must come here together."""
        self.due = False
        if trainer.fast_dev_run:
            return
        self.last_model_path = self.best_model_path = self.format_checkpoint_name({})
        # Not public, but what subclasses go through: it tells the loggers.
        self._save_checkpoint(trainer, self.last_model_path)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the file is where the folder is."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing over."""


def _same(one: Path, other: Any) -> bool:
    return other is not None and one.resolve() == Path(other).resolve()


def _move(state: dict[str, Any], folder: str, trainer: Trainer) -> None:
    """Changes what a ModelCheckpoint remembers to files of these names in a folder.

    Files that are gone are forgotten, and with a best one its score.
    """
    there = {
        path: str(Path(folder, Path(path).name))
        for path in {*state["best_k_models"], state["best_model_path"], state["last_model_path"]}
        if path and Path(folder, Path(path).name).is_file()
    }
    there = trainer.strategy.broadcast(there)  # what the first process sees holds for all
    kept = {there[path]: score for path, score in state["best_k_models"].items() if path in there}
    state |= {"dirpath": folder, "best_k_models": kept}
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[key] = there.get(state[key], "")
    if not state["best_model_path"]:
        state["best_model_score"] = None


def resumable(trainer: Trainer) -> bool:
    """Whether a checkpoint of ``on_train_batch_end`` goes on as if it had not been taken.

    Within an accumulation it would lack the gradients. Before a validation, or the end of an epoch,
    Lightning would go on after it.
    """
    loop = trainer.fit_loop.epoch_loop  # nothing public says what is due after a batch
    if loop._should_accumulate() or loop._is_training_done:
        return False
    return not loop._should_check_val_fx(trainer.fit_loop._data_fetcher)


def _between(trainer: Trainer) -> bool:
    """Whether a training has stopped between two batches of an epoch, and after a step."""
    loop = trainer.fit_loop
    batches, epochs = loop.epoch_loop.batch_progress.current, loop.epoch_progress.current
    at_rest = trainer.training and batches.ready == batches.completed > 0
    return at_rest and epochs.processed < epochs.started and resumable(trainer)


def _check_own(callback: ModelCheckpoint, trainer: Trainer) -> None:
    path = Path(callback.format_checkpoint_name({}))
    resumed = (
        trainer.ckpt_path and Path(trainer.ckpt_path).resolve().parent == path.resolve().parent
    )
    mine = str(path) in (callback.last_model_path, callback.best_model_path)
    if path.is_file() and not (resumed or mine or trainer.fast_dev_run):
        raise FileExistsError(
            f"{path} is of an earlier run: take another folder, or go on with that run by "
            f"ckpt_path={str(path)!r}"
        )
