"""Tiny models of transformers, by name, whose greedy decoding wanders: random weights, large enough to matter."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**LLAMA, "num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ_TOKENS = {"decoder_start_token_id": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CAUSAL = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED, sliding_window=16)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**LLAMA)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_GROUPED, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=0)),
}
SEQ2SEQ_SIZES = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
SEQ2SEQ = {
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **SEQ2SEQ_TOKENS)
    ),
    "t5 of one layer": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, **SEQ2SEQ_TOKENS)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            max_position_embeddings=64,
            forced_eos_token_id=None,
            **SEQ2SEQ_SIZES,
            **SEQ2SEQ_TOKENS,
        )
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            **SEQ2SEQ_SIZES,
            **SEQ2SEQ_TOKENS,
        )
    ),
}
NAMES = [*CAUSAL, "t5", "bart", "whisper"]


def ids(*shape: int) -> Tensor:
    return torch.randint(4, 64, shape, generator=torch.Generator().manual_seed(1))


def build(name: str) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """(model, the inputs that it is analysed with, the inputs that it generates from)."""
    torch.manual_seed(0)
    model = {**CAUSAL, **SEQ2SEQ}[name]().eval()
    roughen(model)
    if name in CAUSAL:
        return model, {"input_ids": ids(2, 6)}, {"input_ids": ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    sound = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2))
    given = {"input_features": sound} if name == "whisper" else {"input_ids": ids(2, 6)}
    return model, {**given, "decoder_input_ids": ids(2, 4)}, given


def roughen(model: nn.Module) -> None:
    """Weights of a size that makes the largest logit depend on every layer."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2.0 / parameter.shape[-1] ** 0.5)


def decoded(model: Any, given: dict[str, Tensor], **options: Any) -> list[list[int]]:
    """Greedy decoding with a cache of keys and values."""
    count = {"max_new_tokens": 10, "min_new_tokens": 10}
    return hf.GenerationMixin.generate(model, **given, do_sample=False, use_cache=True, **count, **options).tolist()


READING = """
import json, sys, torch, transformers
folders, needing = json.loads(sys.argv[1]), json.loads(sys.argv[2])

def read(folder):
    given = torch.load(folder + "/given.pt", weights_only=True)
    kind = transformers.AutoModelForCausalLM if "attention_mask" in given else transformers.AutoModelForSeq2SeqLM
    model = kind.from_pretrained(folder)
    with torch.no_grad():
        extra = {} if "attention_mask" in given else {"decoder_input_ids": torch.full((2, 2), 3)}
        torch.save(model(**given, **extra).logits, folder + "/logits.pt")
    return model.generate(**given, do_sample=False, max_new_tokens=10, min_new_tokens=10).tolist()

tokens = [read(folder) for folder in folders]
assert not [name for name in sys.modules if name.partition(".")[0] == "geta"]
"""
"""Script of a process, up to where it may import geta: what transformers alone reads of the folders (`tokens`); others are `needing`."""
