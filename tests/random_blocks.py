"""The building blocks of `random_nets`: each runs on any input of its layout and is made from plain options.

Shapes are given without the batch: image (C, H, W), tokens (S, C), flat (C,). A block is made as `BLOCKS[name](shape, **options)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
Spec = list[Any]
BLOCKS: dict[str, type[nn.Module]] = {}
EPS = 1e-2  # far from zero, so that a constant channel doesn't turn rounding noise into a difference
_Module = TypeVar("_Module", bound=type[nn.Module])

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu_inplace": lambda x: F.relu(x + 0.0, inplace=True),
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "abs": torch.abs,
    "square": lambda x: torch.tanh(x) ** 2,
    "clamp": lambda x: x.clamp(-1.0, 1.5),
    "clamp_min": lambda x: x.clamp(min=0.25),
    "where": lambda x: torch.where(x > 0, x, 0.5 * x),
    "where_constant": lambda x: torch.where(x > 0, x, torch.ones_like(x)),
    "masked_fill": lambda x: x.masked_fill(x < 0, -0.5),
    "sigmoid": torch.sigmoid,
    "exp": lambda x: torch.exp(x.clamp(max=1.5)),
    "softplus": F.softplus,
    "plus_one": lambda x: x + 1,
    "one_minus": lambda x: 1 - x,
    "cos": torch.cos,
    "hardsigmoid": F.hardsigmoid,
    "reciprocal": lambda x: 1 / (x.abs() + 1),
}


def block(cls: _Module) -> _Module:
    """Register a block under its class name."""
    BLOCKS[cls.__name__] = cls
    return cls


def width(shape: Shape) -> int:
    """Return the number of channels of a shape."""
    return shape[1] if len(shape) == 2 else shape[0]


def axis(shape: Shape) -> int:
    """Return the channel dimension of a batched tensor of this shape."""
    return 2 if len(shape) == 2 else 1


def per_channel(shape: Shape) -> Shape:
    """Return the shape of a parameter that broadcasts along the channels."""
    return (width(shape), 1, 1) if len(shape) == 3 else (width(shape),)


class Body(nn.Module):
    """A chain of blocks."""

    def __init__(self, shape: Shape, spec: Spec) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        for name, options in spec:
            step = BLOCKS[name](shape, **options)
            self.steps.append(step)
            shape = shape_after(step, shape)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def shape_after(module: nn.Module, shape: Shape) -> Shape:
    """Return the output shape of a block by running it; as the blocks are tiny this costs less than a second set of shape rules."""
    example = torch.ones(2, *shape, device=next((p.device for p in module.parameters()), None))
    training = module.training
    with torch.no_grad():
        result = tuple(module.eval()(example).shape[1:])
    module.train(training)
    return result


@block
class Project(nn.Module):
    """Mix channels: linear, or a 1x1 convolution on images."""

    def __init__(self, shape: Shape, out: int, bias: bool) -> None:
        super().__init__()
        inputs = width(shape)
        self.layer = nn.Conv2d(inputs, out, 1, bias=bias) if len(shape) == 3 else nn.Linear(inputs, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@block
class Conv(nn.Module):
    """Convolution on images; depthwise and grouped by `groups`."""

    def __init__(self, shape: Shape, *, out: int, kernel: int, stride: int, padding: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(shape[0], out, kernel, stride, padding, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@block
class TransposedConv(nn.Module):
    """Transposed convolution on images."""

    def __init__(self, shape: Shape, out: int, stride: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(shape[0], out, 2, stride, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@block
class Conv1d(nn.Module):
    """Convolution along the tokens."""

    def __init__(self, shape: Shape, out: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Conv1d(shape[1], out, 3, padding=1, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


@block
class Norm(nn.Module):
    """A normalisation: batch, group, layer (over channels), layer_all, instance, rms."""

    def __init__(self, shape: Shape, kind: str, groups: int = 1, affine: bool = True) -> None:
        super().__init__()
        channels = width(shape)
        self.moved = (kind == "batch" and len(shape) == 2) or (kind in ("layer", "rms") and len(shape) == 3)
        if kind == "batch":
            self.norm: nn.Module = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(channels, EPS, affine=affine)
        elif kind == "group":
            self.norm = nn.GroupNorm(groups, channels, EPS, affine=affine)
        elif kind == "layer":
            self.norm = nn.LayerNorm(channels, EPS, elementwise_affine=affine)
        elif kind == "layer_all":
            self.norm = nn.LayerNorm(shape, EPS, elementwise_affine=affine)
        elif kind == "instance":
            self.norm = nn.InstanceNorm2d(channels, EPS, affine=affine)
        else:
            self.norm = nn.RMSNorm(channels, EPS, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, -1)).transpose(1, -1) if self.moved else self.norm(x)


@block
class Act(nn.Module):
    """An elementwise function; many of them don't map zero to zero."""

    def __init__(self, shape: Shape, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)


@block
class PReLU(nn.Module):
    """PReLU with one slope, or one per channel (its channel dimension is always 1)."""

    def __init__(self, shape: Shape, shared: bool) -> None:
        super().__init__()
        self.layer = nn.PReLU(1 if shared or len(shape) == 2 else width(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@block
class Affine(nn.Module):
    """A learnable scale and / or bias, per channel or one number."""

    def __init__(self, shape: Shape, scale: bool, bias: bool, scalar: bool) -> None:
        super().__init__()
        size = (1,) if scalar else per_channel(shape)
        self.scale = nn.Parameter(torch.ones(size)) if scale else None
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is not None:
            x = x * self.scale
        return x if self.bias is None else x + self.bias


@block
class Residual(nn.Module):
    """x (+ - *) body(x)."""

    def __init__(self, shape: Shape, body: Spec, op: str) -> None:
        super().__init__()
        self.body, self.op = Body(shape, body), op

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if self.op == "add_inplace":
            y += x
            return y
        return {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum}[self.op](y, x)


@block
class Squeeze(nn.Module):
    """Squeeze and excitation: pool over positions, two layers, sigmoid, multiply."""

    def __init__(self, shape: Shape, hidden: int) -> None:
        super().__init__()
        self.positions = (2, 3) if len(shape) == 3 else (1,)
        self.down, self.up = nn.Linear(width(shape), hidden), nn.Linear(hidden, width(shape))
        self.axis = axis(shape)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean(self.positions)))))
        return x * (gate[:, :, None, None] if self.axis == 1 else gate[:, None, :])


@block
class Gated(nn.Module):
    """GLU: one half of the channels gates the other."""

    def __init__(self, shape: Shape, act: str) -> None:
        super().__init__()
        self.act, self.axis = act, axis(shape)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=self.axis)
        return a * ACTIVATIONS[self.act](b)


@block
class Branches(nn.Module):
    """Concatenate the outputs of several bodies, or stack and sum them (`op` "stack")."""

    def __init__(self, shape: Shape, bodies: list[Spec], op: str) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(Body(shape, body) for body in bodies)
        self.op, self.axis = op, axis(shape)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [body(x) for body in self.bodies]
        return torch.cat(outputs, self.axis) if self.op == "cat" else torch.stack(outputs, 1).sum(1)


@block
class Split(nn.Module):
    """Split the channels into parts, transform each, concatenate those named in `order` (which may drop or repeat one)."""

    def __init__(self, shape: Shape, sizes: list[int], acts: list[str], order: list[int]) -> None:
        super().__init__()
        self.sizes, self.acts, self.order, self.axis = list(sizes), acts, order, axis(shape)

    def forward(self, x: Tensor) -> Tensor:
        parts = [ACTIVATIONS[act](part) for act, part in zip(self.acts, torch.split(x, self.sizes, self.axis), strict=True)]
        return torch.cat([parts[i] for i in self.order], self.axis)


@block
class Slice(nn.Module):
    """Keep a range of channels."""

    def __init__(self, shape: Shape, start: int, stop: int, step: int) -> None:
        super().__init__()
        self.keep, self.axis = slice(start, stop, step), axis(shape)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.keep] if self.axis == 1 else x[:, :, self.keep]


@block
class Shuffle(nn.Module):
    """Interleave `groups` equal parts of the channels."""

    def __init__(self, shape: Shape, groups: int) -> None:
        super().__init__()
        self.groups, self.axis = groups, axis(shape)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(self.axis, (self.groups, x.shape[self.axis] // self.groups))
        return parts.transpose(self.axis, self.axis + 1).flatten(self.axis, self.axis + 1)


@block
class Reorder(nn.Module):
    """Move channels: flip, roll, or a constant permutation."""

    def __init__(self, shape: Shape, kind: str, shift: int) -> None:
        super().__init__()
        self.kind, self.shift, self.axis = kind, shift, axis(shape)
        generator = torch.Generator().manual_seed(shift)
        self.register_buffer("order", torch.randperm(width(shape), generator=generator, device="cpu") if kind == "index" else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "flip":
            return x.flip(self.axis)
        if self.kind == "roll":
            return x.roll(self.shift, self.axis)
        return x.index_select(self.axis, self.order.to(x.device))


@block
class Pad(nn.Module):
    """Add channels of a constant."""

    def __init__(self, shape: Shape, before: int, after: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.amounts = (0, 0, 0, 0, before, after) if len(shape) == 3 else (before, after)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.amounts, value=self.value)


@block
class Fold(nn.Module):
    """Reshape the channels to [groups, C / groups] and reduce one of the two."""

    def __init__(self, shape: Shape, groups: int, inner: bool, op: str) -> None:
        super().__init__()
        self.groups, self.inner, self.op, self.axis = groups, inner, op, axis(shape)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(self.axis, (self.groups, -1))
        dim = self.axis + 1 if self.inner else self.axis
        return {"sum": torch.sum, "mean": torch.mean, "amax": torch.amax}[self.op](parts, dim)


@block
class AcrossChannels(nn.Module):
    """An operation that mixes channels without parameters, so that their removal can't be exact or isn't known."""

    def __init__(self, shape: Shape, op: str) -> None:
        super().__init__()
        self.op, self.axis = op, axis(shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.op in ("softmax", "cumsum"):
            return getattr(x, self.op)(self.axis)
        if self.op == "sort":
            return x.sort(self.axis).values
        return F.normalize(x, dim=self.axis, eps=EPS) if self.op == "normalize" else x - x.mean(self.axis, keepdim=True)


@block
class Pool(nn.Module):
    """Pooling on images; "global" leaves one position."""

    def __init__(self, shape: Shape, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "global":
            return F.adaptive_avg_pool2d(x, 1)
        if self.kind == "upsample":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return (F.max_pool2d if self.kind == "max" else F.avg_pool2d)(x, 2)


@block
class PixelShuffle(nn.Module):
    """Trade four channels for a twice finer image."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, 2)


@block
class Switch(nn.Module):
    """Change the layout: tokens, flatten, mean, max, first."""

    def __init__(self, shape: Shape, kind: str) -> None:
        super().__init__()
        self.kind, self.positions = kind, (2, 3) if len(shape) == 3 else (1,)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "tokens":
            return x.flatten(2).transpose(1, 2)
        if self.kind == "flatten":
            return x.reshape(x.shape[0], -1)
        if self.kind == "first":
            return x[:, 0]
        return x.mean(self.positions) if self.kind == "mean" else x.amax(self.positions)


@block
class Tied(nn.Module):
    """One weight used twice: the same layer again, or its transpose (an autoencoder)."""

    def __init__(self, shape: Shape, hidden: int, transpose: bool) -> None:
        super().__init__()
        self.axis = axis(shape)
        self.transpose = transpose
        self.layer = nn.Linear(width(shape), hidden if transpose else width(shape))

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, -1)
        y = torch.tanh(self.layer(x))
        y = F.linear(y, self.layer.weight.t()) if self.transpose else self.layer(y)
        return y.movedim(-1, self.axis)


@block
class MatMul(nn.Module):
    """x @ W with a plain parameter, as matmul or einsum."""

    def __init__(self, shape: Shape, out: int, einsum: bool) -> None:
        super().__init__()
        self.einsum = einsum
        self.weight = nn.Parameter(torch.linspace(-0.7, 0.8, width(shape) * out).view(width(shape), out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,io->...o", x, self.weight) if self.einsum else x @ self.weight


@block
class Attention(nn.Module):
    """Self-attention: separate or fused projections, grouped keys and values, written out or by F.scaled_dot_product_attention."""

    def __init__(self, shape: Shape, *, heads: int, groups: int, head: int, fused: bool, repeat: str, sdpa: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = heads, heads // groups, head
        self.fused, self.repeat, self.sdpa, self.causal = fused, repeat, sdpa, causal
        channels, kv_width = shape[1], self.kv_heads * head
        if fused:
            self.qkv = nn.Linear(channels, heads * head + 2 * kv_width)
        else:
            self.q, self.k = nn.Linear(channels, heads * head), nn.Linear(channels, kv_width)
            self.v = nn.Linear(channels, kv_width, bias=causal)
        self.out = nn.Linear(heads * head, channels)

    def _share(self, x: Tensor) -> Tensor:
        times = self.heads // self.kv_heads
        if times == 1:
            return x
        if self.repeat == "interleave":
            return x.repeat_interleave(times, dim=1)
        batch, kv_heads, tokens, head = x.shape
        return x[:, :, None].expand(batch, kv_heads, times, tokens, head).reshape(batch, kv_heads * times, tokens, head)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        kv_width = self.kv_heads * self.head
        if self.fused:
            q, k, v = self.qkv(x).split([self.heads * self.head, kv_width, kv_width], dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (part.view(batch, tokens, -1, self.head).transpose(1, 2) for part in (q, k, v))
        k, v = self._share(k), self._share(v)
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-2, -1) / self.head**0.5
            if self.causal:
                later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
                scores = scores.masked_fill(later, float("-inf"))
            y = scores.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, self.heads * self.head))


@block
class TorchAttention(nn.Module):
    """nn.MultiheadAttention on itself."""

    def __init__(self, shape: Shape, heads: int, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.layer = nn.MultiheadAttention(shape[1], heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=self.weights)[0]
