"""U-Nets, diffusion transformers and autoencoders of `diffusers`, from small configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .entry import BATCH, Built, Entry, image

_BLOCKS = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_CONDITIONED = {
    **_BLOCKS,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
_CODER = {
    **_BLOCKS,
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "latent_channels": 4,
}
_HEADS = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}


def _time() -> Tensor:
    return torch.tensor([17, 431])[:BATCH]


def _text(width: int = 24, length: int = 7) -> Tensor:
    return torch.randn(BATCH, length, width)


def _unet_inputs() -> dict[str, Any]:
    return {"sample": image(4, 16), "timestep": _time(), "encoder_hidden_states": _text()}


def _flux_inputs() -> dict[str, Any]:
    places = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1).view(-1, 3)
    return {
        "hidden_states": torch.randn(BATCH, 16, 8),
        "encoder_hidden_states": _text(),
        "pooled_projections": torch.randn(BATCH, 20),
        "timestep": torch.rand(BATCH),
        "img_ids": places,
        "txt_ids": torch.zeros(7, 3),
    }


def _model(class_name: str, options: Mapping[str, Any], inputs: Callable[[], dict[str, Any]]) -> Callable[[], Built]:
    def build() -> Built:
        import diffusers

        made = getattr(diffusers, class_name)(**options)
        return made, (), inputs()

    return build


_MODELS: dict[str, Callable[[], Built]] = {
    "unet2d": _model(
        "UNet2DModel",
        {**_BLOCKS, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        lambda: {"sample": image(3, 16), "timestep": _time()},
    ),
    "unet2d_condition": _model(
        "UNet2DConditionModel", {**_CONDITIONED, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}, _unet_inputs
    ),
    "unet2d_condition_linear": _model(
        "UNet2DConditionModel",
        {
            **_CONDITIONED,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "use_linear_projection": True,
            "resnet_time_scale_shift": "scale_shift",
            "transformer_layers_per_block": 2,
        },
        _unet_inputs,
    ),
    "controlnet": _model(
        "ControlNetModel",
        {**{key: value for key, value in _CONDITIONED.items() if key != "sample_size"}, "conditioning_embedding_out_channels": (8, 16)},
        lambda: {**_unet_inputs(), "controlnet_cond": image(3, 32)},
    ),
    "autoencoder_kl": _model("AutoencoderKL", _CODER, lambda: {"sample": image(3, 16)}),
    "autoencoder_tiny": _model(
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 2),
            "num_decoder_blocks": (2, 1),
        },
        lambda: {"sample": image(3, 16)},
    ),
    "vq_model": _model(
        "VQModel",
        {**_CODER, "num_vq_embeddings": 16, "latent_channels": 3, "lookup_from_codebook": False},
        lambda: {"sample": image(3, 16)},
    ),
    "dit": _model(
        "DiTTransformer2DModel",
        {**_HEADS, "sample_size": 8, "norm_num_groups": 8, "num_embeds_ada_norm": 10},
        lambda: {"hidden_states": image(4, 8), "timestep": _time(), "class_labels": torch.tensor([1, 7])},
    ),
    "pixart": _model(
        "PixArtTransformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "use_additional_conditions": False,
        },
        lambda: {
            "hidden_states": image(4, 8),
            "timestep": _time(),
            "encoder_hidden_states": _text(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "transformer2d": _model(
        "Transformer2DModel",
        {**_HEADS, "in_channels": 16, "norm_num_groups": 8, "cross_attention_dim": 24},
        lambda: {"hidden_states": image(16, 8), "encoder_hidden_states": _text()},
    ),
    "sd3": _model(
        "SD3Transformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 20,
            "pos_embed_max_size": 8,
            "qk_norm": "rms_norm",
        },
        lambda: {
            "hidden_states": image(4, 8),
            "encoder_hidden_states": _text(),
            "pooled_projections": torch.randn(BATCH, 20),
            "timestep": _time(),
        },
    ),
    "flux": _model(
        "FluxTransformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "axes_dims_rope": (4, 6, 6),
        },
        _flux_inputs,
    ),
    "sana": _model(
        "SanaTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 8,
        },
        lambda: {"hidden_states": image(4, 8), "encoder_hidden_states": _text(), "timestep": _time()},
    ),
    "wan": _model(
        "WanTransformer3DModel",
        {**_HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 48, "rope_max_seq_len": 32},
        lambda: {"hidden_states": torch.randn(BATCH, 4, 2, 8, 8), "timestep": _time(), "encoder_hidden_states": _text()},
    ),
}


def entries() -> list[Entry]:
    return [Entry(f"diffusers/{name}", builder) for name, builder in _MODELS.items()]
