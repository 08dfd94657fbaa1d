"""AnswersModule: what the tasks share in which a language model answers questions about images."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .adapters import PerModule, Tuning
from .adapters.quantized import is_quantized
from .callbacks import AnswerWriter, Gallery
from .datamodules.conversations import Conversation
from .datamodules.vision_language import read_image
from .drawing import ConversationDrawing, Drawing
from .language.encoding import Batch
from .language.measures import AnswerMean, Bleu, TokenLoss, are_sentences, is_exact, vqa_accuracy
from .language.output import token_loss
from .module import TuningModule
from .nf4 import check_installed, quantize

CONNECTOR_LR = 1e-3  # as LLaVA's first stage has it; tunings' own rates are for what is trained


class AnswersModule(TuningModule):
    """A TuningModule whose network has a vision tower, a connector and a language model.

    A task makes its network in ``build`` and keeps an ``encoder``, which makes the batches that the
    network takes. The network has a method ``parts``, which gives the names of the modules of its
    "tower", "connector" and "language_model"; it is called with a batch's tensors and ``labels``,
    gives ``loss`` and ``logits``, and ``generate`` gives new tokens.

    It logs ``train/loss`` and, for validation and test, ``loss`` per token that is to be learnt,
    ``exact``, the share of answers that are right to the letter (but for case, a first article, and
    marks at their ends), ``vqa``, VQA's accuracy, and ``exact_closed`` and ``exact_open``, the
    share among questions with few possible answers and with many. Where answers are sentences, as
    captions are, it logs ``bleu``, BLEU-4. What there is no answer for is not logged. A question
    that is too long is answered by nothing.

    Attributes:
        encoder: Writes conversations in tokens.
    """

    task: ClassVar[str] = "vision_language"
    monitor: ClassVar[str] = "val/exact"
    commands: ClassVar[dict[str, str]] = {
        "chat": "litflora chat {adapter} IMAGE",
        "merge": "litflora merge {adapter} --out merged",
    }
    drawing: ClassVar[type[Drawing]] = ConversationDrawing
    encoder: Any

    def __init__(
        self,
        max_new_tokens: int = 32,
        tower_tuning: Tuning | None = None,
        connector_tuning: Tuning | None = None,
        language_tuning: Tuning | None = None,
        tower_lr: float | None = None,
        language_lr: float | None = None,
        **options: Any,
    ) -> None:
        """Checks and keeps what is said of the parts and of answers.

        Args:
            max_new_tokens: Tokens that an answer ends at.
            tower_tuning: What is trained of the tower; None is ``tuning``.
            connector_tuning: What is trained of the connector; None trains it whole.
            language_tuning: What is trained of the language model; None is ``tuning``.
            tower_lr: Learning rate of the tower; None is ``lr``.
            language_lr: Learning rate of the language model; None is ``lr``.
            options: Arguments of `TuningModule`.
        """
        super().__init__(**options)
        if find_spec("transformers") is None:
            raise ImportError("language models are transformers': pip install 'litflora[vlm]'")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        for name, rate in {"tower_lr": tower_lr, "language_lr": language_lr}.items():
            if rate is not None and rate < 0:
                raise ValueError(f"{name} must be 0 or more, not {rate}")
        if self.base_dtype == "nf4":
            check_installed()
            if self.weights is None:  # a checkpoint would have to hold the base
                raise ValueError("base_dtype nf4 needs a base that can be read again: give weights")
        self.max_new_tokens = max_new_tokens
        self.tower_tuning = tower_tuning
        self.connector_tuning = connector_tuning
        self.language_tuning = language_tuning
        self.part_lrs = {"tower": tower_lr, "language_model": language_lr}
        self.val_metrics, self.test_metrics = _metrics(), _metrics()

    def configure_callbacks(self) -> list[Callback]:
        """The gallery of a fit, and the answers of a prediction."""
        return [Gallery(), AnswerWriter()]

    def part_tunings(self) -> dict[str, Tuning]:
        """The tuning of each part; without one of its own the connector trains whole, as a head."""
        own = {} if self.connector_tuning is None else {"connector": self.connector_tuning}
        tower, language = self.tower_tuning or self.tuning, self.language_tuning or self.tuning
        return {"tower": tower, **own, "language_model": language}

    @property
    def _read_in(self) -> torch.dtype | Literal["auto"]:
        """The type that a language model is read in; "auto" is its file's, until `_hold_base`.

        Half of a large one would not fit into memory in float32.
        """
        return torch.float32 if self.base_dtype is None else "auto"

    def tunings(self) -> dict[str, Tuning]:
        """Those of parts: all of it is theirs."""
        return self.part_tunings()

    def _hold_base(self, net: nn.Module) -> None:
        if self.base_dtype == "nf4":
            quantize(net, net.parts()["language_model"])
            net.float()
            packed = [f"net.{name}" for name, p in net.named_parameters() if is_quantized(p)]
            # Each process has made the same of the same file.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, packed)
        else:
            super()._hold_base(net)

    def _check_strategy(self) -> None:
        super()._check_strategy()
        if self.base_dtype == "nf4" and isinstance(self._strategy, ModelParallelStrategy):
            raise ValueError("base_dtype nf4 cannot be sharded: set trainer.strategy to ddp")

    def description(self) -> dict[str, Any]:
        """Keeps a 4-bit base: the deltas were trained to make up for what it has lost."""
        described = super().description()
        if self.base_dtype == "nf4":
            described["init_args"]["base_dtype"] = self.base_dtype
        return described

    def tuning_of(self, net: nn.Module) -> Tuning:
        """One tuning of all parts."""
        parts = net.parts()
        tunings = self.part_tunings().items()
        return PerModule({name: tuning for part, tuning in tunings for name in parts[part]})

    def learning_rates(self) -> dict[str, float]:
        """Those of tower and language model, where they were given, and a new connector's own."""
        assert self.net is not None
        asked = {"lr": self.lr, "head_lr": self.head_lr, "optimizer": self.optimizer_factory}
        new = self.connector_tuning is None and not any(v is not None for v in asked.values())
        rates = {**self.part_lrs, "connector": CONNECTOR_LR if new else None}
        parts = self.net.parts()
        return {
            name: rate for part, rate in rates.items() if rate is not None for name in parts[part]
        }

    def forward(self, batch: Batch) -> Any:
        """Loss and logits of a batch as the encoder makes it."""
        assert self.net is not None, "call configure_model() first"
        return self.net(**self.inputs(batch), labels=batch.get("labels"))

    @torch.no_grad()
    def answer(self, prompt: Batch) -> list[str]:
        """Answers to a batch of prompts as the encoder makes it."""
        assert self.net is not None, "call configure_model() first"
        return self._told(self.net(**self._generation(prompt)).tokens)

    def _generation(self, prompt: Batch) -> dict[str, Any]:
        """What has the network go on with a prompt, always by the likeliest token.

        What a checkpoint brings along for chatting, such as a penalty for repeating a word of the
        question, is set aside, but for the tokens that it ends at.
        """
        tokenizer = self.encoder.tokenizer
        ends = _ends(self.net) | {tokenizer.eos_token_id} - {None}
        pad = tokenizer.pad_token_id
        return {
            "prompt": self.inputs(prompt),
            "max_new_tokens": self.max_new_tokens,
            "do_sample": False,
            "num_beams": 1,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "eos_token_id": sorted(ends) or None,
            "pad_token_id": tokenizer.eos_token_id if pad is None else pad,
        }

    def _told(self, tokens: Tensor) -> list[str]:
        texts = self.encoder.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def reply(self, conversation: Conversation) -> str:
        """The answer to one conversation that ends with a question; call ``eval()`` before.

        Raises:
            ValueError: It is too long, asks nothing, or has other numbers of images and of their
                marks in its text; or an image cannot be read.
        """
        conversation.check(answered=False)
        images = tuple(map(read_image, conversation.images))
        prompt = self.encoder.predict_batch([replace(conversation, images=images)])
        return self.answer(move_data_to_device(prompt, self.device))[0]

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What of a batch the network takes, images normalised."""
        names = ("input_ids", "attention_mask", "position_ids")
        kept = {key: batch[key] for key in names if key in batch}
        return {**kept, "images": self.normalize(batch["images"])}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss of the tokens that are to be learnt, over all processes."""
        loss = self(batch).loss * self._share(batch["labels"])
        size, together = len(batch["input_ids"]), self.trainer.world_size > 1
        self.log("train/loss", loss, prog_bar=True, batch_size=size, sync_dist=together)
        return loss

    def _share(self, labels: Tensor) -> Tensor | float:
        """How many times the average of all processes this one has of tokens to be learnt.

        Gradients are averaged over processes: those of each would count alike, however few tokens
        it has.
        """
        if self._trainer is None or self.trainer.world_size == 1:
            return 1.0
        count = (labels[:, 1:] >= 0).sum().float()
        return count / self.trainer.strategy.reduce(count.clone(), reduce_op="mean")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the validation metrics."""
        self._evaluate(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation metrics."""
        self._log_metrics("val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Updates the test metrics."""
        self._evaluate(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        """Logs the test metrics."""
        self._log_metrics("test", self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Returns ``ids``, ``questions``, ``files`` of the images, and ``answers``."""
        kept = {key: batch[key] for key in ("ids", "questions", "files")}
        return {**kept, "answers": self.answer(batch)}

    def _evaluate(self, batch: Batch, metrics: nn.ModuleDict) -> None:
        assert self.net is not None
        labels = batch["labels"]
        found = self.net(**self.inputs(batch), **self._generation(batch["prompt"]))
        losses = token_loss(found.logits, labels, reduction="none").view(len(labels), -1)
        metrics["loss"].update(losses, labels)
        told = zip(self._told(found.tokens), batch["unanswered"], strict=True)
        answers = ["" if unanswered else said for said, unanswered in told]
        rows = list(zip(answers, batch["accepted"], batch["closed"], strict=True))
        exact = [is_exact(said, accepted) for said, accepted, _ in rows]
        closed = list(zip(exact, batch["closed"], strict=True))
        # Of each batch, if there is nothing in it, too: processes wait for each other's values.
        metrics["exact"].update(exact)
        metrics["vqa"].update([vqa_accuracy(said, accepted) for said, accepted, _ in rows])
        metrics["exact_closed"].update([right for right, few in closed if few])
        metrics["exact_open"].update([right for right, few in closed if few is False])
        sentences = [row[:2] for row in rows if are_sentences(*row[1:])]
        metrics["bleu"].update([said for said, _ in sentences], [true for _, true in sentences])

    def _log_metrics(self, stage: str, metrics: nn.ModuleDict) -> None:
        for name, metric in metrics.items():
            value = metric.compute()
            metric.reset()
            if not value.isnan():
                self.log(f"{stage}/{name}", value, prog_bar=name == "exact")


def _ends(net: nn.Module | None) -> set[int]:
    """The tokens that the network's language model ends at by its own configuration."""
    assert net is not None
    found: set[int] = set()
    for module in net.modules():
        config = getattr(module, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        found |= {ends} if isinstance(ends, int) else set(ends or ())
    return found


def _metrics() -> nn.ModuleDict:
    means = ("exact", "vqa", "exact_closed", "exact_open")
    found = {"loss": TokenLoss(), "bleu": Bleu(), **{name: AnswerMean() for name in means}}
    return nn.ModuleDict(found)
