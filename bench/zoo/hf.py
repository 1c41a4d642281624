"""What the entries from `transformers` share: a model class by name, its configuration as keywords, inputs drawn after it is built."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .entry import BATCH, Built, Entry, padding_mask, tokens

VOCABULARY = 100
Options = Mapping[str, Any]
Inputs = Callable[[], dict[str, Any]]

TINY: Options = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: Options = {**TINY, "num_key_value_heads": 2, "use_cache": False}
"""A decoder with grouped-query attention: 4 query heads share 2 key-value heads."""


def ids(length: int = 12) -> dict[str, Tensor]:
    """Token ids without a mask: every sample has full length."""
    return {"input_ids": tokens(VOCABULARY, length)}


def padded(length: int = 12) -> dict[str, Tensor]:
    """Token ids and an attention mask; the last sample is shorter."""
    found = ids(length)
    return {**found, "attention_mask": padding_mask(found["input_ids"])}


def seq2seq() -> dict[str, Tensor]:
    """Encoder ids with a mask, and shorter decoder ids."""
    return {**padded(12), "decoder_input_ids": tokens(VOCABULARY, 7)}


def pixels(size: int = 32, channels: int = 3) -> dict[str, Tensor]:
    from .entry import image

    return {"pixel_values": image(channels, size)}


def speech(length: int = 1600) -> dict[str, Tensor]:
    """Raw audio [B, T]."""
    return {"input_values": torch.randn(BATCH, length)}


def configuration(class_name: str, **options: Any) -> Any:
    """`transformers.<class_name>(**options)`; by name, so that listing the zoo imports nothing."""
    import transformers

    return getattr(transformers, class_name)(**options)


def model(
    class_name: str,
    inputs: Inputs,
    options: Options | None = None,
    *,
    config: Callable[[], Any] | None = None,
    attention: str | None = None,
) -> Callable[[], Built]:
    """A builder of `transformers.<class_name>`.

    options: keywords of the class's own configuration. config: builds the configuration instead, for nested ones.
    attention: attention implementation, None = the default.
    """

    def build() -> Built:
        import transformers

        kind = getattr(transformers, class_name)
        chosen = config() if config is not None else kind.config_class(**(options or {}))
        if attention is not None:
            chosen._attn_implementation = attention
        torch.manual_seed(0)
        return kind(chosen), (), inputs()

    return build


def named(builders: Mapping[str, Callable[[], Built]]) -> list[Entry]:
    return [Entry(f"transformers/{name}", functools.partial(builder)) for name, builder in builders.items()]
