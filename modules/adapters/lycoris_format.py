"""LyCORIS LoCon files, plain and Tucker, read exactly.

A file holds ``<flattened layer>.lora_up.weight``, ``.lora_down.weight``, for Tucker
``.lora_mid.weight``, and ``.alpha``. With ``lora_mid`` as the core and identities for the kernel
modes, Tucker LoCon is FLoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta, WeightInfo
from .errors import AdapterError
from .files import Stored
from .flora import FLoRADelta
from .lora import LoRADelta
from .targets import Candidate, candidates
from .tucker import mode_product

KNOWN = ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "scalar")


def from_lycoris(tensors: dict[str, Tensor], model: nn.Module) -> Stored:
    """Understands a LyCORIS LoCon file.

    Raises:
        AdapterError: It holds another algorithm, or names a layer that the model has not.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        stem, _, suffix = key.partition(".")
        if suffix not in KNOWN:
            raise AdapterError(f"{key}: of LyCORIS only LoCon is read ({', '.join(KNOWN)})")
        groups.setdefault(stem, {})[suffix] = tensor
    by_name = _flattened(model)
    stored = Stored({})
    prefixes: dict[str, str] = {}
    for stem, group in groups.items():
        if "lora_up.weight" not in group or "lora_down.weight" not in group:
            raise AdapterError(f"{stem}: the file lacks lora_up or lora_down")
        candidate = _find(stem, by_name)
        prefixes[stem.removesuffix(candidate.layer.replace(".", "_"))] = stem
        stored.deltas[candidate.info.name] = _delta(candidate.info, group)
    if len(prefixes) > 1:  # then some stem only ends like a layer of this model
        raise AdapterError(f"the file is for another model: {' and '.join(prefixes.values())}")
    return stored


def _delta(
    info: WeightInfo, group: dict[str, Tensor]
) -> tuple[Callable[[WeightInfo], Delta], dict[str, Tensor]]:
    up, down = group["lora_up.weight"].flatten(1), group["lora_down.weight"]
    rank = down.shape[0]
    scale = float(group.get("alpha", torch.tensor(rank))) / rank
    scale *= float(group.get("scalar", torch.tensor(1.0)))
    mid = group.get("lora_mid.weight")
    if mid is None:
        return (lambda info: LoRADelta(info, rank, scale)), {"lora_A": down, "lora_B": up}
    return _tucker(info, mid, up, down.flatten(1).T, scale)


def _tucker(
    info: WeightInfo, mid: Tensor, up: Tensor, narrow: Tensor, scale: float
) -> tuple[Callable[[WeightInfo], Delta], dict[str, Tensor]]:
    factors: dict[int, Tensor] = {0: up, 1: narrow}
    core = mid
    for mode in (0, 1):
        if info.shape[mode] == 1:  # a mode of size 1 carries no factor
            core = mode_product(core, factors.pop(mode), mode)
    for mode in info.spatial:
        if info.shape[mode] > 1:
            factors[mode] = torch.eye(info.shape[mode])
    settings: dict[str, Any] = {
        "ranks": list(core.shape),
        "scale": scale,
        "frozen_modes": list(info.spatial),
    }
    tensors = {"core": core} | {f"factors.{mode}": factor for mode, factor in factors.items()}
    return (lambda info: FLoRADelta(info, **settings)), tensors


def _flattened(model: nn.Module) -> dict[str, list[Candidate]]:
    found: dict[str, list[Candidate]] = {}
    for candidate in candidates(model):
        if candidate.param == "weight" and candidate.info.kind != "parameter":
            found.setdefault(candidate.layer.replace(".", "_"), []).append(candidate)
    return found


def _find(stem: str, by_name: dict[str, list[Candidate]]) -> Candidate:
    """The layer behind a flattened name, which stands after a prefix such as "lycoris_"."""
    fits = [name for name in by_name if stem == name or stem.endswith(f"_{name}")]
    if not fits:
        raise AdapterError(f"the file changes {stem}, and no layer of this model is called so")
    best = by_name[max(fits, key=len)]
    if len(best) > 1:
        both = " and ".join(candidate.layer for candidate in best)
        raise AdapterError(f"{stem} can mean {both}: LyCORIS names do not tell them apart")
    return best[0]
