"""Language models of transformers by name or folder, and their tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbones.deferred import deferred, parameters_on_meta
from ..datamodules.conversations import IMAGE
from .tiny import byte_tokenizer, tiny_language_model

TINY = "tiny"


def language_model(
    name: str, options: dict[str, Any] | None = None, sketched: bool = False
) -> nn.Module:
    """A causal language model.

    Args:
        name: A folder, a name on the hub, or ``tiny``.
        options: What differs in the configuration of ``tiny``.
        sketched: Leave it without numbers, on the meta device.
    """
    device = torch.device("meta" if sketched else "cpu")
    if name == TINY:
        with device:
            return tiny_language_model(options)
    from transformers import AutoConfig, AutoModelForCausalLM

    with _explained(name):
        config = AutoConfig.from_pretrained(name)
        if sketched:
            with device:
                return AutoModelForCausalLM.from_config(config)
        if deferred() is not None:
            return _without_weights(name, config)
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def _without_weights(name: str, config: Any) -> nn.Module:
    """A model whose weights stay in its files, of which each process reads its part later."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME, cached_file

    waiting = deferred()
    assert waiting is not None
    with parameters_on_meta():
        net = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for file in _weight_files(name):
        waiting.note(net, waiting.load_file(file))
    waiting.files.clear()
    lost = [key for key, p in net.named_parameters() if p not in waiting.sources]
    if lost:
        raise ValueError(
            f"its files have no {lost[0]}: load it and save it with this transformers, so that "
            "they have the model's own names"
        )
    optional = {"_raise_exceptions_for_missing_entries": False}
    if cached_file(name, GENERATION_CONFIG_NAME, **optional) is not None:
        net.generation_config = GenerationConfig.from_pretrained(name)
    return net


def _weight_files(name: str) -> list[str]:
    """The safetensors files of a model, in a folder or the hub's cache."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return [cached_file(name, SAFE_WEIGHTS_NAME)]
    files = json.loads(Path(index).read_text())["weight_map"].values()
    return [cached_file(name, file) for file in sorted(set(files))]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Says in a line what could not be read."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"language model {name} could not be read: {reason}\n"
            "Give the folder of a causal language model of transformers, its name on the hub, or "
            "tiny"
        ) from error


@cache
def tokenizer_of(name: str) -> Any:
    """The tokenizer of a language model, with a token for images."""
    if name == TINY:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if len(tokenizer(IMAGE, add_special_tokens=False)["input_ids"]) != 1:
        tokenizer.add_tokens([IMAGE], special_tokens=True)
    return tokenizer
