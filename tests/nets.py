"""Small versions of well-known networks, for tests: `NETS[name]() -> (model in eval mode, args, kwargs)`.

Every builder seeds itself and then makes equivalence hard to fake: BatchNorm statistics, affine parameters and all biases
are random and not zero, so that a removed channel which still sends a constant forward shows in the output.
Legend of shapes: `B` batch (2), `C` channels, `H`, `W` height and width, `S` sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
BATCH = 2


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every normalisation random statistics and affine parameters and every bias random values, in place."""
    generator = torch.Generator().manual_seed(seed)

    def draw(target: Tensor, low: float, high: float) -> None:
        target.copy_(torch.rand(target.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                draw(buffer, -0.3, 0.3)
            elif name.endswith("running_var"):
                draw(buffer, 0.6, 1.6)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                draw(parameter, -0.3, 0.3)
            elif parameter.dim() == 1:
                draw(parameter, 0.6, 1.4)
    return model


def image(channels: int = 3, size: int = 32, seed: int = 1) -> Tensor:
    """Return a random batch of images, [B, channels, size, size]."""
    return torch.randn(BATCH, channels, size, size, generator=torch.Generator().manual_seed(seed))


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution without bias and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class BasicBlock(nn.Module):
    """Residual block of the CIFAR ResNets; `shortcut` "pad" subsamples and pads channels with zeros, "conv" uses a 1x1."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs)
        self.stride = stride
        self.extra = outputs - inputs
        changes = stride != 1 or inputs != outputs
        self.down = nn.Sequential(*conv_bn(inputs, outputs, 1, stride)) if changes and shortcut == "conv" else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.down is not None:
            x = self.down(x)
        elif self.extra or self.stride != 1:
            before = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet-(6n+2) for 32x32 images (He et al. 2016, section 4.2)."""

    def __init__(self, blocks: int, shortcut: str, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, width)
        self.layer1 = self._stage(width, width, blocks, 1, shortcut)
        self.layer2 = self._stage(width, 2 * width, blocks, 2, shortcut)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2, shortcut)
        self.fc = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet20(shortcut: str = "pad") -> Built:
    """Return the CIFAR ResNet-20."""
    torch.manual_seed(0)
    return randomize(CifarResNet(3, shortcut)).eval(), (image(),), {}


def resnet56(shortcut: str = "pad") -> Built:
    """Return the CIFAR ResNet-56."""
    torch.manual_seed(0)
    return randomize(CifarResNet(9, shortcut)).eval(), (image(),), {}


def vgg7_bn() -> Built:
    """Return VGG7 with BatchNorm: 64-64-pool-128-128-pool-256-256-pool, flatten, two linear layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    inputs = 3
    for width in (64, 128, 256):
        for _ in range(2):
            layers += [*conv_bn(inputs, width), nn.ReLU(inplace=True)]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(256 * 2 * 2, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10)]
    return randomize(nn.Sequential(*layers)).eval(), (image(size=16),), {}


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand 1x1, depthwise 3x3, project 1x1, residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = [*conv_bn(inputs, hidden, 1), nn.ReLU6(inplace=True)] if expand != 1 else []
        layers += [*conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(inplace=True), *conv_bn(hidden, outputs, 1)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def mobilenet_v2_like() -> Built:
    """Return a narrow MobileNetV2 for 32x32 images."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [*conv_bn(3, 16), nn.ReLU6(inplace=True), InvertedResidual(16, 8, 1, 1)]
    for inputs, outputs, stride in ((8, 16, 1), (16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1)):
        layers.append(InvertedResidual(inputs, outputs, stride, 6))
    layers += [*conv_bn(32, 64, 1), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 10)]
    return randomize(nn.Sequential(*layers)).eval(), (image(),), {}


class DenseLayer(nn.Module):
    """DenseNet's bottleneck layer; its output is concatenated to everything before it."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(4 * growth)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def densenet_like() -> Built:
    """Return a DenseNet-BC with two blocks of three layers and a transition between them."""
    torch.manual_seed(0)
    growth, width = 8, 16
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    for block in range(2):
        for _ in range(3):
            layers.append(DenseLayer(width, growth))
            width += growth
        if block == 0:
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return randomize(nn.Sequential(*layers)).eval(), (image(size=16),), {}


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` equal parts, as ShuffleNet does."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).contiguous().view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: split the channels, transform one half, concatenate, shuffle; stride 2 transforms both."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.stride = stride
        source = half if stride == 1 else inputs
        self.right = nn.Sequential(
            *conv_bn(source, half, 1), nn.ReLU(), *conv_bn(half, half, 3, stride, half), *conv_bn(half, half, 1), nn.ReLU()
        )
        left = [*conv_bn(inputs, inputs, 3, stride, inputs), *conv_bn(inputs, half, 1), nn.ReLU()]
        self.left = nn.Sequential(*(left if stride == 2 else []))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.stride == 1 else (x, x)
        return channel_shuffle(torch.cat([self.left(left), self.right(right)], 1), 2)


def shufflenet_like() -> Built:
    """Return a ShuffleNetV2 with two stages."""
    torch.manual_seed(0)
    units = [ShuffleUnit(16, 32, 2), ShuffleUnit(32, 32, 1), ShuffleUnit(32, 64, 2), ShuffleUnit(64, 64, 1)]
    head = [*conv_bn(64, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return randomize(nn.Sequential(*conv_bn(3, 16), nn.ReLU(), *units, *head)).eval(), (image(),), {}


def vit() -> Built:
    """Return a small ViTForImageClassification: 4 heads, 2 layers, 16x16 images in 4x4 patches."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=10,
        initializer_range=0.2,
    )
    return randomize(ViTForImageClassification(config)).eval(), (image(size=16),), {}


def bert() -> Built:
    """Return a small BertForSequenceClassification with a padded batch, called by keyword."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
        initializer_range=0.2,
    )
    ids = torch.randint(1, 60, (BATCH, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    model = randomize(BertForSequenceClassification(config)).eval()
    return model, (), {"input_ids": ids, "attention_mask": mask}


def llama_gqa() -> Built:
    """Return a small LlamaForCausalLM with grouped-query attention: 4 query heads share 2 key-value heads; no cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        use_cache=False,
        initializer_range=0.2,
    )
    ids = torch.randint(0, 60, (BATCH, 10), generator=torch.Generator().manual_seed(3))
    return randomize(LlamaForCausalLM(config)).eval(), (), {"input_ids": ids}


NETS: dict[str, Callable[[], Built]] = {
    "resnet20_pad": lambda: resnet20("pad"),
    "resnet20_conv": lambda: resnet20("conv"),
    "resnet56": resnet56,
    "vgg7_bn": vgg7_bn,
    "mobilenet_v2_like": mobilenet_v2_like,
    "densenet_like": densenet_like,
    "shufflenet_like": shufflenet_like,
    "vit": vit,
    "bert": bert,
    "llama_gqa": llama_gqa,
}
