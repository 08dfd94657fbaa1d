"""Small checkpoints of transformers with random weights, and processors whose tokens are bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from litflora.language.tiny import byte_tokenizer

KINDS = ("llava", "qwen2_vl", "internvl")
# For what takes seconds with each.
FIRST = [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
SIDE = 56
# As the templates of these checkpoints go: LLaVA's shows images first and ends no answer.
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{{% for message in messages %}}{{{{ '<|im_start|>' + message['role'] + '\n' }}}}"
    "{{% for part in message['content'] %}}{{% if part['type'] == 'image' %}}{{{{ '{image}' }}}}"
    "{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{{{ '<|im_end|>\n' }}}}"
    "{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\n' }}}}{{% endif %}}"
)
CHAT = ["<|im_start|>", "<|im_end|>"]
MARKS = {
    "qwen2_vl": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "internvl": ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
}
# What InternVL's processor asks its tokenizer for.
NAMES = ("start_image_token", "end_image_token", "context_image_token", "video_token")
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}


def save_checkpoint(kind: str, folder: Path, **saving: Any) -> Path:
    """Saves a model and its processor; weights are random, and the same every time."""
    processor = _processor(kind)
    with torch.random.fork_rng():
        torch.manual_seed(len(kind))
        model = _model(kind, processor.tokenizer).float()
        for parameter in model.parameters():  # answers that differ from image to image
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, **saving)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text("What a checkpoint's folder holds beside its weights.\n")
    return folder


def _tokenizer(kind: str) -> Any:
    tokenizer = byte_tokenizer()
    if kind != "llava":
        tokenizer.add_tokens([*CHAT, *MARKS[kind]], special_tokens=True)
        tokenizer.eos_token = CHAT[1]
    tokenizer.chat_template = None
    if kind != "internvl":
        return tokenizer
    named = dict(zip(NAMES, MARKS[kind], strict=True))
    plain, special = tokenizer.backend_tokenizer, tokenizer.special_tokens_map
    return PreTrainedTokenizerFast(tokenizer_object=plain, extra_special_tokens=named, **special)


def _processor(kind: str) -> Any:
    tokenizer = _tokenizer(kind)
    if kind == "llava":
        sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        options = {"patch_size": 14, "vision_feature_select_strategy": "default"}
        extra = {"num_additional_image_tokens": 1, "chat_template": LLAVA}
        return LlavaProcessor(CLIPImageProcessor(**sides), tokenizer, **options, **extra)
    if kind == "qwen2_vl":
        images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=84 * 84)
        template = CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>")
        return Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
    images = GotOcr2ImageProcessor(size={"height": 28, "width": 28}, max_patches=2)
    template = CHATML.format(image="<IMG_CONTEXT>")
    video = InternVLVideoProcessor()
    return InternVLProcessor(images, tokenizer, video, image_seq_length=1, chat_template=template)


def _model(kind: str, tokenizer: Any) -> Any:
    text = {"vocab_size": len(tokenizer), **SIZES}
    if kind == "llava":
        tower = CLIPVisionConfig(**TOWER, num_attention_heads=2, image_size=SIDE, patch_size=14)
        token = tokenizer.convert_tokens_to_ids("<image>")
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=tower, text_config=LlamaConfig(**text), image_token_index=token
            )
        )
    tokens = tokenizer.convert_tokens_to_ids(MARKS[kind])
    text["eos_token_id"] = tokenizer.eos_token_id
    if kind == "qwen2_vl":
        names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        tower = {"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
        return Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                text_config={**text, "rope_parameters": rope},
                vision_config=tower,
                **dict(zip(names, tokens, strict=True)),
            )
        )
    sides = {"image_size": [28, 28], "patch_size": [14, 14]}
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config={**TOWER, **sides, "num_attention_heads": 2},
            text_config=Qwen2Config(**text),
            image_token_id=tokens[2],
        )
    )
