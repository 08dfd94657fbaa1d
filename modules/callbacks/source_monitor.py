"""SourceMonitor: how well the backbone still does what it was pretrained for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import isnan, nan
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ..adapters.layers import adapted_layers
from ..backbones.source import encoder, keep_head, original
from ..heads.probes import LinearProbe, NearestNeighbours

if TYPE_CHECKING:  # a task imports its callbacks, not they the task
    from ..module import TuningModule

PER_CLASS = 20  # as many neighbours are asked
AT_ONCE = 1024  # of all vectors together the similarities could fill the memory

Head = Literal["original", "knn", "probe"]
# Makes vectors [N, D] of normalised images, by a backbone.
Reader = Callable[[nn.Module, Tensor], Tensor]


class SourceMonitor(Callback):
    """Measures during a tuning what the backbone forgets of a source task.

    The backbone, adapters on, is judged on the source's test split by a head that never changes:
    that of the pretrained weights, or one fitted to the base's features before the fit begins. The
    accuracy is logged as ``source/acc``, at step 0 that of the base, and what was lost of it as
    ``source/forgotten``. The run is bit for bit what it is without.

    Args:
        data: A classification datamodule of litflora. Its images should have the size that the
            backbone was trained at; the module normalises them.
        head: ``original`` is the classifier in the weights file, whose classes must be the data's,
            in the same order. ``knn`` and ``probe`` (nearest neighbours, logistic regression) are
            fitted to the mean of the last feature map, over the source's training split without
            augmentation.
        limit: The most samples of a split that are looked at, spread over all of it.
        every_n_epochs: Measures after every so many epochs, and after the last.
    """

    def __init__(
        self,
        data: LightningDataModule,
        head: Head = "original",
        limit: int = 2000,
        every_n_epochs: int = 1,
    ) -> None:
        if head not in get_args(Head):
            raise ValueError(f"head must be {' or '.join(get_args(Head))}, not {head!r}")
        if min(limit, every_n_epochs) < 1:
            raise ValueError("limit and every_n_epochs of a SourceMonitor must be at least 1")
        if not hasattr(data, "datasets") or not hasattr(data, "samples_per_class"):
            raise ValueError(f"{type(data).__name__} is no classification datamodule of litflora")
        self.data: Any = data
        self.head = head
        self.limit = limit
        self.every_n_epochs = every_n_epochs
        self.before = self.now = nan
        self._read: Reader = mean_features
        self._classify: Callable[[Tensor], Tensor] = nn.Identity()

    def setup(self, trainer: Trainer, pl_module: TuningModule, stage: str) -> None:
        """Sets the source data up; raises if the base cannot be had whole and again."""
        if stage != "fit":
            return
        if sum(isinstance(callback, SourceMonitor) for callback in trainer.callbacks) > 1:
            raise ValueError("a run has one SourceMonitor, as source/acc is one figure: leave one")
        if isinstance(trainer.strategy, ModelParallelStrategy | FSDPStrategy):
            raise ValueError(
                "SourceMonitor runs the backbone by itself, and the processes share it out: take "
                "trainer.strategy ddp, or leave SourceMonitor out"
            )
        if pl_module.weights is None:
            raise ValueError("SourceMonitor needs pretrained weights, and weights is null")
        if trainer.local_rank == 0:
            self.data.prepare_data()
        trainer.strategy.barrier("source")
        for needed in ("test",) if self.head == "original" else ("test", "fit"):
            self.data.setup(needed)
        if self.head != "original":
            self._check_limit()

    def _check_limit(self) -> None:
        """Raises if a fitted head would know too few samples of a class."""
        least, known = PER_CLASS * self.data.num_classes, len(self.data.datasets["train"])
        if self.limit < min(least, known):
            raise ValueError(
                f"limit {self.limit} leaves a {self.head} head fewer than {PER_CLASS} samples of "
                f"each of {self.data.num_classes} classes: take {min(least, known)} or more"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: TuningModule) -> None:
        """Makes the head, and measures the base."""
        with torch.random.fork_rng(devices=[]):
            base = encoder(pl_module.anew().build()).to(pl_module.mean)
        if self.head == "original":
            self._read = self._original(trainer, pl_module, base)
        else:
            train, test = (self.data.datasets[name] for name in ("train", "test"))
            plain = replace(train, transform=test.transform)  # without augmentation
            fitted = NearestNeighbours if self.head == "knn" else LinearProbe
            known = self._vectors(trainer, pl_module, base, plain)
            self._classify = fitted(*known, self.data.num_classes)
        self.before = self._accuracy(trainer, pl_module, base)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the accuracy of the base; a resumed run has done so."""
        if trainer.global_step == 0:
            for logger in trainer.loggers:
                logger.log_metrics({"source/acc": self.before, "source/forgotten": 0.0}, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: TuningModule) -> None:
        """Measures and logs."""
        epoch = trainer.current_epoch + 1
        ended = 0 < trainer.max_steps <= trainer.global_step
        last = trainer.should_stop or ended or epoch == trainer.max_epochs
        if epoch % self.every_n_epochs == 0 or last:
            assert pl_module.net is not None
            self.now = self._accuracy(trainer, pl_module, encoder(pl_module.net))
            figures = {"source/acc": self.now, "source/forgotten": self.before - self.now}
            pl_module.log_dict(figures, sync_dist=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Says what was forgotten, after the progress bar has gone."""
        if trainer.is_global_zero and not isnan(self.now):
            print(
                f"source   {self.before:.4f} before tuning, {self.now:.4f} after: "
                f"{self.before - self.now:.4f} forgotten ({self.head} head)"
            )
        self.now = nan

    def _original(self, trainer: Trainer, module: TuningModule, base: nn.Module) -> Reader:
        """Logits by the head of the weights, on whatever backbone."""
        name, weights = getattr(module, "backbone", None), module.weights
        if not isinstance(name, str) or weights is None:
            raise ValueError(
                f"{type(module).__name__} has no classification backbone: take head knn or probe"
            )
        with torch.random.fork_rng(devices=[]):
            source = original(name, weights, base).to(module.mean).eval()
        if source.num_classes != self.data.num_classes:
            raise ValueError(
                f"the head of {weights} has {source.num_classes} classes, and the source data "
                f"{self.data.num_classes}: give data of its classes, or take head knn or probe"
            )

        def read(backbone: nn.Module, images: Tensor) -> Tensor:
            return source.forward_head(backbone.forward_features(images))

        images, _ = next(iter(self._batches(self.data.datasets["test"])))
        images = module.normalize(images.to(module.device))
        with _at_rest(trainer, base):
            if not torch.allclose(read(base, images), source(images), rtol=1e-4, atol=1e-4):
                raise ValueError(
                    f"{type(module).__name__} leaves out blocks or norms that the head of {name} "
                    "stands on: take head knn or probe"
                )
        keep_head(source)
        return read

    def _accuracy(self, trainer: Trainer, module: TuningModule, backbone: nn.Module) -> float:
        samples = self.data.datasets["test"]
        vectors, labels = self._vectors(trainer, module, backbone, samples)
        found = [self._classify(some).argmax(1) for some in vectors.split(AT_ONCE)]
        return (torch.cat(found) == labels).double().mean().item()

    def _vectors(
        self, trainer: Trainer, module: TuningModule, backbone: nn.Module, samples: Any
    ) -> tuple[Tensor, Tensor]:
        """What a backbone makes of samples, ``[N, D]``, and their labels ``[N]``."""
        found, known = [], []
        with _at_rest(trainer, backbone):
            for images, labels in self._batches(samples):
                images = module.normalize(images.to(module.device))
                found.append(self._read(backbone, images).float())
                known.append(labels.to(module.device))
        return torch.cat(found), torch.cat(known)

    def _batches(self, samples: Any) -> DataLoader[Any]:
        """Samples from all of a split, for neighbours are often of one class."""
        count = min(self.limit, len(samples))
        return DataLoader(
            Subset(samples, [n * len(samples) // count for n in range(count)]),
            batch_size=self.data.batch_size,
            num_workers=self.data.num_workers,
            collate_fn=self.data.collate("test"),
            generator=torch.Generator(),  # loading draws nothing from the stream of the training
        )


def mean_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """The mean of the last feature map, ``[N, C]``, of normalised images."""
    options = {"norm": True, "output_fmt": "NCHW", "intermediates_only": True}
    return backbone.forward_intermediates(images, 1, **options)[-1].mean((2, 3))


@contextmanager
def _at_rest(trainer: Trainer, net: nn.Module) -> Iterator[None]:
    """Evaluates as the trainer does, and leaves no trace in modes, random states or caches."""
    modes = [(module, module.training) for module in net.modules()]
    device = trainer.strategy.root_device
    devices = [device] if device.type == "cuda" else []
    net.eval()
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            trainer.precision_plugin.val_step_context(),
        ):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for _, _, adapters in adapted_layers(net):
            adapters.cache.clear()
