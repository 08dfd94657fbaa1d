"""PEFT's folder format for LoRA and DoRA, read and written.

Keys are ``base_model.model.<layer>.lora_A.weight``; an embedding's are ``lora_embedding_A`` and
``lora_embedding_B``. A is ``[r, in, ...]`` and B ``[out, r]``, or ``[out, r, 1, 1]`` on a
convolution, which are the shapes of `LoRADelta` but for those ones. DoRA adds
``lora_magnitude_vector``: ``[out]``, or ``[1, out, 1, 1]`` on a convolution.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .delta import Delta, WeightInfo
from .dora import DoRADelta
from .errors import AdapterError
from .files import Stored
from .lora import LoRADelta
from .sharded import whole
from .starts import OLoRADelta, PiSSADelta
from .targets import Candidate, candidates

PREFIX = "base_model.model."
# Deltas that are one product of two matrices beside the base as it is.
_PLAIN = (LoRADelta, PiSSADelta, OLoRADelta)
_KEY = re.compile(
    r"(?P<layer>.*?)\.?lora_(embedding_)?(?P<factor>A|B|magnitude_vector)(\.weight)?$"
)


def from_peft(tensors: dict[str, Tensor], config: dict[str, Any], model: nn.Module) -> Stored:
    """Understands a PEFT LoRA or DoRA folder. The dropout of DoRA is not taken over.

    Raises:
        AdapterError: It is neither of the two, or it names a layer that the model has not.
    """
    _refuse_variants(config)
    by_layer = _by_layer(model)
    factors: dict[str, dict[str, Tensor]] = {}
    trained: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _KEY.match(name)
        if match:
            layer = match["layer"].replace(".base_layer", "")
            factors.setdefault(layer, {})[f"lora_{match['factor']}"] = tensor
        else:
            trained[name.replace(".modules_to_save", "")] = tensor
    stored = Stored({}, trained, config)
    dora = bool(config.get("use_dora"))
    expected = ["lora_A", "lora_B", *["lora_magnitude_vector"] * dora]
    for layer, found in factors.items():
        if set(found) != set(expected):
            raise AdapterError(
                f"{layer}: the PEFT file has {', '.join(found)}, and not {', '.join(expected)}"
            )
        if layer not in by_layer:
            raise AdapterError(f"the PEFT adapter changes {layer}, which this model does not have")
        if wrong := _wrong_in_peft(by_layer[layer].module):
            raise AdapterError(
                f"{layer}: what PEFT trained there is no W + dW, for it leaves out {wrong}"
            )
        own = {"lora_A": found["lora_A"], "lora_B": found["lora_B"].flatten(1)}
        rank = own["lora_A"].shape[0]
        scale = _scale(config, layer, rank)
        if dora:
            own["magnitude"] = found["lora_magnitude_vector"].flatten()
            build = _dora_builder(rank, scale)
        else:
            build = _lora_builder(rank, scale, float(config.get("lora_dropout") or 0.0))
        stored.deltas[by_layer[layer].info.name] = (build, own)
    return stored


def _lora_builder(rank: int, scale: float, dropout: float) -> Callable[[WeightInfo], Delta]:
    return lambda info: LoRADelta(info, rank, scale, dropout=dropout if info.has_side else 0.0)


def _dora_builder(rank: int, scale: float) -> Callable[[WeightInfo], Delta]:
    return lambda info: DoRADelta(info, rank, scale)


def to_peft(
    model: nn.Module, deltas: dict[str, Delta], trained: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration in PEFT's format.

    Raises:
        AdapterError: There is no delta, or one that PEFT's LoRA cannot hold or would compute
            otherwise, or some are DoRA's alone.
    """
    if not deltas:
        raise AdapterError("PEFT's format holds adapters, and there is none: merge the model")
    dora = any(type(delta) is DoRADelta for delta in deltas.values())
    wanted = (DoRADelta,) if dora else _PLAIN
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in trained.items()}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for weight, delta in deltas.items():
        layer, _, param = weight.rpartition(".")
        info = delta.info
        exact = type(delta) in wanted and param == "weight" and info.groups == 1
        if not (isinstance(delta, LoRADelta) and exact):
            raise AdapterError(
                f"{weight}: PEFT's {'DoRA' if dora else 'LoRA'} format cannot hold this delta "
                f"({type(delta).__name__}); save it in litflora's own format"
            )
        if wrong := _wrong_in_peft(model.get_submodule(layer)):
            raise AdapterError(
                f"{weight}: PEFT would compute another model, for it leaves out {wrong}; merge "
                "this one, or save it in litflora's own format"
            )
        infix, suffix = ("embedding_", "") if info.kind == "embedding" else ("", ".weight")
        start = (delta.get_parameter(name) for name in sorted(delta.frozen()))  # of PiSSA, OLoRA
        lora_A, lora_B = delta.pair(*map(whole, (delta.lora_A, delta.lora_B, *start)))
        if info.padding_idx is not None:  # the row that we leave out, and PEFT does not
            lora_A = lora_A.index_fill(1, torch.tensor(info.padding_idx, device=lora_A.device), 0)
        ones = [1] * (len(info.shape) - 2)
        tensors[f"{PREFIX}{layer}.lora_{infix}A{suffix}"] = lora_A
        tensors[f"{PREFIX}{layer}.lora_{infix}B{suffix}"] = lora_B.reshape(*lora_B.shape, *ones)
        if isinstance(delta, DoRADelta):
            shape = [1, -1, *ones] if ones else [-1]
            tensors[f"{PREFIX}{layer}.lora_magnitude_vector"] = whole(delta.magnitude).view(shape)
        ranks[layer], alphas[layer] = len(lora_A), delta.scale * len(lora_A)
    return tensors, {**_config(deltas, trained, ranks, alphas), "use_dora": dora}


def _wrong_in_peft(layer: nn.Module) -> str:
    """What of a layer PEFT does not give to the chain beside it; "" if nothing."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return "that the convolution is transposed"
    if isinstance(layer, nn.modules.conv._ConvNd):
        if layer.padding_mode != "zeros":
            return f"padding_mode={layer.padding_mode!r}"
        if any(step > 1 for step in layer.dilation):
            return f"dilation={layer.dilation}"
    return ""


def _config(
    deltas: dict[str, Delta],
    trained: dict[str, Tensor],
    ranks: dict[str, int],
    alphas: dict[str, float],
) -> dict[str, Any]:
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else float(rank)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max((delta.dropout for delta in deltas.values()), default=0.0),
        "target_modules": sorted(ranks),
        "rank_pattern": {_exactly(k): r for k, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(k): a for k, a in alphas.items() if a != alpha},
        "modules_to_save": sorted({key.rpartition(".")[0] for key in trained}) or None,
        "fan_in_fan_out": any(
            d.info.kind == "linear" and d.info.out_dim == 1 for d in deltas.values()
        ),
        "bias": "none",
        "use_rslora": False,
    }


def _exactly(layer: str) -> str:
    """A pattern of PEFT's that names this layer alone."""
    return f"^{re.escape(layer)}"


def _scale(config: dict[str, Any], layer: str, rank: int) -> float:
    alpha = float(config.get("lora_alpha") or 8)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            alpha = float(own)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_layer(model: nn.Module) -> dict[str, Candidate]:
    wanted = ("weight", "in_proj_weight")
    return {
        c.layer: c for c in candidates(model) if c.param in wanted and c.info.kind != "parameter"
    }


def _refuse_variants(config: dict[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise AdapterError(f"a PEFT folder of type {config['peft_type']}: only LORA can be read")
    for flag in (
        "lora_bias",
        "alora_invocation_tokens",
        "megatron_config",
        "layer_replication",
    ):
        if config.get(flag):
            raise AdapterError(f"the PEFT folder sets {flag}: only plain LoRA and DoRA can be read")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise AdapterError(
            f"the PEFT folder starts from a changed base (init_lora_weights={start}): convert it "
            "in PEFT to a plain LoRA first"
        )
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"the PEFT folder trains biases (bias={config['bias']!r}): not supported"
        )
