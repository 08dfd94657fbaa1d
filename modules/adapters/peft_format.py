"""PEFT's folder format for LoRA, read and written.

Keys are ``base_model.model.<layer>.lora_A.weight``; an embedding's are ``lora_embedding_A`` and
``lora_embedding_B``. A is ``[r, in, ...]`` and B ``[out, r]``, or ``[out, r, 1, 1]`` on a
convolution, which are the shapes of `LoRADelta` but for those ones.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .delta import Delta, WeightInfo
from .errors import AdapterError
from .files import Stored
from .lora import LoRADelta
from .sharded import whole
from .starts import OLoRADelta, PiSSADelta
from .targets import Candidate, candidates

PREFIX = "base_model.model."
# Deltas that are one product of two matrices beside the base as it is.
_PLAIN = (LoRADelta, PiSSADelta, OLoRADelta)
_KEY = re.compile(r"(?P<layer>.*?)\.?lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?$")


def from_peft(tensors: dict[str, Tensor], config: dict[str, Any], model: nn.Module) -> Stored:
    """Understands a PEFT LoRA folder.

    Raises:
        AdapterError: It is no plain LoRA, or it names a layer that the model has not.
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
    for layer, pair in factors.items():
        if set(pair) != {"lora_A", "lora_B"}:
            raise AdapterError(f"{layer}: the PEFT file has only {', '.join(pair)}")
        if layer not in by_layer:
            raise AdapterError(f"the PEFT adapter changes {layer}, which this model does not have")
        lora_A, lora_B = pair["lora_A"], pair["lora_B"].flatten(1)
        rank = lora_A.shape[0]
        scale = _scale(config, layer, rank)
        dropout = float(config.get("lora_dropout") or 0.0)
        stored.deltas[by_layer[layer].info.name] = (
            _lora_builder(rank, scale, dropout),
            {"lora_A": lora_A, "lora_B": lora_B},
        )
    return stored


def _lora_builder(rank: int, scale: float, dropout: float) -> Callable[[WeightInfo], Delta]:
    return lambda info: LoRADelta(info, rank, scale, dropout=dropout if info.has_side else 0.0)


def to_peft(
    deltas: dict[str, Delta], trained: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration in PEFT's format.

    Raises:
        AdapterError: A delta is not one that PEFT's LoRA can hold.
    """
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in trained.items()}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for weight, delta in deltas.items():
        layer, _, param = weight.rpartition(".")
        info = delta.info
        plain = type(delta) in _PLAIN and param == "weight" and info.groups == 1
        if not (isinstance(delta, LoRADelta) and plain):
            raise AdapterError(
                f"{weight}: PEFT's LoRA format cannot hold this delta ({type(delta).__name__}); "
                "save it in litflora's own format"
            )
        infix, suffix = ("embedding_", "") if info.kind == "embedding" else ("", ".weight")
        lora_A, lora_B = delta.pair(*map(whole, delta.tensors()))
        ones = [1] * (len(info.shape) - 2)
        tensors[f"{PREFIX}{layer}.lora_{infix}A{suffix}"] = lora_A
        tensors[f"{PREFIX}{layer}.lora_{infix}B{suffix}"] = lora_B.reshape(*lora_B.shape, *ones)
        ranks[layer], alphas[layer] = len(lora_A), delta.scale * len(lora_A)
    return tensors, _config(deltas, trained, ranks, alphas)


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
        "use_dora": False,
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
        "use_dora",
        "lora_bias",
        "alora_invocation_tokens",
        "megatron_config",
        "layer_replication",
    ):
        if config.get(flag):
            raise AdapterError(f"the PEFT folder sets {flag}: only plain LoRA can be read")
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
