"""PretrainedVisionLanguageModule: a checkpoint of transformers that answers about images."""

from __future__ import annotations

import inspect
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from .adapters import PerModule, Tuning
from .answers import AnswersModule
from .datamodules.conversations import ASSISTANT, IMAGE, USER, Conversation, Turn
from .language.checkpoint import save_like
from .language.encoding import Batch
from .language.part_tunings import part_tunings
from .language.pretrained import (
    PretrainedNet,
    positions_of,
    pretrained_model,
    processor_of,
)
from .language.processing import ProcessorEncoder
from .optim import OneCycle
from .precision import LanguageBaseDtype

SIDE = 32  # of a blank image, in pixels


class PretrainedVisionLanguageModule(AnswersModule):
    """Tunes a checkpoint of transformers: LLaVA-1.5, LLaVA-NeXT, Qwen-VL, InternVL and others.

    Its processor makes the batches. An adapter of the language model alone, by LoRA, can be given
    to PEFT: ``save(module.net.model, FOLDER, format="peft")`` has the names of the checkpoint.
    """

    base_argument: ClassVar[str] = "model"
    base_names: ClassVar[tuple[str, ...]] = ("model",)
    net: PretrainedNet | None

    def __init__(
        self,
        model: str,
        max_length: int = 2048,
        max_new_tokens: int = 32,
        tuning: Tuning | None = None,
        tower_tuning: Tuning | None = None,
        connector_tuning: Tuning | None = None,
        language_tuning: Tuning | None = None,
        adapter: str | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = OneCycle,
        lr: float | None = None,
        tower_lr: float | None = None,
        language_lr: float | None = None,
        head_lr: float | None = None,
        layer_decay: float | None = None,
        activation_checkpointing: str = "none",
        base_dtype: LanguageBaseDtype | None = None,
    ) -> None:
        """Keeps the settings; the Trainer calls ``configure_model`` to read the checkpoint.

        Args:
            model: An image-text-to-text checkpoint of transformers: a folder, or a name on the hub.
            max_length: Tokens that a conversation is cut off at.
            max_new_tokens: Tokens that an answer ends at.
            tuning: What is trained of tower and language model; None is ``FLoRA()``.
            tower_tuning: What is trained of the tower, in place of ``tuning``.
            connector_tuning: What is trained of the connector; None trains it whole.
            language_tuning: What is trained of the language model, in place of ``tuning``.
            adapter: Folder of a saved adapter to start from, in place of all tunings.
            optimizer: Makes the optimizer from parameter groups; None is AdamW at the
                tunings' own rates, see `litflora.optim.LEARNING_RATES`.
            lr_scheduler: Makes the schedule from the optimizer; None keeps the rate constant.
            lr: Learning rate in place of the optimizer's own.
            tower_lr: Learning rate of the tower, in place of that.
            language_lr: Learning rate of the language model, in place of that.
            head_lr: Learning rate of the connector, in place of that.
            layer_decay: Ratio of the learning rates of neighbouring layers; None is 1.
            activation_checkpointing: ``none``, ``blocks`` (each block of tower and language model
                keeps its input alone, and runs again in backward) or ``every-k``: each k-th block.
            base_dtype: What frozen linear layers and convolutions are held in, bfloat16; None is
                float32. Deltas, norms and the connector stay float32. It needs precision
                bf16-mixed. With nf4 it is the frozen linear layers of the language model alone,
                in 4 bits.
        """
        super().__init__(
            weights=model,
            tuning=tuning,
            adapter=adapter,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr=lr,
            head_lr=head_lr,
            layer_decay=layer_decay,
            activation_checkpointing=activation_checkpointing,
            base_dtype=base_dtype,
            max_new_tokens=max_new_tokens,
            tower_tuning=tower_tuning,
            connector_tuning=connector_tuning,
            language_tuning=language_tuning,
            tower_lr=tower_lr,
            language_lr=language_lr,
        )
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        self.model = model
        self.max_length = max_length

    @cached_property
    def encoder(self) -> ProcessorEncoder:
        """What makes batches by the checkpoint's processor."""
        limit = positions_of(self.model)
        if self.max_length > limit:
            raise ValueError(
                f"max_length {self.max_length:,} is more than the {limit:,} positions of the "
                f"language model of {self.model}"
            )
        return ProcessorEncoder(processor_of(self.model), self.max_length)

    def build(self) -> nn.Module:
        """Reads the checkpoint."""
        return PretrainedNet(pretrained_model(self.model, self._read_in))

    def tuning_of(self, net: nn.Module) -> Tuning:
        """One tuning of all parts."""
        found: dict[str, Tuning] = {}
        for part, tuning in self.part_tunings().items():
            found |= part_tunings(net, part, tuning)
        return PerModule(found)

    def _tune(self, net: nn.Module, device: torch.device | None) -> None:
        super()._tune(net, device)
        for name in net.unread():
            net.get_submodule(name).requires_grad_(False)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What of a batch the network takes, and a blank image if it has none."""
        assert self.net is not None
        taken = {key: value for key, value in batch.items() if key in self.net.takes}
        if "pixel_values" in taken:
            return taken
        return {**taken, "blank": move_data_to_device(self._blank, self.device)}

    @cached_property
    def _blank(self) -> dict[str, Tensor]:
        """What the tower takes of a blank image."""
        assert self.net is not None
        blank = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
        made = self.encoder.processor.image_processor(images=[blank], return_tensors="pt")
        taken = inspect.signature(self.net.model.get_image_features).parameters
        return {key: value for key, value in made.items() if key in taken}

    def example(self, images: Tensor) -> tuple[Any, ...]:
        """As many conversations as there are images, each about a blank one of their size."""
        blank = torch.zeros(3, *images.shape[-2:], dtype=torch.uint8)
        turns = (Turn(USER, f"{IMAGE}\nWhat is in the image?"), Turn(ASSISTANT, "Nothing at all."))
        one = Conversation("example", turns, (blank,))
        batch = move_data_to_device(self.encoder.train_batch([one] * len(images)), images.device)
        inputs = self.inputs(batch)
        return inputs.pop("input_ids"), batch["labels"], None, inputs

    def write_merged(self, path: Path) -> None:
        """Writes the network as its checkpoint is laid out, adapters merged into it.

        Raises:
            ValueError: The checkpoint is not kept in safetensors files.
        """
        assert self.net is not None
        lost = save_like(self.net.model, self.model, path)
        worst = max(lost, key=lost.__getitem__, default=None)
        if worst is not None and lost[worst] > 0:
            rank_zero_warn(
                f"the checkpoint's type of numbers rounds: at most {lost[worst]:.2g} of a change "
                f"is lost ({worst})"
            )

    def loading_code(self, path: Path) -> str:
        """A line of plain transformers."""
        assert self.net is not None
        kind = type(self.net.model).__name__
        return f"import transformers\ntransformers.{kind}.from_pretrained({str(path)!r})"
