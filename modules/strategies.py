"""Lightning strategies that share a model out among processes and keep only what is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.optim import Optimizer

from .adapters.sharded import part_of, whole
from .backbones.blocks import blocks
from .sharding import check_sharded


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism, per parameter, over all processes.

    A `TuningModule` shares its network out in ``configure_model``: each block of the backbone by
    itself. A checkpoint is one file, and holds what one of a single process holds: to write it, no
    more than what trains and its optimizer state are gathered.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        """Keeps the settings.

        Args:
            process_group_backend: How processes talk: nccl, gloo; None is what suits the device.
        """
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """Makes one group of all processes; Lightning's default is one of a process a node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Checks that nothing trains by itself in each process."""
        assert self.lightning_module is not None
        check_sharded(self.lightning_module)
        super().setup(trainer)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates a batch; after its last one a process joins in the calls of others."""
        return self._in_step(super().validation_step(*args, **kwargs))

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates a batch; after its last one a process joins in the calls of others."""
        return self._in_step(super().test_step(*args, **kwargs))

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts a batch; after its last one a process joins in the calls of others."""
        return self._in_step(super().predict_step(*args, **kwargs))

    def _in_step(self, output: Any) -> Any:
        module: Any = self.lightning_module
        # Lightning tells no hook before the callbacks of the epoch's end, which talk among
        # processes themselves, that a batch is the last one; its loops know.
        if module.trainer._active_loop.batch_progress.is_last_batch:
            module.lockstep.finish()
        return output

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gathers what checkpoints hold, one tensor after the other, and nothing of the base."""
        module: Any = self.lightning_module
        frozen = module.frozen_keys()
        return {key: whole(v) for key, v in module.state_dict().items() if key not in frozen}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Gathers the state of an optimizer, as that of one process."""
        state = optimizer.state_dict()
        gathered = {
            index: {key: _whole(value) for key, value in kept.items()}
            for index, kept in state["state"].items()
        }
        return {**state, "state": gathered}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Reads a checkpoint; each process takes its parts of it in the two methods below."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Gives the module what was saved."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning checks that there are optimizer states, as for a single process."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives each optimizer its parts of what was saved."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {
                index: {key: _part(value, parameters[index]) for key, value in kept.items()}
                for index, kept in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": parts})


class FSDP1(FSDPStrategy):
    """The older fully sharded data parallelism, which flattens the parameters of each block.

    It runs on GPUs only. FSDP2 needs less memory for a frozen base and takes parameters of any
    types; this is for software that knows the older one alone.
    """

    def __init__(self) -> None:
        """Blocks are wrapped one by one; trained and frozen parameters may be in the same one."""
        super().__init__(
            auto_wrap_policy=wrapping(lambda: self.lightning_module),
            use_orig_params=True,
            state_dict_type="full",
        )


def wrapping(module: Callable[[], LightningModule | None]) -> Callable[..., bool]:
    """FSDP1's policy: which modules are wrapped one by one.

    Args:
        module: Gives the module once its network is built.
    """

    def policy(module_: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        if recurse:
            return True
        owner: Any = module()
        return any(module_ is block for block in blocks(owner.net).values())

    return policy


def _whole(value: Any) -> Any:
    return whole(value) if isinstance(value, torch.Tensor) else value


def _part(value: Any, parameter: torch.Tensor) -> Any:
    same = isinstance(value, torch.Tensor) and value.shape == parameter.shape
    return part_of(value, parameter) if same else value
