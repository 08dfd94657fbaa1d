"""Models of transformers whose weights stay in their files until they have been shared out."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..backbones.deferred import Deferred, parameters_on_meta


def without_weights(kind: Any, name: str, waiting: Deferred) -> nn.Module:
    """A model of which each process reads its part later, in float32.

    transformers puts the names in the files, which may be those of an older version, to the model's
    own, and converts what it keeps in another form; what it takes as it is stays in the file.

    Args:
        kind: An auto class of transformers.
        name: A folder, or a name on the hub.
        waiting: What remembers where the weights are.

    Raises:
        ValueError: The files lack a weight.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    # What is drawn afterwards, as deltas are, is what it is where weights are read at once.
    with torch.random.fork_rng(devices=()), parameters_on_meta():
        net = kind.from_config(config, dtype=torch.float32)
    state = {key: t for file in _weight_files(name) for key, t in waiting.load_file(file).items()}
    floats = [t.dtype for t in state.values() if t.is_floating_point()]
    read, told = type(net).from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=reduce(torch.promote_types, floats),  # in another type all would be copied
        output_loading_info=True,
    )
    if told["missing_keys"]:
        lost = sorted(told["missing_keys"])
        raise ValueError(f"its files lack {lost[0]} ({len(lost)} in all)")
    waiting.note(net, dict(read.named_parameters(remove_duplicate=False)))
    waiting.files.clear()
    _take_rest(net, read, name)
    return net


def _take_rest(net: Any, read: nn.Module, name: str) -> None:
    """Takes over what is no parameter: saved buffers, and how the model generates."""
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    saved = read.state_dict()
    for key, buffer in net.named_buffers():
        if key in saved:
            buffer.copy_(saved[key])
    if _file(name, GENERATION_CONFIG_NAME) is not None:
        net.generation_config = GenerationConfig.from_pretrained(name)


def _weight_files(name: str) -> list[str]:
    """The safetensors files of a model, in a folder or the hub's cache."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    index = _file(name, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return [cached_file(name, SAFE_WEIGHTS_NAME)]
    files = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    return [cached_file(name, file) for file in sorted(set(files))]


def _file(name: str, file: str) -> str | None:
    from transformers.utils import cached_file

    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
