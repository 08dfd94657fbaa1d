"""What two processes do for the tests of this folder, in one start of them."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from litflora.adapters import (
    AdaLoRA,
    BitFit,
    DoRA,
    FLoRA,
    Full,
    LoHa,
    LoKr,
    LoRA,
    MoRA,
    NormTuning,
    OLoRA,
    PiSSA,
    Probe,
    Tuning,
    merge,
    save,
)
from litflora.callbacks import EMA, AdapterFolder, NonFinite, RankBudget
from litflora.classification import ClassificationModule
from litflora.segmentation import SegmentationModule
from litflora.windows import SlidingWindow

from . import matrix, runs
from .memory import sharded_memory

TUNINGS: dict[str, Tuning] = {
    "LoRA": LoRA(rank=4),
    "FLoRA": FLoRA(rank=4),
    "AdaLoRA": AdaLoRA(rank=4),
    "Full": Full(),
    "Probe": Probe(),
    "DoRA": DoRA(rank=4),
    "MoRA": MoRA(rank=4),
    "LoHa": LoHa(rank=4),
    "LoKr": LoKr(rank=4),
    "PiSSA": PiSSA(rank=4),
    "OLoRA": OLoRA(rank=4),
    "BitFit": BitFit(),
    "NormTuning": NormTuning(),
}
BACKBONES = ("test_vit", "convnext_shapes")
CASES = list(product(BACKBONES, ("LoRA", "FLoRA")))
TWO = ("ddp", "fsdp2")

Found = dict[Any, Any]


def module(backbone: str, tuning: str, base: Path, **options: Any) -> ClassificationModule:
    vit = {"weights": str(base), "img_size": 32}
    own = vit if backbone == "test_vit" else {"weights": "embedded"}
    return ClassificationModule(backbone, 10, tuning=TUNINGS[tuning], **{**own, **options})


def everything(base: Path, folder: Path) -> dict[str, Found]:
    """By name of the part."""
    parts = (
        memory,
        steps,
        files,
        resumed,
        variants,
        evaluated,
        windows,
        fsdp1,
        poisoned,
        budgeted,
        mistakes,
        cells,
    )
    found = {}
    for part in parts:
        own = folder / part.__name__
        own.mkdir(exist_ok=True)
        begin = time.perf_counter()
        found[part.__name__] = part(base, own)
        print(f"{part.__name__} took {time.perf_counter() - begin:.1f} s")
    return found


def steps(base: Path, folder: Path) -> Found:
    """Twenty steps of each case."""
    return {
        (*case, strategy): runs.fit(module(*case, base), strategy, folder)[0]
        for case in CASES
        for strategy in TWO
    }


def methods(folder: Path) -> Found:
    """A few steps by each method."""
    return {
        name: runs.fit(module("convnext_shapes", name, folder), "ddp", folder, runs.shapes(2, 4))[0]
        for name in TUNINGS
    }


def files(base: Path, folder: Path) -> Found:
    """The folders that are left, and what a rank's memory grew by while one was saved."""
    for tuning, strategy in product(("LoRA", "Full"), TWO):
        made = module("convnext_shapes", tuning, base)
        own = folder / tuning / strategy
        data = runs.shapes(2, steps=3)
        callbacks: list[Callback] = [AdapterFolder()]
        if tuning == "Full":  # the folder then has the best
            callbacks += [ModelCheckpoint(own, "best", "val/loss"), Spoil()]
        options = {"enable_checkpointing": True, "max_epochs": 2}
        _, trainer = runs.fit(made, strategy, own, data, callbacks=callbacks, **options)
        if tuning == "LoRA":
            peft = folder / "peft" / strategy
            if strategy == "fsdp2" or trainer.is_global_zero:
                save(made.net, peft, format="peft")
    return {}


class Spoil(Callback):
    """Makes the second epoch worse than the first."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = group["initial_lr"] = 1.0
            for config in trainer.lr_scheduler_configs:
                config.scheduler.base_lrs = [1.0] * len(config.scheduler.base_lrs)


def memory(base: Path, folder: Path) -> Found:
    """What this process's memory grows by while a model of some size is built, and saved."""
    return sharded_memory("vit_base_patch16_224", folder.parent / "big.safetensors", folder, 112)


def resumed(base: Path, folder: Path) -> Found:
    """Two epochs in one go; the second one anew from the checkpoint of the first."""
    found = {}
    for strategy in TWO:
        own = folder / strategy
        keep = ModelCheckpoint(own, filename="{epoch}", save_top_k=-1)
        options: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True}
        data = runs.shapes(2, steps=4)
        whole = runs.fit(
            module("test_vit", "FLoRA", base), strategy, own, data, callbacks=[keep], **options
        )
        again = ModelCheckpoint(own / "again", filename="{epoch}", save_top_k=-1)
        made, data = module("test_vit", "FLoRA", base), runs.shapes(2, steps=4)
        after = runs.fit(
            made, strategy, own, data, callbacks=[again], ckpt_path=own / "epoch=0.ckpt", **options
        )
        found[strategy] = whole[0], after[0]
    return found


def variants(base: Path, folder: Path) -> Found:
    """What must change memory alone, and what little changes numbers."""
    found: Found = {}
    options = {
        "plain": {},
        "blocks": {"activation_checkpointing": "blocks"},
        "every-2": {"activation_checkpointing": "every-2"},
    }
    for (name, option), strategy in product(options.items(), TWO):
        made = module("test_vit", "FLoRA", base, **option)
        found[name, strategy], _ = runs.fit(made, strategy, folder, runs.shapes(2, steps=3))
    for strategy in TWO:
        made = module("test_vit", "FLoRA", base, base_dtype="bfloat16")
        data = runs.shapes(2, steps=3)
        data.batch_size = 3  # four batches to evaluate for the one, three for the other
        left, _ = runs.fit(made, strategy, folder, data, precision="bf16-mixed")
        found["bfloat16", strategy] = left, {n: p.dtype for n, p in made.named_parameters()}
    return found


def evaluated(base: Path, folder: Path) -> Found:
    """Evaluations in which the processes have different numbers of batches and of windows."""
    found: Found = {}
    for strategy in TWO:
        made = module("convnext_shapes", "FLoRA", base)
        data = runs.shapes(2, steps=2)
        data.batch_size = 3
        _, trainer = runs.fit(made, strategy, folder, data)
        found["fit", strategy] = dict(trainer.callback_metrics)
        found["test", strategy] = trainer.test(made, data, verbose=False)[0]
        rows = trainer.predict(made, data)
        found["predict", strategy] = [path for row in rows for path in row["paths"]]
    return found


def windows(base: Path, folder: Path) -> Found:
    """Three images, one of which takes many windows: a process has one of them or two."""
    found = {}
    for strategy in TWO:
        made = SegmentationModule(
            "convnext_shapes",
            4,
            weights="embedded",
            img_size=64,
            head_width=16,
            inference=SlidingWindow(64, batch_size=1),
        )
        made.configure_callbacks = list  # type: ignore[method-assign]
        _, trainer = runs.fit(made, strategy, folder, Sizes(), keep=False)
        found[strategy] = {key: float(v) for key, v in trainer.callback_metrics.items()}
    return found


class Sizes(LightningDataModule):
    """Noise of several sizes."""

    sides = ((64, 64), (64, 200), (70, 64))

    def train_dataloader(self) -> DataLoader[Any]:
        images, masks = _noise(64, 64)
        data = TensorDataset(images.repeat(8, 1, 1, 1), masks.repeat(8, 1, 1))
        return DataLoader(data, batch_size=2)

    def val_dataloader(self) -> DataLoader[Any]:
        data: Any = [_noise(*sides) for sides in self.sides]
        sampler = UnrepeatedDistributedSampler(data, shuffle=False)
        return DataLoader(data, sampler=sampler, collate_fn=_listed)


def _noise(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    image = torch.rand(3, height, width, generator=generator)
    return image, torch.randint(4, (height, width), generator=generator)


def _listed(batch: list[Any]) -> tuple[list[Any], ...]:
    return tuple(map(list, zip(*batch, strict=True)))


def fsdp1(base: Path, folder: Path) -> Found:
    """FSDP1 beside DDP: losses, and how the optimizer groups what trains."""
    found = {}
    for tuning, strategy in product(("Full", "FLoRA"), ("ddp", "fsdp1")):
        made = module("test_vit", tuning, base, layer_decay=0.9)
        data = runs.shapes(2, steps=3)
        options: dict[str, Any] = {
            "keep": False,
            "callbacks": [watch := _Losses(), AdapterFolder()],
        }
        _, trainer = runs.fit(made, strategy, folder / tuning / strategy, data, **options)
        groups = trainer.optimizers[0].param_groups
        sizes = [(g["name"], g["weight_decay"], len(g["params"])) for g in groups]
        found[tuning, strategy] = watch.left.losses, sizes
    return found


class _Losses(runs.Watch):
    """Losses alone: the parameters are flattened."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Leaves them."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leaves them."""


def poisoned(base: Path, folder: Path) -> Found:
    """One process's second batch of three is no numbers."""
    found = {}
    for strategy in TWO:
        made, guard = module("test_vit", "Full", base), NonFinite()
        watch = Weights()
        callbacks = [Poison(), guard, watch]
        runs.fit(made, strategy, folder, runs.shapes(2, steps=3), callbacks=callbacks, keep=False)
        found[strategy] = guard.skipped, watch.after
    return found


def budgeted(base: Path, folder: Path) -> Found:
    """What each process keeps of a budget, and its weights in the end."""
    found = {}
    for tuning in ("AdaLoRA", "FLoRA"):
        made, budget = module("test_vit", tuning, base), RankBudget(0.4, interval=1)
        data = runs.shapes(2, steps=6)
        left, _ = runs.fit(made, "ddp", folder, data, callbacks=[budget])
        assert budget.allocator is not None
        found[tuning] = torch.cat(budget.allocator.kept), left.end
    return found


class Poison(Callback):
    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1 and trainer.global_rank == 1:
            hook = pl_module.net.register_forward_hook(lambda net, args, y: y * torch.nan)
            self.handle = hook

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if args[-1] == 1 and trainer.global_rank == 1:
            self.handle.remove()


class Weights(Callback):
    """The weights after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.after.append(runs.parameters(pl_module))


def mistakes(base: Path, folder: Path) -> Found:
    """What is refused, by the text of the error."""
    return {
        "unsharded": _refused(_Weighed("convnext_shapes", 10, weights="embedded"), folder),
        "EMA": _refused(module("test_vit", "LoRA", base), folder, callbacks=[EMA()]),
        "RankBudget": _refused(module("test_vit", "FLoRA", base), folder, callbacks=[RankBudget()]),
        "merge": _refused(module("test_vit", "LoRA", base), folder, callbacks=[_Merging()]),
        "Lightning's": _refused(module("test_vit", "LoRA", base), folder, "lightning"),
        "windows": _refused(SegmentationModule(**SEGMENTS), folder, "fsdp1"),
    }


SEGMENTS: dict[str, Any] = {"backbone": "convnext_shapes", "num_classes": 11, "weights": "embedded"}


def cells(base: Path, folder: Path) -> dict[matrix.Cell, matrix.Result]:
    """Some of the support matrix, but for its runs of one process."""
    return {cell: matrix.run(cell, folder) for cell in matrix.some(*TWO)}


def every_cell(folder: Path) -> dict[matrix.Cell, matrix.Result]:
    """All of it."""
    return {cell: matrix.run(cell, folder) for cell in matrix.cells(*TWO)}


class _Weighed(ClassificationModule):
    """Somebody's module with a parameter beside the net."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.log_scale = nn.Parameter(torch.zeros(()))


class _Merging(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        merge(pl_module.net)


def _refused(made: Any, folder: Path, strategy: str = "fsdp2", **options: Any) -> str:
    try:
        runs.fit(made, strategy, folder, runs.shapes(2, steps=1), **options)
    except ValueError as error:
        return str(error)
    return "nothing was raised"
