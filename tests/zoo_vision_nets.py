"""Image networks of the zoo that no library provides; see `zoo_nets`.

Legend of shapes: `B` batch, `C` channels, `H`, `W` height and width, `D` depth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
BATCH = 2


def picture(size: int, channels: int = 3) -> Tensor:
    """[B, C, size, size]."""
    return torch.randn(BATCH, channels, size, size)


class ConvBlock(nn.Module):
    """Convolution, BatchNorm, SiLU: the unit that YOLO nets are made of."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)), inplace=True)


class Bottleneck(nn.Module):
    """Two 3x3 blocks with a shortcut."""

    def __init__(self, width: int, *, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.shortcut = ConvBlock(width, width, 3), ConvBlock(width, width, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):
    """YOLOv8's block: split, a chain of bottlenecks, concatenate everything."""

    def __init__(self, inputs: int, outputs: int, repeats: int, *, shortcut: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2 = ConvBlock(inputs, 2 * half), ConvBlock((2 + repeats) * half, outputs)
        self.blocks = nn.ModuleList(Bottleneck(half, shortcut=shortcut) for _ in range(repeats))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class C3(nn.Module):
    """YOLOv5's cross-stage-partial block."""

    def __init__(self, inputs: int, outputs: int, repeats: int, *, shortcut: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2, self.cv3 = ConvBlock(inputs, half), ConvBlock(inputs, half), ConvBlock(2 * half, outputs)
        self.blocks = nn.Sequential(*(Bottleneck(half, shortcut=shortcut) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat([self.blocks(self.cv1(x)), self.cv2(x)], 1))


class SPPF(nn.Module):
    """Spatial pyramid pooling: three max-pools in a row, concatenated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBlock(width, width // 2), ConvBlock(2 * width, width)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Detector(nn.Module):
    """YOLO: backbone, PAN-FPN neck with nearest upsampling, three heads.

    decoupled: YOLOv8's separate box and class branches with the expected bin of a distribution; else YOLOv5's anchors.
    """

    def __init__(self, block: type[C2f] | type[C3], *, decoupled: bool, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        w1, w2, w3, w4 = width, 2 * width, 3 * width, 4 * width
        self.stem = nn.Sequential(ConvBlock(3, 8, 3, 2), ConvBlock(8, w1, 3, 2), block(w1, w1, 1, shortcut=True))
        self.p3 = nn.Sequential(ConvBlock(w1, w2, 3, 2), block(w2, w2, 2, shortcut=True))
        self.p4 = nn.Sequential(ConvBlock(w2, w3, 3, 2), block(w3, w3, 1, shortcut=True))
        self.p5 = nn.Sequential(ConvBlock(w3, w4, 3, 2), block(w4, w4, 1, shortcut=True), SPPF(w4))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.n4, self.n3 = block(w4 + w3, w3, 1, shortcut=False), block(w3 + w2, w2, 1, shortcut=False)
        self.down3, self.down4 = ConvBlock(w2, w2, 3, 2), ConvBlock(w3, w3, 3, 2)
        self.m4, self.m5 = block(w2 + w3, w3, 1, shortcut=False), block(w3 + w4, w4, 1, shortcut=False)
        self.classes, self.bins, self.decoupled = classes, 8, decoupled
        if decoupled:
            self.box = nn.ModuleList(nn.Sequential(ConvBlock(w, 16, 3), nn.Conv2d(16, 4 * self.bins, 1)) for w in (w2, w3, w4))
            self.cls = nn.ModuleList(nn.Sequential(ConvBlock(w, 24, 3), nn.Conv2d(24, classes, 1)) for w in (w2, w3, w4))
        else:
            self.detect = nn.ModuleList(nn.Conv2d(w, 3 * (5 + classes), 1) for w in (w2, w3, w4))

    def forward(self, x: Tensor) -> list[Tensor]:
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat([self.up(p5), p4], 1))
        n3 = self.n3(torch.cat([self.up(n4), p3], 1))
        m4 = self.m4(torch.cat([self.down3(n3), n4], 1))
        m5 = self.m5(torch.cat([self.down4(m4), p5], 1))
        return [self._head(level, feature) for level, feature in enumerate((n3, m4, m5))]

    def _head(self, level: int, feature: Tensor) -> Tensor:
        batch, _, height, width = feature.shape
        if not self.decoupled:
            return self.detect[level](feature).view(batch, 3, 5 + self.classes, height, width).permute(0, 1, 3, 4, 2).contiguous()
        bins = self.box[level](feature).view(batch, 4, self.bins, height * width).softmax(2)
        box = (bins * torch.arange(self.bins, dtype=bins.dtype).view(1, 1, -1, 1)).sum(2)
        return torch.cat([box, self.cls[level](feature).flatten(2).sigmoid()], 1)


class MeanShift(nn.Conv2d):
    """A fixed 1x1 convolution that removes or restores the mean colour."""

    def __init__(self, sign: int) -> None:
        super().__init__(3, 3, 1)
        self.weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.bias.data = sign * torch.tensor([0.45, 0.44, 0.40])
        self.requires_grad_(False)


def upsampler(width: int, scale: int) -> nn.Sequential:
    """Pixel shuffles by two (or one by three)."""
    steps, factor = (1, 3) if scale == 3 else (int(math.log2(scale)), 2)
    layers: list[nn.Module] = []
    for _ in range(steps):
        layers += [nn.Conv2d(width, factor**2 * width, 3, padding=1), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


class CarnBlock(nn.Module):
    """Cascading block: after each residual block a 1x1 over everything so far (Ahn et al. 2018)."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=groups), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1, groups=groups)
            )
            for _ in range(3)
        )
        self.merge = nn.ModuleList(nn.Conv2d((n + 2) * width, width, 1) for n in range(3))

    def forward(self, x: Tensor) -> Tensor:
        collected, last = x, x
        for block, merge in zip(self.blocks, self.merge, strict=True):
            collected = torch.cat([collected, F.relu(block(last) + last)], 1)
            last = F.relu(merge(collected))
        return last


class CARN(nn.Module):
    """Cascading residual network for super-resolution; groups > 1 is its mobile version."""

    def __init__(self, width: int = 16, groups: int = 1, scale: int = 2) -> None:
        super().__init__()
        self.sub, self.add = MeanShift(-1), MeanShift(1)
        self.entry, self.exit = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.blocks = nn.ModuleList(CarnBlock(width, groups) for _ in range(3))
        self.merge = nn.ModuleList(nn.Conv2d((n + 2) * width, width, 1) for n in range(3))
        self.up = upsampler(width, scale)

    def forward(self, x: Tensor) -> Tensor:
        collected = last = self.entry(self.sub(x))
        for block, merge in zip(self.blocks, self.merge, strict=True):
            collected = torch.cat([collected, block(last)], 1)
            last = F.relu(merge(collected))
        return self.add(self.exit(self.up(last)))


class ChannelAttention(nn.Module):
    """Squeeze to one number per channel, two 1x1 convolutions, sigmoid gate."""

    def __init__(self, width: int, reduction: int = 4) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, width // reduction, 1),
            nn.ReLU(True),
            nn.Conv2d(width // reduction, width, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Residual(nn.Module):
    """`x + body(x)`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class RCAN(nn.Module):
    """Residual groups of residual channel-attention blocks for super-resolution (Zhang et al. 2018)."""

    def __init__(self, width: int = 16, scale: int = 4) -> None:
        super().__init__()

        def conv() -> nn.Conv2d:
            return nn.Conv2d(width, width, 3, padding=1)

        def block() -> Residual:
            return Residual(conv(), nn.ReLU(True), conv(), ChannelAttention(width))

        self.sub, self.add = MeanShift(-1), MeanShift(1)
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = Residual(*(Residual(block(), block(), conv()) for _ in range(2)), conv())
        self.tail = nn.Sequential(upsampler(width, scale), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.tail(self.body(self.head(self.sub(x)))))


def double_conv(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for source in (inputs, outputs):
        layers += [nn.Conv2d(source, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Skip concatenations and transposed convolutions; odd sizes are padded to the skip's."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(double_conv(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.merge = nn.ModuleList(double_conv(2 * b, b) for b in widths[-2::-1])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = up(x)
            x = F.pad(x, (0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]))
            x = merge(torch.cat([skip, x], 1))
        return self.head(x)


class DiTBlock(nn.Module):
    """Attention and MLP whose norms are shifted, scaled and gated by the condition (Peebles and Xie 2023)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(c).unsqueeze(1).chunk(6, -1)
        y = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + gate1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Patches, conditioned blocks, patches back to an image."""

    def __init__(self, width: int = 32, patch: int = 2, size: int = 8) -> None:
        super().__init__()
        self.patch, self.side = patch, size // patch
        self.embed = nn.Conv2d(4, width, patch, patch)
        self.place = nn.Parameter(torch.randn(1, self.side**2, width) * 0.3)
        self.time = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(6, width)
        self.blocks = nn.ModuleList(DiTBlock(width, 4) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, patch**2 * 4)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        angles = time[:, None] * torch.exp(-torch.arange(8) / 2.0)
        c = self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.label(label)
        y = self.embed(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            y = block(y, c)
        y = self.out(self.norm(y)).view(-1, self.side, self.side, self.patch, self.patch, 4)
        return torch.einsum("bhwpqc->bchpwq", y).reshape(-1, 4, self.side * self.patch, self.side * self.patch)


class VAE(nn.Module):
    """Convolutional encoder to mean and log variance, decoder with transposed convolutions; the mean is decoded in evaluation."""

    def __init__(self, latent: int = 10) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten())
        self.mean, self.log_variance = nn.Linear(32 * 16, latent), nn.Linear(32 * 16, latent)
        self.start = nn.Linear(latent, 32 * 16)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Sigmoid())

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        z = mean + noise * torch.exp(0.5 * log_variance)
        return self.decoder(self.start(z).view(-1, 32, 4, 4)), mean, log_variance


def se_net() -> Built:
    """Squeeze-and-excitation on residual and depthwise blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()]
    for _ in range(2):
        layers.append(Residual(nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), ChannelAttention(24)))
    layers += [nn.Conv2d(24, 48, 1), nn.Hardswish(), nn.Conv2d(48, 48, 3, padding=1, groups=48), ChannelAttention(48)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 6)), (picture(16),), {}


def conv3d() -> Built:
    """Volumes: 3-D convolutions, GroupNorm, a (2+1)-D factorised block, trilinear upsampling."""
    layers = [
        nn.Conv3d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(16, 24, (1, 3, 3), padding=(0, 1, 1)),
        nn.BatchNorm3d(24),
        nn.ReLU(),
        nn.Conv3d(24, 32, (3, 1, 1), padding=(1, 0, 0)),
        nn.InstanceNorm3d(32, affine=True),
        nn.LeakyReLU(0.1),
        nn.Upsample(scale_factor=2, mode="trilinear"),
        nn.Conv3d(32, 3, 1),
    ]
    return nn.Sequential(*layers), (torch.randn(BATCH, 1, 8, 12, 12),), {}


def gan_generator() -> Built:
    """DCGAN's generator."""
    layers: list[nn.Module] = []
    widths = [20, 64, 32, 16]
    for number, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [
            nn.ConvTranspose2d(a, b, 4, 1 if number == 0 else 2, 0 if number == 0 else 1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU(True),
        ]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()), (torch.randn(BATCH, 20, 1, 1),), {}


VISION_NETS: dict[str, Callable[[], Built]] = {
    "yolo_v5_like": lambda: (Detector(C3, decoupled=False), (picture(64),), {}),
    "yolo_v8_like": lambda: (Detector(C2f, decoupled=True), (picture(64),), {}),
    "carn": lambda: (CARN(), (picture(12),), {}),
    "carn_mobile_x3": lambda: (CARN(groups=4, scale=3), (picture(12),), {}),
    "rcan_x4": lambda: (RCAN(), (picture(10),), {}),
    "unet": lambda: (UNet(), (picture(22),), {}),
    "dit": lambda: (DiT(), (picture(8, 4), torch.rand(BATCH), torch.randint(0, 6, (BATCH,))), {}),
    "vae": lambda: (VAE(), (torch.rand(BATCH, 1, 16, 16), torch.randn(BATCH, 10)), {}),
    "squeeze_excite": se_net,
    "conv3d": conv3d,
    "gan_generator": gan_generator,
}
