"""Decoder-only language models of `transformers`."""

from __future__ import annotations

from collections.abc import Callable

from .entry import Built
from .hf import GROUPED, TINY, ids, model, padded

_GPT2 = {
    "vocab_size": 100,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": 8}
_MOE = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
_FALCON = {**TINY, "use_cache": False, "parallel_attn": True, "bias": False}
_MAMBA = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "use_cache": False}
_MAMBA2 = {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8, "expand": 2}
_HYBRID = {**GROUPED, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "use_mamba_kernels": False}
_COHERE = {**GROUPED, "use_qk_norm": True, "logit_scale": 0.5}

DECODERS: dict[str, Callable[[], Built]] = {
    "gpt2": model("GPT2LMHeadModel", padded, _GPT2),
    "gpt2_eager": model("GPT2LMHeadModel", padded, _GPT2, attention="eager"),
    "gpt2_classifier": model("GPT2ForSequenceClassification", padded, {**_GPT2, "pad_token_id": 0, "num_labels": 3}),
    "gpt_neo": model(
        "GPTNeoForCausalLM",
        ids,
        {**TINY, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8, "use_cache": False},
    ),
    "gpt_neox": model("GPTNeoXForCausalLM", padded, {**TINY, "use_cache": False}),
    "gptj": model("GPTJForCausalLM", ids, {**_GPT2, "rotary_dim": 4, "tie_word_embeddings": False}),
    "codegen": model("CodeGenForCausalLM", ids, {**_GPT2, "rotary_dim": 4}),
    "gpt_bigcode": model("GPTBigCodeForCausalLM", ids, {**_GPT2, "multi_query": True}),
    "opt": model("OPTForCausalLM", padded, {**TINY, "ffn_dim": 64, "word_embed_proj_dim": 32, "use_cache": False}),
    "llama": model("LlamaForCausalLM", padded, GROUPED),
    "llama_eager": model("LlamaForCausalLM", padded, GROUPED, attention="eager"),
    "llama_classifier": model("LlamaForSequenceClassification", padded, {**GROUPED, "num_labels": 3}),
    "llama_mha_tied": model(
        "LlamaForCausalLM", ids, {**GROUPED, "num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True}
    ),
    "mistral": model("MistralForCausalLM", padded, {**GROUPED, "sliding_window": 8}),
    "qwen2": model("Qwen2ForCausalLM", padded, GROUPED),
    "qwen3": model("Qwen3ForCausalLM", padded, {**GROUPED, "head_dim": 8}),
    "gemma": model("GemmaForCausalLM", padded, {**_GEMMA, "num_key_value_heads": 1}),
    "gemma2": model("Gemma2ForCausalLM", padded, {**_GEMMA, "query_pre_attn_scalar": 8}),
    "gemma2_eager": model("Gemma2ForCausalLM", padded, {**_GEMMA, "query_pre_attn_scalar": 8}, attention="eager"),
    "gemma3": model("Gemma3ForCausalLM", padded, {**_GEMMA, "query_pre_attn_scalar": 8}),
    "phi": model("PhiForCausalLM", padded, {**GROUPED, "qk_layernorm": True}),
    "phi3": model("Phi3ForCausalLM", padded, GROUPED),
    "stablelm": model("StableLmForCausalLM", padded, {**GROUPED, "use_qkv_bias": True, "use_parallel_residual": True}),
    "falcon_new": model("FalconForCausalLM", padded, {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_mqa": model("FalconForCausalLM", padded, {**_FALCON, "multi_query": True}),
    "falcon_alibi": model("FalconForCausalLM", padded, {**_FALCON, "multi_query": False, "alibi": True, "bias": True}),
    "bloom": model("BloomForCausalLM", padded, {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4, "use_cache": False}),
    "mpt": model(
        "MptForCausalLM", padded, {"vocab_size": 100, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "use_cache": False}
    ),
    "mixtral": model("MixtralForCausalLM", padded, {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": model("Qwen2MoeForCausalLM", padded, _MOE),
    "qwen3_moe": model("Qwen3MoeForCausalLM", padded, {**_MOE, "head_dim": 8}),
    "dbrx": model(
        "DbrxForCausalLM",
        padded,
        {
            "vocab_size": 100,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 64,
            "use_cache": False,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    "olmo": model("OlmoForCausalLM", padded, GROUPED),
    "olmo2": model("Olmo2ForCausalLM", padded, GROUPED),
    "granite": model("GraniteForCausalLM", padded, {**GROUPED, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    "cohere": model("CohereForCausalLM", padded, _COHERE),
    "cohere2": model("Cohere2ForCausalLM", padded, {**_COHERE, "sliding_window": 8}),
    "starcoder2": model("Starcoder2ForCausalLM", padded, GROUPED),
    "smollm3": model("SmolLM3ForCausalLM", padded, GROUPED),
    "persimmon": model("PersimmonForCausalLM", padded, {**GROUPED, "qk_layernorm": True}),
    "nemotron": model("NemotronForCausalLM", padded, {**GROUPED, "head_dim": 8}),
    "glm": model("GlmForCausalLM", padded, {**GROUPED, "head_dim": 8}),
    "helium": model("HeliumForCausalLM", padded, {**GROUPED, "head_dim": 8}),
    "gpt_oss": model(
        "GptOssForCausalLM", padded, {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    ),
    "deepseek_v3": model(
        "DeepseekV3ForCausalLM",
        padded,
        {
            **_MOE,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "mamba": model("MambaForCausalLM", ids, _MAMBA),
    "mamba2": model("Mamba2ForCausalLM", ids, _MAMBA2),
    "falcon_mamba": model("FalconMambaForCausalLM", ids, _MAMBA),
    "rwkv": model(
        "RwkvForCausalLM", ids, {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64, "use_cache": False}
    ),
    "jamba": model(
        "JambaForCausalLM",
        padded,
        {**_HYBRID, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    ),
    "bamba": model(
        "BambaForCausalLM",
        padded,
        {**_HYBRID, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    ),
    "recurrent_gemma": model(
        "RecurrentGemmaForCausalLM",
        ids,
        {**GROUPED, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "head_dim": 8, "num_key_value_heads": 1},
    ),
    "xlstm": model(
        "xLSTMForCausalLM",
        ids,
        {
            "vocab_size": 100,
            "hidden_size": 32,
            "num_heads": 4,
            "num_hidden_layers": 2,
            "chunk_size": 4,
            "use_cache": False,
            "mode": "train",
        },
    ),
    "xglm": model(
        "XGLMForCausalLM",
        padded,
        {
            "vocab_size": 100,
            "d_model": 32,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "use_cache": False,
        },
    ),
    "biogpt": model("BioGptForCausalLM", padded, {**TINY, "use_cache": False}),
    "ctrl": model("CTRLLMHeadModel", ids, {**_GPT2, "dff": 64}),
    "openai_gpt": model("OpenAIGPTLMHeadModel", padded, {**_GPT2, "afn": "gelu"}),
    "xlnet": model(
        "XLNetLMHeadModel", ids, {"vocab_size": 100, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "use_mems_eval": False}
    ),
    "modernbert_decoder": model(
        "ModernBertDecoderForCausalLM",
        padded,
        {**TINY, "use_cache": False, "local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]},
    ),
}
