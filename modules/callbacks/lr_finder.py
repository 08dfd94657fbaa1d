"""LearningRateFinder: a fit at the learning rate where the loss falls fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from torch import Tensor
from torch.nn.functional import avg_pool1d
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from ._search import Watcher, picture, remember, tell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..module import TuningModule

# A search is over where the loss is this many times the least one.
DIVERGED = 4.0
# Fewer points than this say nothing.
FEWEST = 20


class LearningRateFinder(callbacks.LearningRateFinder):
    """Searches the learning rate before a fit, which then goes on with it from where it was.

    Lightning raises the rate step by step. The groups keep their ratios and ``head_lr`` stays as it
    is given, as in the fit. The suggestion is the rate at which the smoothed loss falls fastest,
    over the logarithm of the rate, once it falls for good. It is printed and logged, and
    ``lr_finder.png`` in the log folder shows the search. A resumed run has its rate already.
    """

    def __init__(
        self, min_lr: float = 1e-6, max_lr: float = 1.0, num_training_steps: int = 100
    ) -> None:
        """Sets the range.

        Args:
            min_lr: The rate of the first step.
            max_lr: The rate of the last step.
            num_training_steps: Steps in between, at a constant ratio.
        """
        if not 0 < min_lr < max_lr:
            raise ValueError(f"min_lr must lie between 0 and max_lr {max_lr}, not be {min_lr}")
        if num_training_steps < FEWEST:
            raise ValueError(
                f"num_training_steps must be at least {FEWEST}, not {num_training_steps}"
            )
        # Rate and stop are ours: Lightning's slopes are those over the rate itself, which favour
        # the first points, and it gives all groups one rate.
        super().__init__(
            min_lr, max_lr, num_training_steps, early_stop_threshold=None, update_attr=False
        )
        self.found: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: TuningModule) -> None:
        """Searches, and sets optimizer and schedule up anew."""
        if trainer.ckpt_path is not None or trainer.fast_dev_run:
            return
        pl_module.lr = 1.0  # so that the groups' rates are what the rate sought is multiplied by
        trainer.strategy.setup_optimizers(trainer)
        check_schedule(trainer)
        sweep = Sweep(trainer.optimizers[0], pl_module.head_lr)
        with sweep.watching(trainer):
            self.lr_find(trainer, pl_module)
        rates, losses = torch.tensor(sweep.rates), torch.tensor(sweep.losses)
        best = steepest(rates, losses)
        self.found = float(f"{rates[best]:.3g}")  # so that the fit is that of the rate as told
        remember(pl_module, "lr", self.found)
        trainer.strategy.setup_optimizers(trainer)
        text = f"lr       {self.found:g}, found by {len(rates)} steps: --model.lr {self.found:g}"
        tell(trainer, "lr_finder/lr", self.found, text)
        picture(trainer, "lr_finder", draw, rates, losses, best)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells a resumed run of its rate, which the optimizer has from the checkpoint."""
        if self.found is not None:
            remember(pl_module, "lr", self.found)

    def state_dict(self) -> dict[str, Any]:
        """What was found."""
        return {"lr": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what was found."""
        self.found = state_dict["lr"]


class Sweep(Watcher):
    """The rates and the losses of a search.

    Args:
        optimizer: Its groups' rates are multiplied by the one that is tried.
        head_lr: The rate of the head, if it does not follow.
    """

    def __init__(self, optimizer: Optimizer, head_lr: float | None) -> None:
        groups = optimizer.param_groups
        self.ratios = [group.get("initial_lr", group["lr"]) for group in groups]
        self.head_lr = head_lr
        self.rates: list[float] = []
        self.losses: list[float] = []
        self._rate: float | None = None
        self._batches: list[float] = []

    def on_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Spreads the rate, which Lightning's schedule gives to all groups alike."""
        self._rate = optimizer.param_groups[0]["lr"]
        for group, ratio in zip(optimizer.param_groups, self.ratios, strict=True):
            own = self.head_lr is not None and group["name"].startswith("head")
            group["lr"] = ratio if own else self._rate * ratio

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        """Keeps the mean loss of a step's batches, over all ranks; ends a search that diverges."""
        loss = outputs["loss"] * trainer.accumulate_grad_batches  # by which it has been divided
        self._batches.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))
        if self._rate is None:
            return
        self.rates.append(self._rate)
        self.losses.append(sum(self._batches) / len(self._batches))
        self._rate, self._batches = None, []
        if not self.losses[-1] <= DIVERGED * min(self.losses):  # nor is NaN
            trainer.should_stop = True


def check_schedule(trainer: Trainer) -> None:
    """Raises if the schedule overrides the optimizer's rate."""
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, OneCycleLR | CyclicLR):
            name = type(config.scheduler).__name__
            raise ValueError(
                f"{name} has rates of its own, whatever the learning-rate finder finds: take "
                "litflora.optim.OneCycle for model.lr_scheduler"
            )


def steepest(rates: Tensor, losses: Tensor) -> int:
    """Where the loss falls fastest over the logarithm of the rate.

    Raises:
        ValueError: If the loss diverged at once, or fell by no more than its noise.
    """
    if len(losses) < FEWEST:
        raise ValueError(
            f"the learning-rate finder has only {len(losses)} of the {FEWEST} points it needs: "
            f"the loss diverged at a rate of {rates[-1]:.2g}; lower min_lr"
        )
    curve = smoothed(losses)
    quarter, lowest = len(curve) // 4, int(curve.argmin())
    fall = curve[:quarter].mean() - curve[lowest]  # from the loss at rates too small to matter
    noise = (losses - curve)[: max(lowest, quarter)].std() / smoothing(losses) ** 0.5
    if lowest < quarter or not fall > 3 * noise:
        raise ValueError(
            f"the learning-rate finder saw no fall of the loss between {rates[0]:.2g} and "
            f"{rates[-1]:.2g}: widen min_lr and max_lr, or raise num_training_steps"
        )
    high = curve[: lowest + 1] > curve[lowest] + 3 / 4 * fall
    begin = int(high.nonzero()[-1])  # before, what falls comes back: it is noise
    part = slice(begin, lowest + 1)
    return begin + int(torch.gradient(curve[part], spacing=(rates[part].log(),))[0].argmin())


def smoothing(losses: Tensor) -> int:
    """The odd number of points that a mean is taken over: about a tenth of all."""
    return len(losses) // 20 * 2 + 1


def smoothed(losses: Tensor) -> Tensor:
    """Centred running means, taken twice; a last loss that is not finite is as the one before."""
    width, losses = smoothing(losses), losses.clone()
    if not losses[-1].isfinite():
        losses[-1] = losses[-2]
    for _ in range(2):
        losses = avg_pool1d(losses[None], width, 1, width // 2, count_include_pad=False)[0]
    return losses


def draw(rates: Tensor, losses: Tensor, best: int) -> Figure:
    """Draws a search.

    Args:
        rates: The rates that were tried.
        losses: Their losses.
        best: Index of the suggestion.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    curve = smoothed(losses)
    axes.semilogx(rates, losses, ".", color="tab:gray", alpha=0.5, label="loss")
    axes.semilogx(rates, curve, color="tab:blue", label="smoothed")
    axes.plot(rates[best], curve[best], "o", color="tab:red", label=f"steepest, {rates[best]:.3g}")
    axes.axvline(float(rates[best]), color="tab:red", linewidth=0.8)
    top = float(losses[: best + 1].max())
    axes.set_ylim(top=top + 0.3 * (top - float(curve.min())))  # not up to where it diverges
    axes.set(xlabel="learning rate", ylabel="loss", title="learning-rate finder")
    axes.legend()
    return figure
