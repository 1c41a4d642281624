"""Image models of `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .entry import BATCH, Built, image
from .hf import configuration, model, pixels

_VIT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
_SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 5}
_CONVNEXT = {"num_stages": 3, "hidden_sizes": [16, 24, 32], "depths": [1, 2, 1], "num_labels": 5}
_PVT = {
    "image_size": 64,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 32, 32, 32],
    "num_attention_heads": [1, 2, 4, 4],
    "mlp_ratios": [2, 2, 2, 2],
    "num_labels": 5,
}
_SEGFORMER = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 32, 32],
    "num_attention_heads": [1, 2, 4, 4],
    "decoder_hidden_size": 32,
    "num_labels": 5,
}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 7,
    "num_labels": 4,
}

_CVT = {"embed_dim": [16, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "num_labels": 5}


def _resnet_backbone() -> Any:
    return configuration("ResNetConfig", **_RESNET, out_features=["stage4"])


def _detr(kind: str, **more: Any) -> Callable[[], Any]:
    return lambda: configuration(kind, **{**_DETR, **more}, backbone_config=_resnet_backbone())


def _yolos() -> dict[str, Any]:
    return {**_VIT, "image_size": [32, 32], "num_detection_tokens": 5, "use_mid_position_embeddings": True}


def _rt_detr() -> Any:
    backbone = configuration(
        "RTDetrResNetConfig",
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return configuration(
        "RTDetrConfig",
        backbone_config=backbone,
        use_timm_backbone=False,
        encoder_hidden_dim=32,
        encoder_in_channels=[24, 32, 32],
        encoder_ffn_dim=64,
        encoder_attention_heads=4,
        d_model=32,
        num_queries=10,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=64,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_n_points=2,
        num_denoising=0,
        num_labels=4,
    )


def _upernet() -> Any:
    backbone = configuration(
        "ConvNextConfig",
        **{**_CONVNEXT, "num_stages": 4, "hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1]},
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return configuration(
        "UperNetConfig", backbone_config=backbone, hidden_size=32, auxiliary_in_channels=24, auxiliary_channels=16, num_labels=5
    )


def _depth_anything() -> Any:
    backbone = configuration(
        "Dinov2Config",
        **{**_VIT, "num_hidden_layers": 4},
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    return configuration(
        "DepthAnythingConfig",
        backbone_config=backbone,
        patch_size=8,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16,
        head_hidden_size=8,
        depth_estimation_type="metric",  # the relative kind ends in a ReLU, which random weights may leave at zero everywhere
    )


VISION: dict[str, Callable[[], Built]] = {
    "vit": model("ViTForImageClassification", pixels, _VIT),
    "vit_eager": model("ViTForImageClassification", pixels, _VIT, attention="eager"),
    "deit": model("DeiTForImageClassificationWithTeacher", pixels, _VIT),
    "beit": model("BeitForImageClassification", pixels, {**_VIT, "use_relative_position_bias": True}),
    "data2vec_vision": model("Data2VecVisionForImageClassification", pixels, {**_VIT, "use_shared_relative_position_bias": True}),
    "dinov2": model("Dinov2ForImageClassification", pixels, _VIT),
    "dinov2_swiglu": model("Dinov2ForImageClassification", pixels, {**_VIT, "use_swiglu_ffn": True}),
    "dinov3_vit": model("DINOv3ViTModel", pixels, {**_VIT, "num_register_tokens": 2}),
    "swin": model("SwinForImageClassification", pixels, _SWIN),
    "swinv2": model("Swinv2ForImageClassification", pixels, _SWIN),
    "pvt": model("PvtForImageClassification", lambda: pixels(64), {**_PVT, "sequence_reduction_ratios": [4, 2, 1, 1]}),
    "pvt_v2": model("PvtV2ForImageClassification", lambda: pixels(64), {**_PVT, "sr_ratios": [4, 2, 1, 1]}),
    "convnext": model("ConvNextForImageClassification", pixels, _CONVNEXT),
    "convnextv2": model("ConvNextV2ForImageClassification", pixels, _CONVNEXT),
    "resnet": model("ResNetForImageClassification", pixels, {**_RESNET, "num_labels": 5}),
    "regnet": model(
        "RegNetForImageClassification",
        pixels,
        {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "groups_width": 8, "num_labels": 5},
    ),
    "mobilenet_v2": model("MobileNetV2ForImageClassification", pixels, {"depth_multiplier": 0.25, "num_labels": 5}),
    "mobilevit": model(
        "MobileViTForImageClassification",
        lambda: pixels(64),
        {
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32],
            "num_attention_heads": 4,
            "image_size": 64,
            "num_labels": 5,
        },
    ),
    "mobilevitv2": model(
        "MobileViTV2ForImageClassification", lambda: pixels(64), {"image_size": 64, "width_multiplier": 0.25, "num_labels": 5}
    ),
    "levit": model(
        "LevitForImageClassification",
        lambda: pixels(64),
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "mlp_ratio": [2, 2, 2],
            "attention_ratio": [2, 2, 2],
            "num_labels": 5,
        },
    ),
    "cvt": model("CvtForImageClassification", pixels, _CVT),
    "poolformer": model(
        "PoolFormerForImageClassification",
        lambda: pixels(64),
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_labels": 5},
    ),
    "segformer": model("SegformerForSemanticSegmentation", lambda: pixels(64), _SEGFORMER),
    "segformer_classifier": model("SegformerForImageClassification", lambda: pixels(64), _SEGFORMER),
    "upernet": model("UperNetForSemanticSegmentation", lambda: pixels(64), config=_upernet),
    "detr": model("DetrForObjectDetection", lambda: pixels(64), config=_detr("DetrConfig")),
    "conditional_detr": model("ConditionalDetrForObjectDetection", lambda: pixels(64), config=_detr("ConditionalDetrConfig")),
    "dab_detr": model("DabDetrForObjectDetection", lambda: pixels(64), config=_detr("DabDetrConfig", hidden_size=32)),
    "rt_detr": model("RTDetrForObjectDetection", lambda: pixels(64), config=_rt_detr),
    "yolos": model("YolosForObjectDetection", pixels, _yolos()),
    "depth_anything": model("DepthAnythingForDepthEstimation", pixels, config=_depth_anything),
    "swin2sr": model(
        "Swin2SRForImageSuperResolution",
        pixels,
        {"image_size": 32, "patch_size": 1, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8, "upscale": 2},
    ),
    "vit_mae": model("ViTMAEModel", lambda: {**pixels(), "noise": torch.rand(BATCH, 16)}, {**_VIT, "mask_ratio": 0.5}),
    "videomae": model(
        "VideoMAEForVideoClassification",
        lambda: {"pixel_values": torch.stack([image(3, 32) for _ in range(4)], 1)},
        {**_VIT, "num_frames": 4, "tubelet_size": 2},
    ),
    "timesformer": model(
        "TimesformerForVideoClassification",
        lambda: {"pixel_values": torch.stack([image(3, 32) for _ in range(4)], 1)},
        {**_VIT, "num_frames": 4},
    ),
}
