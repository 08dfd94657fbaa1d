"""A small language model and a tokenizer that need no file: to be trained from scratch."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from ..datamodules.conversations import IMAGE

# Roles are written as single tokens: bytes are many, and these come in every conversation.
SPECIAL = ("<pad>", "<s>", "</s>", IMAGE, "<user>", "<assistant>")
TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}</s>"
    "{% elif message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What the tokenizer decides.
FIXED = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}


def byte_tokenizer() -> Any:
    """A tokenizer of transformers whose tokens are the 256 bytes, and a few that are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    plain = Tokenizer(models.BPE(vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=list(SPECIAL[3:]),
        chat_template=TEMPLATE,
    )


def tiny_language_model(sizes: dict[str, Any] | None = None) -> nn.Module:
    """A Llama with random weights for `byte_tokenizer`.

    Args:
        sizes: What differs from `SIZES`; names are those of transformers' LlamaConfig.

    Raises:
        ValueError: It has no such size, or they do not fit each other.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    _check(sizes or {}, {*LlamaConfig().to_dict(), "attn_implementation"})
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    count = len(SPECIAL) + 256
    config = LlamaConfig(
        vocab_size=count, **special, tie_word_embeddings=True, **{**SIZES, **(sizes or {})}
    )
    return LlamaForCausalLM(config)


def _check(sizes: dict[str, Any], known: set[str]) -> None:
    for name in sizes:
        if name not in known or name in FIXED:
            near = difflib.get_close_matches(name, [*SIZES], n=1) or [", ".join(SIZES)]
            raise ValueError(f"language_options has no {name}: there is {near[0]}")
    width, heads = ({**SIZES, **sizes}[n] for n in ("hidden_size", "num_attention_heads"))
    if width % (2 * heads):
        raise ValueError(
            f"language_options: hidden_size {width} cannot be shared out among {heads} "
            f"num_attention_heads: give a multiple of {2 * heads}"
        )
