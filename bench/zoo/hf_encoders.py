"""Text encoders and encoder-decoders of `transformers`."""

from __future__ import annotations

from collections.abc import Callable

from .entry import Built
from .hf import TINY, ids, model, padded, seq2seq

_T5 = {
    "vocab_size": 100,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "use_cache": False,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
_DISTIL = {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
_DEBERTA = {
    **TINY,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "num_labels": 3,
}
_FUNNEL = {"vocab_size": 100, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64}
_PERCEIVER = {
    "vocab_size": 100,
    "d_model": 32,
    "d_latents": 32,
    "num_latents": 8,
    "num_blocks": 1,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
    "max_position_embeddings": 12,
}
_LABELS = {**TINY, "num_labels": 3}

ENCODERS: dict[str, Callable[[], Built]] = {
    "bert": model("BertForSequenceClassification", padded, _LABELS),
    "bert_eager": model("BertForMaskedLM", padded, TINY, attention="eager"),
    "bert_qa": model("BertForQuestionAnswering", padded, TINY),
    "roberta": model("RobertaForSequenceClassification", padded, {**_LABELS, "max_position_embeddings": 80}),
    "xlm_roberta": model("XLMRobertaForTokenClassification", padded, {**_LABELS, "max_position_embeddings": 80}),
    "camembert": model("CamembertForMaskedLM", padded, {**TINY, "max_position_embeddings": 80}),
    "distilbert": model("DistilBertForSequenceClassification", padded, {**_DISTIL, "num_labels": 3}),
    "distilbert_qa": model("DistilBertForQuestionAnswering", padded, _DISTIL),
    "electra": model("ElectraForPreTraining", padded, {**TINY, "embedding_size": 16}),
    "deberta": model("DebertaForSequenceClassification", padded, {**_DEBERTA, "max_relative_positions": 16}),
    "deberta_v2": model("DebertaV2ForSequenceClassification", padded, _DEBERTA),
    "deberta_v2_conv": model("DebertaV2ForMaskedLM", padded, {**_DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu"}),
    "albert": model("AlbertForSequenceClassification", padded, {**_LABELS, "embedding_size": 16, "classifier_dropout_prob": 0.1}),
    "mobilebert": model(
        "MobileBertForSequenceClassification",
        padded,
        {**_LABELS, "embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16, "intermediate_size": 32},
    ),
    "squeezebert": model("SqueezeBertForSequenceClassification", padded, {**_LABELS, "embedding_size": 32}),
    "mpnet": model("MPNetForMaskedLM", padded, {**TINY, "max_position_embeddings": 80}),
    "convbert": model("ConvBertForMaskedLM", padded, {**TINY, "embedding_size": 32, "head_ratio": 2, "conv_kernel_size": 3}),
    "modernbert": model(
        "ModernBertForSequenceClassification",
        padded,
        {**_LABELS, "local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "roformer": model("RoFormerForMaskedLM", padded, {**TINY, "embedding_size": 32}),
    "nystromformer": model(
        "NystromformerForMaskedLM", ids, {**TINY, "num_landmarks": 4, "segment_means_seq_len": 12, "conv_kernel_size": 3}
    ),
    "fnet": model("FNetForMaskedLM", ids, {**TINY, "use_tpu_fourier_optimizations": False}),
    "xlm": model(
        "XLMWithLMHeadModel",
        ids,
        {"vocab_size": 100, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_langs": 1, "max_position_embeddings": 64},
    ),
    "funnel": model("FunnelForSequenceClassification", padded, {**_FUNNEL, "num_labels": 3}),
    "longformer": model("LongformerForSequenceClassification", padded, {**_LABELS, "attention_window": 4, "max_position_embeddings": 80}),
    "big_bird": model("BigBirdForSequenceClassification", padded, {**_LABELS, "attention_type": "original_full"}),
    "perceiver": model("PerceiverForMaskedLM", lambda: {"inputs": padded()["input_ids"]}, _PERCEIVER),
    "t5": model("T5ForConditionalGeneration", seq2seq, _T5),
    "t5_gated": model("T5ForConditionalGeneration", seq2seq, {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5_encoder": model("T5EncoderModel", padded, _T5),
    "umt5": model("UMT5ForConditionalGeneration", seq2seq, _T5),
    "bart": model("BartForConditionalGeneration", seq2seq, _BART),
    "mbart": model("MBartForConditionalGeneration", seq2seq, _BART),
    "marian": model("MarianMTModel", seq2seq, _BART),
    "pegasus": model("PegasusForConditionalGeneration", seq2seq, _BART),
    "blenderbot": model("BlenderbotForConditionalGeneration", seq2seq, _BART),
    "m2m_100": model("M2M100ForConditionalGeneration", seq2seq, _BART),
    "led": model(
        "LEDForConditionalGeneration",
        seq2seq,
        {**_BART, "attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    ),
    "prophetnet": model(
        "ProphetNetForConditionalGeneration",
        seq2seq,
        {
            "vocab_size": 100,
            "hidden_size": 32,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 64,
            "use_cache": False,
        },
    ),
}
