"""TuningModule: what every LightningModule of litflora shares."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, ClassVar

import jsonargparse
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, instantiate_module
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from .adapters import (
    AdapterError,
    FLoRA,
    Summary,
    Tuning,
    check_base,
    inject,
    load,
    read_config,
    summary,
)
from .adapters.dora import DoRADelta
from .adapters.layers import origin_of
from .adapters.loftq import loftq_deltas
from .adapters.sharded import part_of, plain_name
from .adapters.targets import is_inside
from .backbones import normalization, with_targets
from .backbones.blocks import check_checkpointing, checkpoint_activations
from .backbones.deferred import Deferred, deferring, fill
from .description import describe, foreign_arguments, plain_hyperparameters
from .drawing import Drawing
from .heads import classifier_names
from .optim import (
    OneCycle,
    build_optimizer,
    default_optimizer,
    may_fuse,
    methods_of,
    scheduler_config,
)
from .precision import BaseDtype, hold_base
from .processes import check_batch_norms, share_statistics
from .resuming import mend_epoch_end, seed_batch, step_watching_schedules
from .sharding import Lockstep, shard
from .strategies import FSDP2

# Lets `class_path: litflora.adapters.LoRA` stand for the base class. It is said here, not in the
# command line, since load_from_checkpoint parses a module's arguments too.
jsonargparse.set_parsing_settings(subclasses_enabled=[Tuning])

# The command line gives plain values for these, Python gives functions.
_DATA_PATHS = ("root", "predict_root")
_FACTORIES = ("optimizer", "lr_scheduler")
# How memory is saved in training; an adapter is the same without.
_OF_TRAINING = ("activation_checkpointing", "base_dtype")
# What can stand for weights without being a path.
_TAGS = ("pretrained", "embedded")


class TuningModule(LightningModule):
    """A pretrained network that is tuned in part.

    A task derives from it, makes its network in ``build``, and adds forward, loss and metrics.
    The network exists after ``configure_model``, which the Trainer calls.

    Checkpoints hold what training changed: a frozen base is read again from its ``weights``. If the
    module was made in Python they hold no optimizer or schedule, which are functions: give
    ``load_from_checkpoint`` those again to train on.

    Attributes:
        task: Name of the task.
        monitor: The metric that says how good the model is.
        base_argument: The argument that says where the base comes from.
        drawing: How the task draws its samples, and what the model makes of them.
        commands: What can be done with an adapter besides test and predict, to be told.
        base_names: The arguments that say which base it is.
        net: The network, None before ``configure_model``.
        tuned: What is adapted and trained of it, None before ``configure_model``.
        lockstep: Keeps processes together that hold parts of the network; None if there are none.
    """

    task: ClassVar[str]
    monitor: ClassVar[str] = "val/loss"
    base_argument: ClassVar[str] = "weights"
    drawing: ClassVar[type[Drawing]]
    commands: ClassVar[dict[str, str]] = {
        "merge": "litflora merge {adapter} --out merged.safetensors"
    }
    base_names: ClassVar[tuple[str, ...]] = ("backbone", "weights")
    net: nn.Module | None
    tuned: Summary | None = None
    lockstep: Lockstep | None = None
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        weights: str | None = "pretrained",
        tuning: Tuning | None = None,
        adapter: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = OneCycle,
        lr: float | None = None,
        head_lr: float | None = None,
        layer_decay: float | None = None,
        activation_checkpointing: str = "none",
        base_dtype: BaseDtype | None = None,
    ) -> None:
        """Keeps the settings; nothing is built yet.

        Args:
            weights: Weights of the base, see `litflora.backbones.create`.
            tuning: What is trained; None is ``FLoRA()``. If it names no targets, the layers that
                suit the backbone are adapted.
            adapter: Folder of a saved adapter to start from, in place of ``tuning``.
            optimizer: Makes the optimizer from parameter groups; None is AdamW at the
                tuning's own rate, see `litflora.optim.LEARNING_RATES`.
            lr_scheduler: Makes the schedule from the optimizer; None keeps the rate constant.
            lr: Learning rate in place of the optimizer's own.
            head_lr: Learning rate of the head; None is the optimizer's.
            layer_decay: Ratio of the learning rates of neighbouring layers; None is 1.
            activation_checkpointing: ``none``, ``blocks`` (each block of the backbone keeps its
                input alone, and runs again in backward) or ``every-k``: each k-th block.
            base_dtype: What frozen linear layers and convolutions are held in, bfloat16; None is
                float32. Deltas, norms and heads stay float32. It needs precision bf16-mixed.
        """
        super().__init__()
        for name, rate in {"lr": lr, "head_lr": head_lr}.items():
            if rate is not None and rate < 0:
                raise ValueError(f"{name} must be 0 or more, not {rate}")
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay must lie in (0, 1], not {layer_decay}")
        check_checkpointing(activation_checkpointing)
        self.weights = weights
        self.tuning = FLoRA() if tuning is None else tuning
        self.adapter = adapter
        self.optimizer_factory = optimizer
        self.scheduler_factory = lr_scheduler
        self.lr = lr
        self.head_lr = head_lr
        self.layer_decay = layer_decay
        self.activation_checkpointing = activation_checkpointing
        self.base_dtype = base_dtype
        self.net = None
        self._seed: int | None = None
        self.strict_loading = False  # checkpoints are partial; load_state_dict does the checking
        self.save_hyperparameters()
        if "_instantiator" not in self.hparams:  # made in Python, not by the command line
            self.save_hyperparameters(plain_hyperparameters(self), ignore=_FACTORIES)
        for name in foreign_arguments(self):  # of base classes, or of links that have no end here
            del self.hparams[name]

    def build(self) -> nn.Module:
        """Makes the network with its base weights, before any tuning."""
        raise NotImplementedError

    def plain_code(self) -> tuple[str, str]:
        """The imports and the expression that make the network which a merged file fits."""
        raise NotImplementedError

    def write_merged(self, path: Path) -> None:
        """Writes the network, adapters merged into it, as one safetensors file."""
        state = {key: value.contiguous() for key, value in self.net.state_dict().items()}
        told = {
            "code": self.plain_code()[1],
            "class_names": json.dumps(getattr(self, "class_names", [])),
            "mean": json.dumps(self.mean.flatten().tolist()),
            "std": json.dumps(self.std.flatten().tolist()),
        }
        path.write_bytes(save_tensors(state, metadata={"format": "pt", **told}))

    def loading_code(self, path: Path) -> str:
        """Lines of Python that load what `write_merged` has written."""
        imports, made = self.plain_code()
        return (
            f"import safetensors.torch, {imports}\n"
            f"{made}.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
        )

    def configure_model(self) -> None:
        """Builds the network and puts the tuning or the saved adapter into it, once."""
        if self.net is not None:
            return
        self._check_strategy()
        sharded = isinstance(self._strategy, FSDP2)
        with deferring(sharded) as weights:
            net = self.build()
        if self._strategy is not None:
            check_batch_norms(net, self._strategy)
        self._tune(net, torch.device("cpu") if sharded else None)
        self._matrices = {name for name, p in net.named_parameters() if p.ndim > 1}
        self.tuned = summary(net)
        self._hold_base(net)
        for delta in loftq_deltas(net):
            delta.check()
        self._refuse_coarse_magnitudes(net)
        checkpoint_activations(net, self.activation_checkpointing)
        if sharded:
            self._shard(net, weights)
        if self.weights is None and not all(p.requires_grad for p in net.parameters()):
            rank_zero_warn("weights is null: the frozen base is random, and no run can remake it")
        mean, std = normalization(net)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.net = net
        self.train(self.training)

    def _refuse_coarse_magnitudes(self, net: nn.Module) -> None:
        """Raises where DoRA's magnitudes, which do not start at zero, would take no small steps."""
        precision = None if self._trainer is None else self._trainer.precision
        dora = any(isinstance(module, DoRADelta) for module in net.modules())
        if dora and precision in ("bf16-true", "16-true"):
            raise ValueError(f"{precision} is too coarse for DoRA's magnitudes: use bf16-mixed")

    def _hold_base(self, net: nn.Module) -> None:
        """Holds what is frozen as ``base_dtype`` says."""
        if self.base_dtype is not None:
            hold_base(net, getattr(torch, self.base_dtype))

    @property
    def _strategy(self) -> Strategy | None:
        return None if self._trainer is None else self._trainer.strategy

    def _tune(self, net: nn.Module, device: torch.device | None) -> None:
        """Puts the tuning or the saved adapter into the network, deltas on a device."""
        tuning = self.tuning_of(net)
        if self.adapter is None:
            heads = _whole_heads(net, tuning.to_dict())
            inject(net, with_targets(net, tuning), train=heads, device=device)
            return
        try:
            saved = load(net, self.adapter, device=device).get("tuning") or tuning.to_dict()
        except AdapterError as error:
            raise AdapterError(f"{error}{self._other_base()}") from error
        for head in _whole_heads(net, saved):  # other libraries' adapters may come without one
            net.get_submodule(head).requires_grad_(True)

    def _other_base(self) -> str:
        """What names the base of the saved adapter, where this one has another name."""
        model = read_config(self.adapter).get("metadata", {}).get("model", {})
        told = [
            f"\n{name}: the adapter's is {model['init_args'][name]}, this one {value}"
            for name, value in self.description()["init_args"].items()
            if name in self.base_names and model.get("init_args", {}).get(name, value) != value
        ]
        return "".join(told)

    def _shard(self, net: nn.Module, weights: Deferred) -> None:
        """Shares the network out, and reads this process's part of its weights."""
        assert self.device_mesh is not None
        sync = self.trainer.strategy._layer_sync  # Lightning leaves sync_batchnorm to us here
        if sync is not None:
            sync.apply(net)
        sources = weights.by_name(net)
        self.lockstep = shard(net, self.device_mesh["data_parallel"])
        fill(net, sources, self.trainer.strategy.root_device)
        if self.adapter is not None and "format" in (saved := read_config(self.adapter)):
            check_base(net, saved)

    def _check_strategy(self) -> None:
        """Raises if the settings do not suit the strategy or the precision of the run."""
        if isinstance(self._strategy, ModelParallelStrategy) and not isinstance(
            self._strategy, FSDP2
        ):
            raise ValueError(
                "take litflora.strategies.FSDP2 for ModelParallelStrategy: it evaluates each "
                "image once, and its checkpoints hold what is trained"
            )
        precision = None if self._trainer is None else self._trainer.precision
        if self.base_dtype is not None and isinstance(self._strategy, FSDPStrategy):
            raise ValueError(
                "FSDP1 takes parameters of one type: leave base_dtype out, or use FSDP2"
            )
        if self.base_dtype == "bfloat16" and precision not in (None, "bf16-mixed"):
            raise ValueError(
                f"base_dtype {self.base_dtype} needs trainer.precision bf16-mixed, not {precision}"
            )

    def tuning_of(self, net: nn.Module) -> Tuning:
        """What is trained of ``net``, besides the heads that a `PerModule` does not name."""
        return self.tuning

    def tunings(self) -> dict[str, Tuning]:
        """The tunings by part, to be told; "" is what has none of its own."""
        return {"": self.tuning}

    def learning_rates(self) -> dict[str, float]:
        """Learning rates of modules of ``net`` that have one of their own."""
        return {}

    def normalize(self, images: Tensor) -> Tensor:
        """Brings uint8 images, or floats in [0, 1], to what the base was trained on."""
        return ((unit_range(images) - self.mean) / self.std).to(self.mean.dtype)

    def example(self, images: Tensor) -> tuple[Any, ...]:
        """What the network takes in training, for a batch of normalised images."""
        return (images,)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Steps a schedule, but for those that watch a metric: they step as an epoch ends.

        Lightning would step them after checkpoints are written, and in a resumed epoch not at all.
        """
        if metric is None:
            scheduler.step()

    def on_train_epoch_end(self) -> None:
        """Steps the schedules that watch a metric.

        Says it when the loss is none: the weights have gone with it, and no step mends them.
        """
        step_watching_schedules(self.trainer)
        loss = self.trainer.callback_metrics.get("train/loss")
        if loss is not None and not loss.isfinite():
            rank_zero_warn(
                f"train/loss is {loss.item()} after epoch {self.current_epoch}: stop, and train "
                "with a lower learning rate (--model.lr VALUE)"
            )

    def train(self, mode: bool = True) -> TuningModule:
        """Sets the mode of all modules but frozen batch norms, which keep their statistics."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and not _trains(module):
                module.eval()
        return self

    def configure_optimizers(self) -> Any:
        """One optimizer over adapters, head and whatever else trains."""
        assert self.net is not None
        origin = origin_of(self.net, "default").tuning  # of a loaded adapter, too
        method, factors = methods_of(origin or self.tuning_of(self.net).to_dict())
        optimizer = build_optimizer(
            self.optimizer_factory or default_optimizer(method, may_fuse(self._trainer)),
            self.net,
            classifier_names(self.net),
            self.head_lr,
            self.layer_decay,
            None if self.optimizer_factory else factors,
            self.lr,
            self._matrices,
            self.learning_rates(),
        )
        if self.scheduler_factory is None:
            return optimizer
        scheduler = self.scheduler_factory(optimizer)
        total_steps = self.trainer.estimated_stepping_batches
        config = scheduler_config(scheduler, total_steps, self.monitor)
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_validation_start(self) -> None:
        """Shares running statistics, once: processes may have different numbers of batches.

        DDP would share all buffers in each. The next training step makes it do so again.
        """
        assert self.net is not None
        share_statistics(self.net)
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_forward_param_sync = False

    def on_train_end(self) -> None:
        """Shares the statistics of the last steps."""
        assert self.net is not None
        share_statistics(self.net)

    def on_train_start(self) -> None:
        """Takes the seed of the run, that of the first process, unless a checkpoint has brought it.

        Lightning gives a loader its state when it makes it. Where the schedule needs to know the
        length of the run, that is before the state has been read, and it would never get it.
        """
        if self._seed is None:
            self._seed = self.trainer.strategy.broadcast(torch.initial_seed() % 2**62)
        loop = self.trainer.fit_loop  # nothing public gives a loader its state
        if loop.restarted_mid_epoch and loop._combined_loader_states_to_load:
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)  # which begins a pass anew: a state may count for the next one

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seeds every batch, so that a run resumed anywhere draws the same numbers on all ranks.

        A checkpoint of rank 0 could hold the generators of no other, and what else draws between
        two batches, as a validation does, need not be drawn again.
        """
        assert self._seed is not None
        seed_batch(self._seed, self.current_epoch, batch_idx, self.global_rank)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops the frozen base, which is read again from its file."""
        frozen, state = self.frozen_keys(), checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: v for key, v in state.items() if key not in frozen}
        checkpoint["seed"] = self._seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the seed of the run."""
        self._seed = checkpoint.get("seed")
        if self._trainer is not None and self._trainer.max_steps != -1 and "loops" in checkpoint:
            mend_epoch_end(checkpoint["loops"]["fit_loop"])

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads a full or a partial state; only frozen parameters may be missing from it."""
        own = self.state_dict()
        missing = own.keys() - state_dict.keys() - self.frozen_keys()
        unexpected = state_dict.keys() - own.keys()
        common = own.keys() & state_dict.keys()
        reshaped = [key for key in common if own[key].shape != state_dict[key].shape]
        problems = {"lacks": missing, "does not expect": unexpected, "differs at": reshaped}
        told = [f"{verb} {min(keys)} ({len(keys)})" for verb, keys in problems.items() if keys]
        if told:
            raise ValueError(
                f"the checkpoint was made with another backbone, tuning or number of classes: "
                f"{'; '.join(told)}"
            )
        parts = {key: part_of(state_dict[key], own[key]) for key in common}
        super().load_state_dict(parts, strict=False, assign=assign)
        return nn.modules.module._IncompatibleKeys([], [])

    def anew(self) -> TuningModule:
        """The same module without its network, as one process alone would make it."""
        return instantiate_module(type(self), describe(self, ())["init_args"])

    def description(self) -> dict[str, Any]:
        """Class path and plain arguments that make this module again, paths made absolute."""
        described = describe(self, () if self.weights in _TAGS else (self.base_argument,))
        for argument in ("adapter", *_OF_TRAINING):  # a saved adapter stands for itself
            described["init_args"].pop(argument)
        return described

    def metadata(self, datamodule: Any = None) -> dict[str, Any]:
        """What an adapter's folder says of the run: how to make model and data again."""
        found = {"task": self.task, "model": self.description()}
        if getattr(datamodule, "hparams", None):
            found["data"] = describe(datamodule, _DATA_PATHS)
        return found

    def frozen_keys(self) -> set[str]:
        """Keys of the frozen base, if it can be read again."""
        if self.weights is None:
            return set()
        named = self.named_parameters(remove_duplicate=False)
        frozen = (name for name, p in named if not p.requires_grad and ".adapters." not in name)
        return set(map(plain_name, frozen))


def from_adapter(folder: str | Path, **overrides: Any) -> TuningModule:
    """Makes the module that a saved adapter belongs to, from the adapter's folder alone.

    Args:
        folder: The adapter's folder, as written at the end of a fit.
        overrides: Arguments of the module that differ from the saved ones, such as ``weights``
            when the base has moved: it stands for the base, whatever the module calls it.
    """
    saved = read_config(folder).get("metadata", {}).get("model")
    if saved is None:
        raise ValueError(
            f"adapter {folder} does not say which model it belongs to: it was not saved by a fit"
        )
    module, _, name = saved["class_path"].rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    if not (isinstance(cls, type) and issubclass(cls, TuningModule)):  # a stranger's file named it
        raise ValueError(f"adapter {folder} belongs to {saved['class_path']}, no litflora module")
    if "weights" in overrides:
        overrides[cls.base_argument] = overrides.pop("weights")
    return instantiate_module(cls, {**saved["init_args"], "adapter": str(folder), **overrides})


def unit_range(images: Tensor) -> Tensor:
    """Images as floats in [0, 1]; floats are taken to be so already."""
    return images if images.is_floating_point() else images.float() / 255


def _whole_heads(net: nn.Module, tuning: dict[str, Any]) -> list[str]:
    """The heads that train whole: those that the tuning, in plain values, names nothing in."""
    named = tuning.get("modules", {})
    heads = classifier_names(net)
    return [head for head in heads if not any(is_inside(module, [head]) for module in named)]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
