"""VisionLanguageModule: answers to questions about images."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from .adapters import Full, Tuning
from .answers import AnswersModule
from .backbones.create import build, check_name
from .datamodules.conversations import ASSISTANT, IMAGE, USER, Conversation, Turn
from .language.composed import VisionLanguageNet, channels_of
from .language.connectors import Connector
from .language.encoding import Encoder, image_token_of
from .language.language_models import TINY, language_model, tokenizer_of
from .language.merged import MergedFolder
from .optim import OneCycle
from .precision import LanguageBaseDtype

LENGTH = 2048  # LLaVA's
# What a step is measured on where there are no data.
QUESTION, ANSWER = "What is in the image?", "One thing, and another beside it."


class VisionLanguageModule(AnswersModule):
    """Tunes a timm tower, a connector and a language model of transformers, put together here."""

    base_names = ("tower", "weights", "language_model")

    def __init__(
        self,
        tower: str,
        language_model: str = "tiny",
        language_options: dict[str, Any] | None = None,
        weights: str | None = "pretrained",
        connector: str = "mlp",
        layer: int | list[int] = -1,
        img_size: int | None = None,
        max_length: int | None = None,
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
        """Keeps the settings; the Trainer calls ``configure_model`` to build the network.

        Args:
            tower: A timm model name, or ``convnext_shapes``.
            language_model: A causal language model of transformers: a folder, or a name on the hub;
                ``tiny`` is a small one with random weights, and bytes for tokens.
            language_options: What differs in the configuration of ``tiny``.
            weights: Weights of the tower: ``pretrained``, a local file, ``embedded``
                (convnext_shapes), or None. A folder that `litflora merge` has written has tower,
                connector and language model, which is then the folder's.
            connector: ``linear``, ``mlp`` or ``pixel_shuffle``.
            layer: The tower's block or stage whose features are taken, or several; -1 is the last.
            img_size: Side of the images in pixels; None is the tower's own.
            max_length: Tokens that a conversation is cut off at; None is as many as the language
                model has positions for, and 2,048 at the most.
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
            weights=weights,
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
        check_name(tower)
        kept = language_tuning or self.tuning
        random = language_model == TINY and self._folder is None
        if random and adapter is None and not isinstance(kept, Full):
            raise ValueError(
                f"language model tiny is random, and {type(kept).__name__} keeps its base: give "
                "language_tuning litflora.adapters.Full, or the folder of a language model"
            )
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        self.tower = tower
        self.language_model = language_model
        self.language_options = language_options
        self.connector = connector
        self.layer = layer
        self.img_size = img_size
        self.max_length = max_length

    @cached_property
    def encoder(self) -> Encoder:
        """What writes conversations in tokens of the language model."""
        sketch = self._assemble(None, sketched=True)
        own = sketch.pretrained_cfg["input_size"][1:]
        height, width = own if self.img_size is None else (self.img_size, self.img_size)
        found = sketch.features(torch.zeros(1, 3, height, width, device="meta"))
        tokens = sketch.connector.tokens(*found.shape[-2:])
        length = self._length(sketch.language_model)
        return Encoder(self._tokenizer(), tokens, length, (height, width))

    def _length(self, model: nn.Module) -> int:
        """The length that conversations are cut off at."""
        most = getattr(model.config, "max_position_embeddings", None)
        if self.max_length is not None and most is not None and self.max_length > most:
            raise ValueError(
                f"max_length {self.max_length:,} is more than the {most:,} positions of language "
                f"model {self._language_model}: give {most:,} or less"
            )
        if most is not None and self.max_new_tokens >= most:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens:,} leaves nothing of the {most:,} positions "
                f"of language model {self._language_model} for a question: lower it"
            )
        return self.max_length or min(most or LENGTH, LENGTH)

    def build(self) -> nn.Module:
        """Makes tower, connector and language model."""
        if self._folder is None:
            return self._assemble(self.weights)
        net = self._assemble(None)
        self._folder.load(net)
        return net

    def _assemble(self, weights: str | None, sketched: bool = False) -> VisionLanguageNet:
        """Puts the parts together; a sketch is without numbers."""
        with torch.device("meta" if sketched else "cpu"):
            tower = build(self.tower, weights, 0, self.img_size)
        told = language_model(self._language_model, self.language_options, sketched, self._read_in)
        channels = channels_of(tower, self.layer)
        width = told.get_input_embeddings().embedding_dim
        with torch.device("meta" if sketched else "cpu"):
            connector = Connector(self.connector, channels, width)
        image_token = image_token_of(self._tokenizer())
        return VisionLanguageNet(tower, connector, told, image_token, self.layer)

    @property
    def _folder(self) -> MergedFolder | None:
        """Where all weights are, if they are in one folder."""
        return MergedFolder.of(self.weights)

    @property
    def _language_model(self) -> str:
        return self.language_model if self._folder is None else self._folder.language_model

    def _tokenizer(self) -> Any:
        return tokenizer_of(self._language_model)

    def write_merged(self, path: Path) -> None:
        """Writes a folder that ``weights`` takes."""
        MergedFolder(path).write(self.net, self._tokenizer())

    def loading_code(self, path: Path) -> str:
        """The whole network is litflora's own; its language model is of transformers."""
        names = ("connector", "layer", "img_size")
        options = {"weights": str(path), **{name: getattr(self, name) for name in names}}
        told = ", ".join(f"{key}={value!r}" for key, value in options.items())
        return f"import litflora\nlitflora.VisionLanguageModule({self.tower!r}, {told}).build()"

    def example(self, images: Tensor) -> tuple[Tensor, ...]:
        """As many conversations as there are images, each of one image and a short question."""
        height, width = self.encoder.image_size
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        turns = (Turn(USER, f"{IMAGE}\n{QUESTION}"), Turn(ASSISTANT, ANSWER))
        one = Conversation("example", turns, (image,))
        batch = move_data_to_device(self.encoder.train_batch([one] * len(images)), images.device)
        return batch["input_ids"], batch["attention_mask"], self.normalize(batch["images"])

    def metadata(self, datamodule: Any = None) -> dict[str, Any]:
        """Adds the size of the images."""
        return {**super().metadata(datamodule), "img_size": self.img_size}

    def description(self) -> dict[str, Any]:
        """Makes the path of the language model absolute, too."""
        described = super().description()
        told = described["init_args"]
        if self.language_model != TINY and Path(told["language_model"]).is_dir():
            told["language_model"] = str(Path(told["language_model"]).absolute())
        return described
