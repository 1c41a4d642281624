"""All classification, segmentation and video models of torchvision.

The plain convolutional ones get smaller images than in training: what is pruned does not depend on it, the time does.
"""

from __future__ import annotations

import functools

from .entry import Built, Entry, image, video

_CLASSIFIERS = """
alexnet convnext_base convnext_large convnext_small convnext_tiny densenet121 densenet161 densenet169 densenet201 efficientnet_b0
efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_l
efficientnet_v2_m efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2
mobilenet_v3_large mobilenet_v3_small regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf
regnet_x_8gf regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_8gf
resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d resnext101_64x4d resnext50_32x4d shufflenet_v2_x0_5
shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_0 squeezenet1_1 swin_b swin_s swin_t swin_v2_b swin_v2_s
swin_v2_t vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32
wide_resnet101_2 wide_resnet50_2
""".split()
_SEGMENTERS = """
deeplabv3_mobilenet_v3_large deeplabv3_resnet101 deeplabv3_resnet50 fcn_resnet101 fcn_resnet50 lraspp_mobilenet_v3_large
""".split()
_VIDEOS = "mc3_18 mvit_v1_b mvit_v2_s r2plus1d_18 r3d_18 s3d swin3d_b swin3d_s swin3d_t".split()
_HEAVY = {
    *("convnext_large", "efficientnet_v2_l", "regnet_x_32gf", "regnet_y_128gf", "regnet_y_32gf", "vit_h_14", "vit_l_16", "vit_l_32"),
    *("mvit_v1_b", "mvit_v2_s", "swin3d_b", "swin3d_s"),
}
_SIDE = {"inception_v3": 299, "swin_v2_b": 256, "swin_v2_s": 256, "swin_v2_t": 256}
_FIXED_SIZE = ("vit_", "swin_", "maxvit_")


def _side(name: str) -> int:
    return _SIDE.get(name, 224 if name.startswith(_FIXED_SIZE) else 96)


def _classifier(name: str) -> Built:
    import torchvision

    options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    return torchvision.models.get_model(name, weights=None, **options), (image(3, _side(name)),), {}


def _segmenter(name: str) -> Built:
    import torchvision

    # with the auxiliary head that training uses: two outputs in a dict
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    return torchvision.models.get_model(name, weights=None, weights_backbone=None, **options), (image(3, 128),), {}


def _video(name: str) -> Built:
    import torchvision

    frames, size = (16, 224) if name.startswith(("mvit", "s3d")) else (16, 112)
    return torchvision.models.get_model(name, weights=None), (video(frames, size),), {}


def entries() -> list[Entry]:
    builders = [(_classifier, _CLASSIFIERS), (_segmenter, _SEGMENTERS), (_video, _VIDEOS)]
    return [
        Entry(f"torchvision/{name}", functools.partial(builder, name), heavy=name in _HEAVY)
        for builder, names in builders
        for name in names
    ]
