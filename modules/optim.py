"""Optimisation of a partly frozen network: parameter groups and a one-cycle schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import FSDPPrecision, MixedPrecision
from timm.models import group_parameters
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from .adapters import Delta, trainable_parameters
from .adapters.sharded import plain_name
from .adapters.targets import is_inside

# AdamW's learning rates by tuning, where OTHERS does not suit it: docs/study.md has what was tried.
# FLoRA's factors turn little at first, while its core is small.
LEARNING_RATES = {"AdaLoRA": 5e-3, "BitFit": 5e-3, "FLoRA": 5e-3, "Full": 1e-4}
OTHERS = 1e-3

# Devices on which AdamW's step is fused. Adapters are hundreds of tiny tensors: on a CPU it takes a
# third of a loop's time, and a fifth for full tuning. torch keeps its own, longer list private.
FUSED = ("cpu", "cuda")


class OneCycle(LRScheduler):
    """A cosine rise to each group's own learning rate, and a cosine fall, step by step.

    It is torch's OneCycleLR with the peaks taken from the optimizer, so that the head's rate and
    layer-wise decay keep their ratios, and the momenta left alone.

    Args:
        optimizer: Its groups' learning rates are the peaks.
        warmup: Share of the run spent rising.
        start: First learning rate, as a share of the peak.
        end: Last learning rate, as a share of the peak.
        total_steps: Length of the run; `TuningModule` fills in the Trainer's if it is None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.3,
        start: float = 0.04,
        end: float = 4e-6,
        total_steps: int | None = None,
    ) -> None:
        if not 0.0 <= warmup < 1.0:
            raise ValueError(f"warmup is the share of the run spent rising, not {warmup}")
        self.warmup, self.start, self.end = warmup, start, end
        self.total_steps = total_steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The learning rates of this step."""
        return [peak * self._factor() for peak in self.base_lrs]

    def _factor(self) -> float:
        if self.last_epoch == 0:  # the only step before the length of the run is known
            return self.start if self.warmup else 1.0
        if self.total_steps is None:
            raise ValueError("OneCycle needs total_steps outside a TuningModule")
        last = max(self.total_steps - 1, 1)
        step, peak = min(self.last_epoch, last), max(self.warmup * self.total_steps - 1, 0.0)
        if step < peak:
            return _cosine(self.start, 1.0, step / peak)
        return _cosine(1.0, self.end, (step - peak) / max(last - peak, 1e-9))

    def state_dict(self) -> dict[str, Any]:
        """Everything but the length of the run, which belongs to the Trainer that resumes."""
        return {key: v for key, v in super().state_dict().items() if key != "total_steps"}


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def default_optimizer(tuning: str, may_fuse: bool = True) -> Callable[..., Optimizer]:
    """AdamW with weight decay 0.05 at the learning rate of a tuning.

    Args:
        tuning: Class name of the tuning.
        may_fuse: Whether the step is torch's fused one where every parameter allows it.
    """
    return partial(_adamw, may_fuse=may_fuse, lr=default_rate(tuning), weight_decay=0.05)


def may_fuse(trainer: Trainer | None) -> bool:
    """Whether a step may unscale its gradients itself, as fused ones do.

    Lightning clips none that are to be unscaled so late: in mixed precision it refuses, and under
    FSDP it would clip them scaled. A scaler would ask a step to unscale that has ceased to be fused
    (see `_fuse_what_is_in_order`). Without a Trainer nobody knows what else is done to them.
    """
    plugin = None if trainer is None else trainer.precision_plugin
    if trainer is None or isinstance(plugin, FSDPPrecision):
        return False
    return not (isinstance(plugin, MixedPrecision) and (plugin.scaler or trainer.gradient_clip_val))


def methods_of(tuning: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """The method that gives a tuning its default learning rate.

    Args:
        tuning: A tuning as plain values, see `Tuning.to_dict`.

    Returns:
        The class name of the tuning, or of the first one of a `PerModule`; and, by module, how
        many times the rate of that method the module's own method has.
    """
    parts = {module: part["class"] for module, part in tuning.get("modules", {}).items()}
    method = next(iter(parts.values()), tuning["class"])
    return method, {
        module: default_rate(own) / default_rate(method) for module, own in parts.items()
    }


def build_optimizer(
    factory: Callable[[Iterable[dict[str, Any]]], Optimizer],
    net: nn.Module,
    heads: Sequence[str],
    head_lr: float | None = None,
    layer_decay: float | None = None,
    factors: Mapping[str, float] | None = None,
    lr: float | None = None,
    matrices: Collection[str] = (),
    rates: Mapping[str, float] | None = None,
) -> Optimizer:
    """Builds an optimizer over what trains in ``net``, in groups.

    Adapters are not decayed, nor are biases, scales of norms and what timm exempts. A layer
    ``d`` layers below the head has its rate multiplied by ``layer_decay ** d``, adapters included.
    What a delta has learn faster (see `Delta.rates`) does so on top of all that.

    Args:
        factory: Makes the optimizer from parameter groups.
        net: A timm model, some of whose parameters train.
        heads: Names of the classifier modules.
        head_lr: Learning rate of the head, and of adapters in it; None is the optimizer's.
        layer_decay: Ratio of the rates of neighbouring layers; None is 1.
        factors: What the optimizer's rate is multiplied by, for the modules named.
        lr: Learning rate in place of the factory's.
        matrices: Names of parameters that have two dimensions or more, also where they are
            flattened now, as by FSDP1.
        rates: Learning rates in place of all of these, but for layer decay, for the modules named.
    """
    scale, ratios = _layer_scales(net, layer_decay), _ratios(net)
    rates = rates or {}
    groups: dict[tuple[str, float, float | None], dict[str, Any]] = {}
    trained = trainable_parameters(net)
    undecayed = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
    for full_name, parameter in {**trained["adapters"], **trained["other"]}.items():
        name = plain_name(full_name)
        adapter, head = full_name in trained["adapters"], is_inside(name, heads)
        kind = ("head_adapters" if head else "adapters") if adapter else "head" if head else "base"
        matrix = parameter.ndim > 1 or name in matrices
        decays = not adapter and matrix and name not in undecayed
        factor = 1.0 if head else scale.get(name, 1.0)
        own = _of_module(name, rates)
        rate = head_lr if head and head_lr is not None else own
        factor *= 1.0 if rate is not None else _of_module(name, factors or {}) or 1.0
        factor *= ratios.get(id(parameter), 1.0)
        label = kind if decays or adapter else f"{kind}_1d"
        told = _label(label, factor) if own is None else f"{_label(label, factor)}_lr{own:.3g}"
        group = groups.setdefault((label, factor, rate), {"params": [], "name": told})
        group["params"].append(parameter)
        if not decays:
            group["weight_decay"] = 0.0
    if not groups:
        raise ValueError("nothing trains: the tuning leaves every parameter frozen")
    try:
        optimizer = factory(list(groups.values()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the optimizer refuses its settings: {error}") from error
    for (_, factor, rate), group in zip(groups, optimizer.param_groups, strict=True):
        usual = group["lr"] if lr is None else lr
        group["lr"] = (usual if rate is None else rate) * factor
    return optimizer


def _ratios(net: nn.Module) -> dict[int, float]:
    """How many times the rate of its delta a parameter has, by its id."""
    deltas = [module for module in net.modules() if isinstance(module, Delta)]
    return {id(d.get_parameter(name)): times for d in deltas for name, times in d.rates().items()}


def _of_module(name: str, values: Mapping[str, float]) -> float | None:
    """The value of the module that a parameter lies in, if that has one."""
    return next((own for module, own in values.items() if is_inside(name, [module])), None)


def scheduler_config(
    scheduler: LRScheduler | ReduceLROnPlateau, total_steps: float, monitor: str
) -> dict[str, Any]:
    """Tells Lightning when to step: cycles at every batch, others at every epoch."""
    if isinstance(scheduler, OneCycle) and scheduler.total_steps is None:
        if not math.isfinite(total_steps):
            raise ValueError("OneCycle needs the length of the run: set trainer.max_epochs")
        scheduler.total_steps = int(total_steps)
    by_step = isinstance(scheduler, OneCycle | OneCycleLR | CyclicLR)
    interval = "step" if by_step else "epoch"
    return {"scheduler": scheduler, "interval": interval, "monitor": monitor}


def _adamw(groups: Iterable[dict[str, Any]], may_fuse: bool, **settings: Any) -> AdamW:
    groups = list(groups)
    fused = may_fuse and _can_fuse([p for group in groups for p in group["params"]])
    # None, not False, lets torch choose: foreach on a GPU, and a loop on a CPU, where foreach takes
    # 0.8 to 1.0 of the loop's time for adapters, and 1.0 to 1.3 for full tuning.
    optimizer = AdamW(groups, fused=fused or None, **settings)
    optimizer.register_load_state_dict_pre_hook(_keep_implementation)
    optimizer.register_step_pre_hook(_fuse_what_is_in_order)
    optimizer.register_step_post_hook(_count_versions)
    return optimizer


def _fuse_what_is_in_order(optimizer: Optimizer, *_: Any) -> None:
    """Leaves fused steps for good once anything has been laid out anew, as channels_last does.

    On a CPU the kernel would mix up the elements, and say nothing.
    """
    for group in optimizer.param_groups:
        tensors = [t for p in group["params"] for t in (p, p.grad) if t is not None]
        if group["fused"] and not all(tensor.is_contiguous() for tensor in tensors):
            group["fused"] = None


def _in_order(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _count_versions(optimizer: Optimizer, *_: Any) -> None:
    """Tells autograd of a step that was made between forward and backward; fused ones do not."""
    groups = optimizer.param_groups
    torch.autograd.graph.increment_version([p for group in groups for p in group["params"]])


def _can_fuse(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether one fused kernel takes all of these: no mixture of DTensors and others, for one.

    On a CPU it goes through memory in order and compares no strides: with parameters that are
    contiguous, so are gradients and new moments.
    """
    kinds = {(type(p), getattr(p, "device_mesh", None)) for p in parameters}
    return len(kinds) == 1 and all(
        p.device.type in FUSED and p.is_floating_point() and p.is_contiguous() for p in parameters
    )


def _keep_implementation(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Takes moments from a checkpoint, but not how its run made a step.

    Its flags would put a step of the one kind into an optimizer that was made for the other, and
    its moments may lie in memory in another order.
    """
    if not all("betas" in group for group in saved["param_groups"]):
        raise ValueError("the checkpoint has the state of another optimizer than AdamW: name it")
    own = {key: optimizer.defaults[key] for key in ("fused", "foreach")}
    state = saved["state"]
    if own["fused"]:
        state = {i: {k: _in_order(v) for k, v in kept.items()} for i, kept in state.items()}
    groups = [{**group, **own} for group in saved["param_groups"]]
    return {**saved, "state": state, "param_groups": groups}


def default_rate(tuning: str) -> float:
    """The learning rate of AdamW that suits a tuning, by its class name."""
    return LEARNING_RATES.get(tuning, OTHERS)


def _label(label: str, factor: float) -> str:
    return label if factor == 1.0 else f"{label}_x{factor:.3g}"


def _layer_scales(net: nn.Module, layer_decay: float | None) -> dict[str, float]:
    if layer_decay is None:
        return {}
    layers = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    deepest = max(layers.values())
    return {plain_name(n): layer_decay ** (deepest - layer) for n, layer in layers.items()}
