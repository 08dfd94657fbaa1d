"""Language models of transformers by name or folder, and their tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from ..backbones.deferred import deferred
from ..datamodules.conversations import IMAGE
from .deferred import without_weights
from .quiet import bars_on_screens_only
from .tiny import byte_tokenizer, tiny_language_model

TINY = "tiny"


def language_model(
    name: str,
    options: dict[str, Any] | None = None,
    sketched: bool = False,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
) -> nn.Module:
    """A causal language model.

    Args:
        name: A folder, a name on the hub, or ``tiny``.
        options: What differs in the configuration of ``tiny``.
        sketched: Leave it without numbers, on the meta device.
        dtype: The type it is read in; "auto" is that of its files.
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
        if (waiting := deferred()) is not None:
            return without_weights(AutoModelForCausalLM, name, waiting)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Says in a line what could not be read."""
    try:
        with bars_on_screens_only():
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
