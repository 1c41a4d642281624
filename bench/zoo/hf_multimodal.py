"""Vision-language and audio models of `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .entry import BATCH, Built, image, padding_mask, tokens
from .hf import GROUPED, TINY, configuration, model, speech

_IMAGE_TOKEN = 99
_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
_SPEECH = {
    **TINY,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
    "num_labels": 3,
}
_WHISPER = {
    "vocab_size": 100,
    "num_mel_bins": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}


def _text_and_image() -> dict[str, Tensor]:
    text = tokens()
    text[:, -1] = 2  # end of text, where CLIP reads its summary
    return {"input_ids": text, "pixel_values": image(3, 16), "attention_mask": torch.ones_like(text)}


def _with_placeholders(patches: int) -> dict[str, Tensor]:
    """One image token per patch inside the text, as vision-language models expect."""
    text = tokens(_IMAGE_TOKEN, patches + 8)
    text[:, 2 : 2 + patches] = _IMAGE_TOKEN
    return {"input_ids": text, "pixel_values": image(3, 16), "attention_mask": padding_mask(text)}


def _llava() -> Any:
    return configuration(
        "LlavaConfig",
        vision_config=configuration("CLIPVisionConfig", **_VIT, projection_dim=32),
        text_config=configuration("LlamaConfig", **GROUPED),
        image_token_index=_IMAGE_TOKEN,
        vision_feature_layer=-1,
    )


def _blip2() -> Any:
    return configuration(
        "Blip2Config",
        vision_config=_VIT,
        qformer_config={**TINY, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
        text_config=configuration("OPTConfig", **TINY, ffn_dim=64, word_embed_proj_dim=32, use_cache=False),
        num_query_tokens=4,
        image_token_index=_IMAGE_TOKEN,
    )


def _paligemma() -> Any:
    return configuration(
        "PaliGemmaConfig",
        vision_config=configuration("SiglipVisionConfig", **_VIT, vision_use_head=False),
        text_config=configuration("GemmaConfig", **GROUPED, head_dim=8),
        projection_dim=32,
        image_token_index=_IMAGE_TOKEN,
    )


def _sam() -> Any:
    return configuration(
        "SamConfig",
        vision_config={
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 3,
            "global_attn_indexes": [1],
            "mlp_dim": 64,
            "num_pos_feats": 8,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "iou_head_hidden_dim": 16},
    )


def _sam_inputs() -> dict[str, Any]:
    return {"pixel_values": image(3, 64), "input_points": torch.rand(BATCH, 1, 2, 2) * 60, "multimask_output": True}


def _two_towers(kind: str) -> Callable[[], Any]:
    return lambda: configuration(kind, text_config={**TINY, "projection_dim": 24}, vision_config=_VIT, projection_dim=24)


def _log_mel() -> dict[str, Tensor]:
    return {"input_features": torch.randn(BATCH, 16, 40), "decoder_input_ids": tokens(length=6)}


MULTIMODAL: dict[str, Callable[[], Built]] = {
    "clip": model("CLIPModel", _text_and_image, config=_two_towers("CLIPConfig")),
    "clip_text": model(
        "CLIPTextModelWithProjection", lambda: {"input_ids": _text_and_image()["input_ids"]}, {**TINY, "projection_dim": 24}
    ),
    "clip_vision": model("CLIPVisionModelWithProjection", lambda: {"pixel_values": image(3, 16)}, {**_VIT, "projection_dim": 24}),
    "siglip": model("SiglipModel", _text_and_image, config=_two_towers("SiglipConfig")),
    "chinese_clip": model("ChineseCLIPModel", _text_and_image, config=_two_towers("ChineseCLIPConfig")),
    "blip_2": model("Blip2ForConditionalGeneration", lambda: _with_placeholders(4), config=_blip2),
    "llava": model("LlavaForConditionalGeneration", lambda: _with_placeholders(16), config=_llava),
    "paligemma": model("PaliGemmaForConditionalGeneration", lambda: _with_placeholders(16), config=_paligemma),
    "vilt": model(
        "ViltForQuestionAnswering",
        lambda: {"input_ids": tokens(), "pixel_values": image(3, 16), "pixel_mask": torch.ones(BATCH, 16, 16, dtype=torch.long)},
        {**TINY, "image_size": 16, "patch_size": 4, "num_labels": 5, "max_image_length": 16},
    ),
    "sam": model("SamModel", _sam_inputs, config=_sam),
    "whisper": model("WhisperForConditionalGeneration", _log_mel, _WHISPER),
    "whisper_eager": model("WhisperForConditionalGeneration", _log_mel, _WHISPER, attention="eager"),
    "wav2vec2": model("Wav2Vec2ForCTC", speech, _SPEECH),
    "wav2vec2_stable": model(
        "Wav2Vec2ForSequenceClassification",
        speech,
        {**_SPEECH, "do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
    ),
    "hubert": model("HubertForCTC", speech, _SPEECH),
    "wavlm": model("WavLMForSequenceClassification", speech, _SPEECH),
    "unispeech_sat": model("UniSpeechSatForSequenceClassification", speech, _SPEECH),
    "speech_to_text": model(
        "Speech2TextForConditionalGeneration",
        lambda: {"input_features": torch.randn(BATCH, 40, 16), "decoder_input_ids": tokens(length=6)},
        {**_WHISPER, "input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 64},
    ),
    "audio_spectrogram": model(
        "ASTForAudioClassification",
        lambda: {"input_values": torch.randn(BATCH, 32, 16)},
        {**TINY, "patch_size": 8, "time_stride": 4, "frequency_stride": 4, "max_length": 32, "num_mel_bins": 16, "num_labels": 3},
    ),
    "encodec": model(
        "EncodecModel",
        lambda: {"input_values": torch.randn(BATCH, 1, 640), "return_dict": False},
        {
            "num_filters": 8,
            "hidden_size": 16,
            "codebook_size": 16,
            "upsampling_ratios": [4, 2],
            "num_lstm_layers": 1,
            "sampling_rate": 8000,
            "target_bandwidths": [4.0],
        },
    ),
}
