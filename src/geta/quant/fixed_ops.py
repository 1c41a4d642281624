"""The quantizer with a fixed number of levels and a learned scale as PyTorch operators (LSQ, arXiv 1902.08153).

With a scale that broadcasts against `x` and the integer bounds quant_min and quant_max:

    v     = x / scale
    codes = round(min(max(v, quant_min), quant_max))     round half to even
          = +1 where v >= 0, else -1                     binary: bits = 1 and quant_min = -1
    x_Q   = codes * scale

The scale is first clamped into `geta.quant.ops.D_DOMAIN`, in which all values and gradients are finite. Half types are computed in
float32. Nothing here synchronises with the host. With `blocks` a scale has one number per row and block of columns of a matrix
(`geta.quant.blocks`). Legend: `O` output channels, `B` blocks; a scale is `[]`, e.g. `[O, 1, 1, 1]`, or `[O, B]`.
"""

# ruff: noqa: ARG001, PLR0917 - the operators' schemas fix these signatures; not every kernel looks at every argument

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geta.quant.blocks import Cutting
from geta.quant.ops import D_DOMAIN, _check_kind, _computing_dtype, _multiply_into, _surrogate_slope, laid_out_like

_NAMESPACE = "geta"


def has_no_zero(bits: int, quant_min: int) -> bool:
    """Whether these levels are -1 and +1 alone."""
    return bits == 1 and quant_min == -1


def effective_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What the operator multiplies its codes with: the scale inside its domain."""
    return scale.to(dtype).clamp(*D_DOMAIN)


def _codes(v: Tensor, bits: int, quant_min: int, quant_max: int) -> Tensor:
    """The integers as floating-point numbers, in a new tensor; NaN stays NaN."""
    if has_no_zero(bits, quant_min):
        return torch.where(v < 0, -1.0, torch.where(v >= 0, 1.0, v))
    return v.clamp(quant_min, quant_max).round_()


def _check_arguments(x: Tensor, bits: int, quant_min: int, quant_max: int, kind: str) -> None:
    torch._check(x.is_floating_point(), lambda: f"geta.lsq_quantize needs a floating-point tensor, got {x.dtype}")
    torch._check(
        quant_min <= 0 < quant_max and (quant_max - quant_min < 1 << bits or has_no_zero(bits, quant_min)),
        lambda: f"geta.lsq_quantize: the levels {quant_min} to {quant_max} lack zero or don't fit into {bits} bits",
    )
    _check_kind(kind)


def lsq_values(x: Tensor, scale: Tensor, bits: int, quant_min: int, quant_max: int, *_surrogate: Any, blocks: Sequence[int] = ()) -> Tensor:
    """The kernel of `lsq_quantize` as a plain function, for callers that need no gradient and no tracing."""
    if blocks:
        cut = Cutting.of(x.shape, scale.shape, blocks)
        return laid_out_like(cut.back(lsq_values(cut.rows(x), cut.line(scale), bits, quant_min, quant_max)), x)
    dtype = _computing_dtype(x, scale)
    step = effective_scale(scale, dtype)
    return _multiply_into(torch.empty_like(x), _codes(x.to(dtype) / step, bits, quant_min, quant_max), step)


def lsq_codes(x: Tensor, scale: Tensor, bits: int, quant_min: int, quant_max: int, *, blocks: Sequence[int] = ()) -> Tensor:
    """The integers of `lsq_quantize`, int32, of x's shape."""
    if blocks:
        cut = Cutting.of(x.shape, scale.shape, blocks)
        return laid_out_like(cut.back(lsq_codes(cut.rows(x), cut.line(scale), bits, quant_min, quant_max)), x)
    dtype = _computing_dtype(x, scale)
    return _codes(x.to(dtype) / effective_scale(scale, dtype), bits, quant_min, quant_max).to(torch.int32)


@torch.library.custom_op(
    f"{_NAMESPACE}::lsq_quantize",
    mutates_args=(),
    schema="(Tensor x, Tensor scale, int bits, int quant_min, int quant_max, float[] surrogate, "
    'str kind="fourier", Tensor? strength=None, *, int[] blocks=[]) -> Tensor',
)
def lsq_quantize(
    x: Tensor,
    scale: Tensor,
    bits: int,
    quant_min: int,
    quant_max: int,
    surrogate: Sequence[float],
    kind: str = "fourier",
    strength: Tensor | None = None,
    *,
    blocks: Sequence[int] = (),
) -> Tensor:
    """Round `x` to codes * scale with codes from quant_min to quant_max (formulas above); returns x's shape and dtype.

    bits: whole bits that hold a code; 1 with quant_min = -1 is the binary quantizer, whose codes are -1 and +1 without a zero.
    surrogate, kind, strength, blocks: as in `geta::fake_quantize`.

    Gradients, with incoming `g`, n = elements of x that share one scale, inside = quant_min <= v <= quant_max:

        dx     = g * S(r) where inside, else 0;    r = v - round(v);   binary: r = (v - codes) / 2, so that S acts around v = 0
        dscale = sum g * (codes - v where inside, else codes) / sqrt(n * quant_max)

    Source: LSQ (arXiv 1902.08153) equations 1 to 5; binary: the clipped identity of arXiv 1602.02830, with LSQ's scale.
    Deviation: the two bounds count as inside; n counts all elements of an activation, not those of one sample.
    """
    _check_arguments(x, bits, quant_min, quant_max, kind)
    return lsq_values(x, scale, bits, quant_min, quant_max, blocks=blocks)


@lsq_quantize.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    bits: int,
    quant_min: int,
    quant_max: int,
    surrogate: Sequence[float],
    kind: str = "fourier",
    strength: Tensor | None = None,
    *,
    blocks: Sequence[int] = (),
) -> Tensor:
    _check_arguments(x, bits, quant_min, quant_max, kind)
    if blocks:
        Cutting.of(x.shape, scale.shape, blocks)
    return torch.empty_like(x)


@torch.library.custom_op(
    f"{_NAMESPACE}::lsq_quantize_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor scale, int bits, int quant_min, int quant_max, float[] surrogate, "
    'str kind="fourier", Tensor? strength=None, *, int[] blocks=[]) -> (Tensor, Tensor)',
)
def lsq_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    bits: int,
    quant_min: int,
    quant_max: int,
    surrogate: Sequence[float],
    kind: str = "fourier",
    strength: Tensor | None = None,
    *,
    blocks: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Gradients of `lsq_quantize` to x and scale (formulas there)."""
    levels, slope = (bits, quant_min, quant_max), (surrogate, kind, strength)
    if not blocks:
        return _lsq_gradients(grad, x, scale, levels, slope, math.sqrt(max(1, x.numel() // max(1, scale.numel())) * quant_max))
    cut = Cutting.of(x.shape, scale.shape, blocks)
    size = (cut.counts(scale.double()) * quant_max).sqrt().to(_computing_dtype(x, scale))
    dx, dscale = _lsq_gradients(cut.rows(grad), cut.rows(x), cut.line(scale), levels, slope, size)
    return laid_out_like(cut.back(dx), x), laid_out_like(cut.table(dscale), scale)


def _lsq_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, levels: tuple[int, int, int], slope: tuple[Any, ...], size: float | Tensor
) -> tuple[Tensor, Tensor]:
    """size: sqrt(n * quant_max), where blocks are unequal one number for each."""
    bits, quant_min, quant_max = levels
    dtype = _computing_dtype(x, scale)
    grad, v = grad.to(dtype), x.to(dtype) / effective_scale(scale, dtype)
    clipped = v.clamp(quant_min, quant_max)
    inside = clipped == v
    codes = _codes(v, bits, quant_min, quant_max)
    residual = codes - clipped
    dscale = (torch.where(inside, residual, codes) * grad).sum_to_size(scale.shape) / size
    dx = torch.mul(grad, inside, out=torch.empty_like(x, dtype=dtype))
    if any(slope[0]):
        distance = residual.mul_(0.5) if has_no_zero(bits, quant_min) else residual
        dx.mul_(_surrogate_slope(distance, *slope))
    return dx.to(x.dtype), dscale.to(scale.dtype)


@lsq_quantize_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    bits: int,
    quant_min: int,
    quant_max: int,
    surrogate: Sequence[float],
    kind: str = "fourier",
    strength: Tensor | None = None,
    *,
    blocks: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, scale, bits, quant_min, quant_max, surrogate, kind, strength = inputs
    ctx.save_for_backward(x, scale, strength)
    ctx.settings = (bits, quant_min, quant_max, surrogate, kind)
    ctx.blocks = keyword_only_inputs["blocks"]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, strength = ctx.saved_tensors
    gradients = torch.ops.geta.lsq_quantize_backward(grad, x, scale, *ctx.settings, strength, blocks=ctx.blocks)
    return (*gradients, None, None, None, None, None, None)


lsq_quantize.register_autograd(_backward, setup_context=_save_for_backward)
