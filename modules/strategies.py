"""Lightning strategies that share a model out among processes and keep only what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.optim import Optimizer

from .adapters.layers import adapted_layers, has_own_op
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

    It runs on GPUs only, and is for software that knows no other: FSDP2 needs less memory for a
    frozen base, takes parameters of any types side by side, and processes may evaluate different
    numbers of images. Blocks are wrapped one by one, frozen and trained parameters together.
    """

    def __init__(self) -> None:
        """Has nothing to be set."""
        options: dict[str, Any] = {"use_orig_params": True, "state_dict_type": "full"}
        super().__init__(auto_wrap_policy=self._is_block, **options)
        self._blocks: set[int] = set()

    def setup(self, trainer: Trainer) -> None:
        """Finds the blocks before any is wrapped."""
        module: Any = self.lightning_module
        for name, layer, _ in adapted_layers(module.net):
            if not has_own_op(layer):  # it puts W + dW where FSDP1 puts a view
                raise ValueError(f"FSDP1 cannot run the adapted {name}: take FSDP2, or exclude it")
        self._blocks = set(map(id, blocks(module.net).values()))
        super().setup(trainer)

    def _is_block(self, module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        """FSDP's question, whether to look into a module and whether to wrap it."""
        return recurse or id(module) in self._blocks

    def on_validation_start(self) -> None:
        """Checks that processes will call the network equally often."""
        self._check_batches("sanity_val" if self._trainer.sanity_checking else "val")

    def on_test_start(self) -> None:
        """Checks that processes will call the network equally often."""
        self._check_batches("test")

    def on_predict_start(self) -> None:
        """Checks that processes will call the network equally often."""
        self._check_batches("predict")

    @property
    def _trainer(self) -> Any:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _check_batches(self, kind: str) -> None:
        """Raises if one process has a batch more than another, which would wait for ever.

        Raises:
            ValueError: The numbers differ.
        """
        count = float(sum(getattr(self._trainer, f"num_{kind}_batches")))
        least, most = (
            self.reduce(torch.tensor(count, device=self.root_device), reduce_op=op)
            for op in ("min", "max")
        )
        if least != most:
            raise ValueError(
                f"under FSDP1 each process needs as many batches to evaluate, not {least:.0f} and "
                f"{most:.0f}: set another batch size, or take litflora.strategies.FSDP2"
            )


def _whole(value: Any) -> Any:
    return whole(value) if isinstance(value, torch.Tensor) else value


def _part(value: Any, parameter: torch.Tensor) -> Any:
    same = isinstance(value, torch.Tensor) and value.shape == parameter.shape
    return part_of(value, parameter) if same else value
