"""LLaVA-1.5, as it is measured: of random weights, by its configuration alone."""

from __future__ import annotations

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig


def llava_7b() -> LlavaConfig:
    """LLaVA-1.5-7B: CLIP's ViT-L at 336 pixels, and a Llama of 7 B."""
    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return LlavaConfig(vision_config=clip, text_config=LlamaConfig(vocab_size=32064))


def small_llava() -> LlavaConfig:
    """The same kind of model, two layers deep and narrow: what a CPU can run."""
    clip = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        projection_dim=64,
    )
    llama = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlavaConfig(
        vision_config=clip, text_config=llama, image_token_index=127, image_seq_length=16
    )
