"""Adapters on disk: a folder of two files, without pickle and without anything of the base."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .delta import Delta, WeightInfo
from .errors import AdapterError
from .fingerprint import base_tensors, check, fingerprint, first_difference, running_buffers
from .folder import CONFIG, FORMAT, WEIGHTS, check_together, read_config, read_tensors, write
from .inject import adapter_names, attach, check_name
from .layers import Origin, adapted_layers, origin_of
from .planning import Planned, resolve_modules
from .sharded import is_sharded
from .smaller import without_zeros
from .split import SplitDelta, part_info
from .targets import candidates, refuse_lazy, refuse_unusable


@dataclass
class Stored:
    """An adapter as read from disk, whatever its format.

    Attributes:
        deltas: For each weight, how to build its delta and the delta's tensors.
        trained: Parameters and buffers of the base that were trained, by name.
        config: The configuration as it stands in the file.
    """

    deltas: dict[str, tuple[Callable[[WeightInfo], Delta], dict[str, Tensor]]]
    trained: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    metadata: dict[str, Any] | None = None,
    format: Literal["litflora", "peft"] = "litflora",
    overwrite: bool = False,
) -> Path:
    """Writes an adapter, with every other parameter that trains and batch-norm statistics.

    Of a sharded model (FSDP2) all processes must call it, and one writes. No more than what is
    saved, and of the base one tensor at a time, is gathered.

    Args:
        model: The model.
        folder: Where ``adapter_model.safetensors`` and ``adapter_config.json`` go.
        name: The adapter.
        metadata: Plain values to be kept in the configuration, such as class names.
        format: "litflora", or "peft" for LoRA or DoRA that PEFT can load.
        overwrite: Replace an adapter that is there already.

    Returns:
        The folder.

    Raises:
        AdapterError: There is nothing to save, or an adapter is there already.
    """
    folder = Path(folder)
    if not overwrite and any((folder / file).exists() for file in (WEIGHTS, CONFIG)):
        raise AdapterError(
            f"{folder} holds an adapter already: choose another folder, or overwrite=True"
        )
    if format not in ("litflora", "peft"):
        raise AdapterError(f"format must be 'litflora' or 'peft', not {format!r}")
    deltas = _deltas(model, name)
    trained = _trained(model, name)
    if not deltas and not any(parameter.requires_grad for parameter in model.parameters()):
        raise AdapterError(f"nothing to save: no adapter {name!r} and no parameter that trains")
    if format == "peft":
        from .peft_format import to_peft

        # PEFT keeps whole modules: a trained bias brings its weight, statistics their norm.
        modules = {key.rpartition(".")[0] for key in trained}
        base = {k: t for k, t in base_tensors(model).items() if k.rpartition(".")[0] in modules}
        tensors, config = to_peft(model, deltas, base)
        write(folder, tensors, config, is_sharded(model))
        return folder
    tensors = {f"{_key(w)}.{p}": t for w, d in deltas.items() for p, t in d.state_dict().items()}
    base = {k: t for k, t in base_tensors(model).items() if k not in trained}
    config = {
        "format": FORMAT,
        "litflora": _version(),
        "tuning": origin_of(model, name).tuning,
        "method": sorted({type(leaf).__name__.removesuffix("Delta") for leaf in _leaves(deltas)}),
        "deltas": {weight: _record(delta) for weight, delta in deltas.items()},
        "trained": sorted(trained),
        "base": fingerprint(base),
        "metadata": metadata or {},
    }
    write(folder, {**tensors, **trained}, config, is_sharded(model))
    return folder


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    train: Sequence[str] = (),
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Reads an adapter into a model: injects its deltas and puts trained parameters in place.

    Reads folders written by `save`, PEFT's of LoRA and DoRA, and LyCORIS LoCon ``.safetensors``.

    Args:
        model: The base that the adapter was trained on.
        folder: The adapter.
        name: The name it gets in this model.
        train: Names of modules that stay trainable, besides the deltas and whatever else the
            adapter holds trained.
        device: Where the deltas live; None is where their weights do. With it, a base without
            memory (on the meta device) can be given; `check_base` is then for later.

    Returns:
        The configuration that stands in the folder.

    Raises:
        AdapterError: Something is missing, unexpected, of another shape or rank, damaged, or made
            for another base. The model is then as it was.
    """
    refuse_lazy(model)
    if device is None and any(parameter.is_meta for parameter in model.parameters()):
        raise AdapterError(
            "the model has no memory yet: load(..., device=...) says where deltas go"
        )
    check_name(model, name)
    modules = resolve_modules(model, train)
    try:
        stored = _read(Path(folder), model)
        planned = _plan(model, stored, device)
    except AdapterError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        what = str(error).splitlines()[0]
        raise AdapterError(f"{folder} is damaged: {type(error).__name__}: {what}") from error
    _check_trained(model, stored.trained)
    _refuse_overwriting(model, stored.trained)
    if "format" in stored.config:
        # Last, since the checks before it can name what differs.
        check_together(Path(folder), stored.config)
        if device is None or not any(p.is_meta for p in model.parameters()):
            check_base(model, stored.config)
    model.requires_grad_(False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = frozenset(stored.trained.keys() & parameters.keys())
    attach(model, name, planned, Origin(stored.config.get("tuning", {}), trained))
    for key, tensor in stored.trained.items():
        _put(model, key, tensor, device)
    for key in trained:
        model.get_parameter(key).requires_grad_(True)
    for module in modules:
        model.get_submodule(module).requires_grad_(True)
    return stored.config


def check_base(model: nn.Module, config: dict[str, Any]) -> None:
    """Raises unless a model has the base that an adapter was made for.

    Args:
        model: A model that holds the adapter; if it is sharded, all processes must call this.
        config: The adapter's configuration, as `load` returns it.

    Raises:
        AdapterError: A tensor of the base is missing or has other values.
    """
    check(config["base"], base_tensors(model))


@torch.no_grad()
def _put(model: nn.Module, key: str, value: Tensor, device: torch.device | None) -> None:
    """Writes a value into a parameter or buffer; one without memory is exchanged for a real one."""
    layer, _, name = key.rpartition(".")
    module = model.get_submodule(layer)
    own = getattr(module, name)
    if own.is_meta and device is not None:
        module._parameters[name] = nn.Parameter(value.to(device, own.dtype), requires_grad=False)
    else:
        own.copy_(value)


def _read(path: Path, model: nn.Module) -> Stored:
    if path.suffix == ".safetensors":
        from .lycoris_format import from_lycoris

        return from_lycoris(read_tensors(path), model)
    config = read_config(path)
    tensors = read_tensors(path / WEIGHTS)
    if "peft_type" in config:
        from .peft_format import from_peft

        return from_peft(tensors, config, model)
    return _from_litflora(tensors, config)


def _from_litflora(tensors: dict[str, Tensor], config: dict[str, Any]) -> Stored:
    trained = {key: tensors.pop(key) for key in config["trained"] if key in tensors}
    stored = Stored({}, trained, config)
    lost = sorted(set(config["trained"]) - set(trained))
    if lost:
        raise AdapterError(f"{WEIGHTS} lacks {lost[0]}, which {CONFIG} lists")
    for weight, record in config["deltas"].items():
        prefix = f"{_key(weight)}."
        own = {
            key.removeprefix(prefix): tensors.pop(key)
            for key in list(tensors)
            if key.startswith(prefix)
        }
        stored.deltas[weight] = (_builder(record), own)
    if tensors:
        raise AdapterError(f"{WEIGHTS} has {sorted(tensors)[0]}, which {CONFIG} does not list")
    return stored


def _builder(record: dict[str, Any]) -> Callable[[WeightInfo], Delta]:
    def build(info: WeightInfo) -> Delta:
        settings = dict(record)
        kind = settings.pop("type")
        settings.pop("shape", None)
        if kind == SplitDelta.__name__:
            sizes = settings["sizes"]
            parts = {
                index: _builder(part)(part_info(info, sizes, int(index)))
                for index, part in settings["parts"].items()
            }
            return SplitDelta(info, sizes, parts)
        if kind not in Delta.registry:
            raise AdapterError(
                f"{info.name} has a delta of type {kind!r}, unknown to this litflora"
            )
        try:
            return Delta.registry[kind](info, **settings)
        except (TypeError, ValueError, RuntimeError) as error:
            raise AdapterError(
                f"{info.name}: its settings in {CONFIG} do not fit: {error}"
            ) from None

    return build


def _plan(model: nn.Module, stored: Stored, device: torch.device | None) -> list[Planned]:
    """Builds the deltas that were stored, and fills them, without touching the model."""
    by_name = {candidate.info.name: candidate for candidate in candidates(model)}
    planned = []
    for weight, (build, tensors) in stored.deltas.items():
        if weight not in by_name:
            raise AdapterError(f"the adapter changes {weight}, which this model does not have")
        candidate = by_name[weight]
        refuse_unusable(candidate, model)
        shape = stored.config.get("deltas", {}).get(weight, {}).get("shape")
        if shape is not None and list(shape) != list(candidate.info.shape):
            raise AdapterError(
                f"{weight}: the adapter was made for shape {list(shape)}, "
                f"the model has {list(candidate.info.shape)}"
            )
        # First without memory, so that a damaged file cannot ask for all there is.
        _check_tensors(weight, build(replace(candidate.info, device=torch.device("meta"))), tensors)
        delta = build(candidate.info.on(device))
        delta.load_state_dict(tensors)
        planned.append(Planned(candidate, delta))
        planned[-1].bind()
    return planned


def _check_tensors(weight: str, delta: Delta, tensors: dict[str, Tensor]) -> None:
    own = delta.state_dict()
    missing, unexpected = first_difference(own, tensors)
    if missing or unexpected:
        problem = f"lacks {missing[0]}" if missing else f"has an unexpected {unexpected[0]}"
        raise AdapterError(f"{weight}: the adapter file {problem} (expected {', '.join(own)})")
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{weight}: {key} holds a NaN or an infinity in the adapter file")
        if own[key].shape != tensor.shape:
            raise AdapterError(
                f"{weight}: {key} has shape {list(tensor.shape)} in the file, "
                f"but {list(own[key].shape)} by its rank and layer"
            )


def _check_trained(model: nn.Module, trained: dict[str, Tensor]) -> None:
    present = base_tensors(model)
    for key, tensor in trained.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{key} holds a NaN or an infinity in the adapter file")
        if key not in present:
            raise AdapterError(f"the adapter holds a trained {key}, which this model does not have")
        if present[key].shape != tensor.shape:
            raise AdapterError(
                f"{key}: the adapter has shape {list(tensor.shape)}, the model "
                f"{list(present[key].shape)}. Build the model with as many classes as the adapter"
            )


def _refuse_overwriting(model: nn.Module, trained: dict[str, Tensor]) -> None:
    """Raises if another adapter's head and the like would be lost: the model holds them once."""
    names = adapter_names(model)
    present = base_tensors(model) if names else {}
    for key, tensor in trained.items():
        if names and not torch.equal(present[key].cpu(), tensor.to(present[key].dtype)):
            raise AdapterError(
                f"this adapter was trained with a {key} of its own, and the model has that of "
                f"{names[0]}: load it into a model of its own"
            )


def _deltas(model: nn.Module, name: str) -> dict[str, Delta]:
    found = {
        f"{layer}.{param}".lstrip("."): delta
        for layer, _, adapters in adapted_layers(model)
        if name in adapters
        for param, delta in adapters[name].items()
    }
    if not found and adapter_names(model):
        raise AdapterError(f"no adapter {name!r}: the model has {', '.join(adapter_names(model))}")
    kept = {weight: without_zeros(delta) for weight, delta in found.items()}
    return {weight: delta for weight, delta in kept.items() if delta is not None}


def _trained(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Parameters of the base that train or did with the adapter, and what batch norms gathered."""
    named = model.named_parameters(remove_duplicate=False)
    keys = {key for key, p in named if p.requires_grad} | running_buffers(model)
    keys |= origin_of(model, name).trained
    return {key: tensor for key, tensor in base_tensors(model).items() if key in keys}


def _leaves(deltas: dict[str, Delta]) -> list[Delta]:
    return [leaf for delta in deltas.values() for _, leaf in delta.leaves() if leaf is not None]


def _record(delta: Delta) -> dict[str, Any]:
    return {"type": type(delta).__name__, "shape": list(delta.info.shape), **delta.settings()}


def _key(weight: str) -> str:
    """The prefix of a delta's tensors: the adapter's name stays out of the file."""
    layer, _, param = weight.rpartition(".")
    return f"{layer}.adapters.{param}".lstrip(".")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("litflora")
    except PackageNotFoundError:
        return "unknown"
