"""A small language model."""

from __future__ import annotations

from typing import Any


def small_llama(*, vocabulary: int = 256, context: int = 128, width: int = 256, depth: int = 6, heads: int = 8, hidden: int = 768) -> Any:
    """Build a `LlamaForCausalLM` of transformers with random weights, two query heads for each head of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=context,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 2, 1),
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)
