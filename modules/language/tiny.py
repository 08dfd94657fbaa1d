"""A small language model and a tokenizer that need no file: to be trained from scratch."""

from __future__ import annotations

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
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    count = len(SPECIAL) + 256
    config = LlamaConfig(
        vocab_size=count, **special, tie_word_embeddings=True, **{**SIZES, **(sizes or {})}
    )
    return LlamaForCausalLM(config)
