"""The parametric quantizer as PyTorch operators (GETA, arXiv 2502.16638; the quantizer is DJPQ's, arXiv 2007.10463).

With step size `d`, range `q_m` and exponent `t`, all of them tensors that broadcast against `x`:

    c(x)  = sgn(x) * min(|x|, q_m)^t            signed;   min(max(x, 0), q_m)^t   unsigned
    u     = c(x) / d
    x_Q   = d * round(u)                        round half to even
    b     = log2(q_m^t / d + 1) + 1             bit width, signed;   log2(q_m^t / d + 1)   unsigned
    d(b)  = q_m^t / (2^(b-1) - 1)               its inverse, signed;   q_m^t / (2^b - 1)   unsigned

Every function first clamps the parameters into the domain below, in which all values and gradients are finite; there
are no other guards. Half types are computed in float32. Nothing here synchronises with the host.

With `blocks` a parameter has one number per row and block of columns of a matrix (`geta.quant.blocks`).

Legend: `O` output channels, `I` columns, `B` blocks; a parameter is `[]` (per tensor), e.g. `[O, 1, 1, 1]` (per channel) or `[O, B]`.
"""

# ruff: noqa: ARG001, PLR0913, PLR0917 - the operators' schemas fix these signatures; not every kernel looks at every argument

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geta.quant import native
from geta.quant.blocks import Blocks, Cutting
from geta.quant.surrogate import KINDS

Q_M_DOMAIN = (2.0**-24, 2.0**20)
T_DOMAIN = (0.25, 4.0)
D_DOMAIN = (2.0**-120, 2.0**90)
LARGEST_CODE = 2.0**23
"""`d` is never taken smaller than `q_m^t / LARGEST_CODE`: float32 counts exactly no further (24 bits)."""

_NAMESPACE = "geta"


class Parameters(NamedTuple):
    """A quantizer's parameters in the computing type and inside their domain; `top` = q_m^t."""

    d: Tensor
    q_m: Tensor
    t: Tensor
    top: Tensor


def _computing_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _into_domain(d: Tensor, q_m: Tensor, t: Tensor, *, linear: bool, dtype: torch.dtype) -> Parameters:
    q_m = q_m.to(dtype).clamp(*Q_M_DOMAIN)
    t = t.to(dtype).clamp(*T_DOMAIN)
    top = q_m if linear else q_m.pow(t)
    d = torch.maximum(d.to(dtype).clamp(*D_DOMAIN), top / LARGEST_CODE)
    return Parameters(d, q_m, t, top)


def _clip(x: Tensor, q_m: Tensor, *, signed: bool) -> Tensor:
    return torch.clamp(x, min=-q_m if signed else torch.zeros_like(q_m), max=q_m)


def _shape(clipped: Tensor, t: Tensor, *, linear: bool) -> Tensor:
    """sgn(x) * |clipped|^t as a new tensor, or `clipped` itself for the linear quantizer."""
    return clipped if linear else clipped.abs().pow_(t).copysign_(clipped)


def _rounded(x: Tensor, parameters: Parameters, *, signed: bool, linear: bool) -> Tensor:
    """round(u), in the computing type."""
    clipped = _clip(x.to(parameters.d.dtype), parameters.q_m, signed=signed)
    return _shape(clipped, parameters.t, linear=linear).div_(parameters.d).round_()


def _multiply_into(out: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """out = codes * scale, with +0 instead of -0: integers know only one zero, and both ways must agree bit by bit."""
    if out.dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        return out.copy_((codes * scale).clamp_(-largest, largest).add_(0.0))
    return torch.addcmul(codes.new_zeros(()), codes, scale, out=out)


def _check_floating(x: Tensor) -> None:
    torch._check(x.is_floating_point(), lambda: f"geta.fake_quantize needs a floating-point tensor, got {x.dtype}")


def fake_quantize_values(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor, signed: bool, linear: bool, surrogate: Sequence[float]) -> Tensor:
    """The kernel of `fake_quantize` as a plain function, for callers that need no gradient and no tracing."""
    _check_floating(x)
    values = native.quantize(x, d, q_m, t, signed=signed) if linear else None
    return aten_values(x, prepared(x, d, q_m, t, linear), signed, linear) if values is None else values


def prepared(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor, linear: bool) -> Parameters:
    """What `quantized_values` needs of a quantizer for tensors of x's dtype; may be kept as long as d, q_m and t don't change."""
    return _into_domain(d, q_m, t, linear=linear, dtype=_computing_dtype(x, d, q_m, t))


def quantized_values(x: Tensor, parameters: Parameters, signed: bool, linear: bool) -> Tensor:
    """x_Q = d * round(c(x) / d) with prepared parameters."""
    values = native.quantize(x, parameters.d, parameters.q_m, parameters.t, signed=signed) if linear else None
    return aten_values(x, parameters, signed, linear) if values is None else values


def aten_values(x: Tensor, parameters: Parameters, signed: bool, linear: bool) -> Tensor:
    """`quantized_values` by PyTorch's operators: the reference of `geta.quant.native`, and its substitute."""
    return _multiply_into(torch.empty_like(x), _rounded(x, parameters, signed=signed, linear=linear), parameters.d)


def blockwise_values(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor, settings: tuple[bool, bool], blocks: Sequence[int]) -> Tensor:
    """`fake_quantize_values` of a matrix with one d, q_m and t per block. settings: (signed, linear)."""
    cut = Cutting.of(x.shape, d.shape, blocks)
    rows = fake_quantize_values(cut.rows(x), cut.line(d), cut.line(q_m), cut.line(t), *settings, ())
    return laid_out_like(cut.back(rows), x)


def laid_out_like(values: Tensor, x: Tensor) -> Tensor:
    """`values` with the strides of `torch.empty_like(x)`, which is what operators promise when they are traced."""
    wanted = torch.empty_like(x, dtype=values.dtype)
    return values if values.stride() == wanted.stride() else wanted.copy_(values)


def dequantize_values(codes: Tensor, scale: Tensor, bits: int, blocks: Sequence[int] = ()) -> Tensor:
    """The kernel of `dequantize` as a plain function, for callers that need no gradient and no tracing."""
    if blocks:
        cut = Cutting.of(codes.shape, scale.shape, blocks)
        return laid_out_like(cut.back(dequantize_values(cut.rows(codes), cut.line(scale), bits)), codes)
    dtype = _computing_dtype(scale)
    return _multiply_into(torch.empty_like(codes, dtype=scale.dtype), codes.to(dtype), scale.to(dtype))


@torch.library.custom_op(
    f"{_NAMESPACE}::fake_quantize",
    mutates_args=(),
    schema="(Tensor x, Tensor d, Tensor q_m, Tensor t, bool signed, bool linear, float[] surrogate, "
    'str kind="fourier", Tensor? strength=None, *, int[] blocks=[]) -> Tensor',
)
def fake_quantize(
    x: Tensor,
    d: Tensor,
    q_m: Tensor,
    t: Tensor,
    signed: bool,
    linear: bool,
    surrogate: Sequence[float],
    kind: str = "fourier",
    strength: Tensor | None = None,
    *,
    blocks: Sequence[int] = (),
) -> Tensor:
    """Round `x` to the values that its quantizer can represent: x_Q = d * round(c(x) / d).

    x: any shape, floating point; d, q_m, t: broadcast against x. Returns x's shape and dtype.
    signed: codes are symmetric around zero; otherwise x below zero becomes zero and the codes start at zero.
    linear: `t` is 1 and is not looked at (no power, no logarithm, no gradient for it).
    surrogate: coefficients of the surrogate S; for `kind` "fourier" the a_k of `geta.Fourier`, empty or all zero is the
    straight-through estimator; "dsq": (alpha,) of `geta.DSQ`; "dge": (k, clip) of `geta.DGE`.
    strength: how much of the surrogate is used, one number in [0, 1]: it multiplies the a_k of "fourier"; the others give
    1 + strength * (S - 1). None is 1. As a tensor it may change from step to step without a new trace.
    blocks: x is a matrix, and d, q_m and t have one number for each block of columns of each row (`geta.quant.blocks`).

    Gradients, with incoming `g`, summed over the elements that share a parameter:

        dx   = g * S(x)   where |x| <= q_m (unsigned: 0 <= x <= q_m), else 0
        dd   = sum g * sgn(x) * (round(u) - u)
        dq_m = sum over |x| > q_m of g * sgn(x) * t * q_m^(t-1)
        dt   = sum g * sgn(x) * min(|x|, q_m)^t * ln(min(|x|, q_m)), and 0 where x = 0

    Unsigned: elements below zero are constant, so they give nothing to any gradient.
    Source: GETA (arXiv 2502.16638) section 3; surrogate: StableQAT (arXiv 2601.19320).
    """
    _check_kind(kind)
    if blocks:
        _check_floating(x)
        return blockwise_values(x, d, q_m, t, (signed, linear), blocks)
    return fake_quantize_values(x, d, q_m, t, signed, linear, surrogate)


@fake_quantize.register_fake
def _(
    x: Tensor,
    d: Tensor,
    q_m: Tensor,
    t: Tensor,
    signed: bool,
    linear: bool,
    surrogate: Sequence[float],
    kind: str = "fourier",
    strength: Tensor | None = None,
    *,
    blocks: Sequence[int] = (),
) -> Tensor:
    _check_kind(kind)
    _check_floating(x)
    if blocks:
        Cutting.of(x.shape, d.shape, blocks)
    return torch.empty_like(x)


@torch.library.custom_op(
    f"{_NAMESPACE}::fake_quantize_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor d, Tensor q_m, Tensor t, bool signed, bool linear, float[] surrogate, "
    'str kind="fourier", Tensor? strength=None, *, int[] blocks=[]) -> (Tensor, Tensor, Tensor, Tensor)',
)
def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    d: Tensor,
    q_m: Tensor,
    t: Tensor,
    signed: bool,
    linear: bool,
    surrogate: Sequence[float],
    kind: str = "fourier",
    strength: Tensor | None = None,
    *,
    blocks: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `fake_quantize` to x, d, q_m and t (formulas there); dt is zero for the linear quantizer."""
    if not blocks:
        return fake_quantize_gradients(grad, x, d, q_m, t, signed, linear, surrogate, kind, strength)
    cut = Cutting.of(x.shape, d.shape, blocks)
    lines = (cut.line(d), cut.line(q_m), cut.line(t))
    dx, *found = fake_quantize_gradients(cut.rows(grad), cut.rows(x), *lines, signed, linear, surrogate, kind, strength)
    dd, dq_m, dt = (laid_out_like(cut.table(line), like) for line, like in zip(found, (d, q_m, t), strict=True))
    return laid_out_like(cut.back(dx), x), dd, dq_m, dt


def fake_quantize_gradients(
    grad: Tensor,
    x: Tensor,
    d: Tensor,
    q_m: Tensor,
    t: Tensor,
    signed: bool,
    linear: bool,
    surrogate: Sequence[float],
    kind: str = "fourier",
    strength: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel of `fake_quantize_backward` as a plain function."""
    if linear and (kind == "fourier" or not any(surrogate)):
        found = native.gradients(grad, x, d, q_m, t, amplitudes=surrogate, strength=strength, signed=signed)
        if found is not None:
            return (*found, torch.zeros_like(t))
    return aten_gradients(grad, x, d, q_m, t, signed, linear, surrogate, kind, strength)


def aten_gradients(
    grad: Tensor,
    x: Tensor,
    d: Tensor,
    q_m: Tensor,
    t: Tensor,
    signed: bool,
    linear: bool,
    surrogate: Sequence[float],
    kind: str = "fourier",
    strength: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`fake_quantize_gradients` by PyTorch's operators: the reference of `geta.quant.native`, and its substitute."""
    dtype = _computing_dtype(x, d, q_m, t)
    parameters = _into_domain(d, q_m, t, linear=linear, dtype=dtype)
    grad, wide_x = grad.to(dtype), x.to(dtype)
    clipped = _clip(wide_x, parameters.q_m, signed=signed)
    shaped = _shape(clipped, parameters.t, linear=linear)
    u = shaped / parameters.d
    residual = u.round().sub_(u)
    dd = (grad * residual).sum_to_size(d.shape)

    dx = torch.mul(grad, clipped == wide_x, out=torch.empty_like(x, dtype=dtype))
    beyond = (grad - dx).mul_(clipped.sign())
    slope = parameters.top / parameters.q_m * parameters.t if not linear else torch.ones_like(parameters.q_m)
    dq_m = (beyond.sum_to_size(slope.shape) * slope).sum_to_size(q_m.shape)
    dt = torch.zeros_like(t)
    if not linear:
        dt = torch.xlogy(shaped, clipped.abs_()).mul_(grad).sum_to_size(t.shape).to(t.dtype)

    if any(surrogate):
        dx.mul_(_surrogate_slope(residual, surrogate, kind, strength))
    return dx.to(x.dtype), dd.to(d.dtype), dq_m.to(q_m.dtype), dt


@fake_quantize_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    d: Tensor,
    q_m: Tensor,
    t: Tensor,
    signed: bool,
    linear: bool,
    surrogate: Sequence[float],
    kind: str = "fourier",
    strength: Tensor | None = None,
    *,
    blocks: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(d), torch.empty_like(q_m), torch.empty_like(t)


def _check_kind(kind: str) -> None:
    torch._check(kind in KINDS, lambda: f"geta.fake_quantize knows the surrogates {', '.join(KINDS)}, not '{kind}'")


def _surrogate_slope(residual: Tensor, surrogate: Sequence[float], kind: str = "fourier", strength: Tensor | None = None) -> Tensor:
    """S(residual) of `geta.quant.surrogate`, a new tensor; even in `residual`, which lies in [-1/2, 1/2]."""
    if kind == "fourier":
        return _fourier_slope(residual, surrogate, strength)
    slope = _dsq_slope(residual, *surrogate) if kind == "dsq" else _dge_slope(residual, *surrogate)
    return slope if strength is None else slope.sub_(1.0).mul_(strength).add_(1.0)


def _fourier_slope(residual: Tensor, amplitudes: Sequence[float], strength: Tensor | None) -> Tensor:
    """(1 - A) / (1 + A),  A = sqrt(2) * pi * strength * sum_k a_k cos((2k+1) * pi * residual)."""
    series = torch.zeros((), dtype=residual.dtype, device=residual.device)
    for k, a_k in enumerate(amplitudes):
        wave = (residual * ((2 * k + 1) * math.pi)).cos_().mul_(math.sqrt(2.0) * math.pi * a_k)
        series = wave if k == 0 else series.add_(wave)
    if strength is not None:
        series = series.mul_(strength)
    return (1.0 - series).div_(series.add_(1.0))


def _dsq_slope(residual: Tensor, alpha: float) -> Tensor:
    """k / (2 tanh(k/2)) * (1 - tanh(k (1/2 - |residual|))^2),  k = ln(2/alpha - 1),  tanh(k/2) = 1 - alpha."""
    k = math.log(2.0 / alpha - 1.0)
    peak = k / (2.0 * (1.0 - alpha))
    soft = residual.abs().mul_(-k).add_(k / 2.0).cosh_()
    return soft.square_().reciprocal_().mul_(peak)


def _dge_slope(residual: Tensor, k: float, clip: float) -> Tensor:
    """min((1/k) (1 - 2 |residual|)^(1/k - 1), clip)."""
    return residual.abs().mul_(-2.0).add_(1.0).clamp_(min=0.0).pow_(1.0 / k - 1.0).div_(k).clamp_(max=clip)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, d, q_m, t, signed, linear, surrogate, kind, strength = inputs
    ctx.save_for_backward(x, d, q_m, t, strength)
    ctx.settings = (signed, linear, surrogate, kind)
    ctx.blocks = keyword_only_inputs["blocks"]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, strength = ctx.saved_tensors
    gradients = torch.ops.geta.fake_quantize_backward(grad, *tensors, *ctx.settings, strength, blocks=ctx.blocks)
    return (*gradients, None, None, None, None, None)


fake_quantize.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op(
    f"{_NAMESPACE}::dequantize", mutates_args=(), schema="(Tensor codes, Tensor scale, int bits, *, int[] blocks=[]) -> Tensor"
)
def dequantize(codes: Tensor, scale: Tensor, bits: int, *, blocks: Sequence[int] = ()) -> Tensor:
    """codes * scale in scale's dtype: the values that `bits`-wide integer codes stand for.

    codes: integers, any shape; scale: `[]` or broadcasting against codes, or with one number per block. `bits` doesn't change the
    values; it travels with the operator so that costs and file formats know the width. `dequantize(quantize_codes(x, ...), d, b)` equals
    `fake_quantize(x, ...)` bit by bit when d has x's dtype. Only `scale` gets a gradient: sum g * codes.
    """
    return dequantize_values(codes, scale, bits, blocks)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, bits: int, *, blocks: Sequence[int] = ()) -> Tensor:
    if blocks:
        Cutting.of(codes.shape, scale.shape, blocks)
    return torch.empty_like(codes, dtype=scale.dtype)


def _save_for_dequantize_backward(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    codes, scale, _bits = inputs
    ctx.save_for_backward(codes, scale)
    ctx.blocks = keyword_only_inputs["blocks"]


def _dequantize_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale = ctx.saved_tensors
    product = grad.to(torch.promote_types(grad.dtype, torch.float32)) * codes
    if ctx.blocks:
        cut = Cutting.of(codes.shape, scale.shape, ctx.blocks)
        return None, cut.table(cut.rows(product).sum(1)).to(scale.dtype), None
    return None, product.sum_to_size(scale.shape).to(scale.dtype), None


dequantize.register_autograd(_dequantize_backward, setup_context=_save_for_dequantize_backward)


def quantize_codes(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor, signed: bool, *, linear: bool = False, blocks: Blocks = ()) -> Tensor:
    """The integers x_Q / d = round(c(x) / d), int32, of x's shape.

    With d = step_size(b, ...) they lie in [-(2^(b-1) - 1), 2^(b-1) - 1], unsigned in [0, 2^b - 1]. Pass the same `linear` as
    to `fake_quantize` to get exactly its codes.
    """
    if blocks:
        cut = Cutting.of(x.shape, d.shape, blocks)
        rows = quantize_codes(cut.rows(x), cut.line(d), cut.line(q_m), cut.line(t), signed, linear=linear)
        return laid_out_like(cut.back(rows), x)
    parameters = _into_domain(d, q_m, t, linear=linear, dtype=_computing_dtype(x, d, q_m, t))
    return _rounded(x, parameters, signed=signed, linear=linear).to(torch.int32)


def bit_width(d: Tensor, q_m: Tensor, t: Tensor, signed: bool | Tensor) -> Tensor:
    """b = log2(q_m^t / d + 1) + 1 in bits (unsigned: without the last + 1), elementwise over broadcast parameters.

    `signed` may be a boolean tensor, for parameters of several quantizers stacked into one tensor.
    """
    parameters = _into_domain(d, q_m, t, linear=False, dtype=_computing_dtype(d, q_m, t))
    return torch.log2(parameters.top / parameters.d + 1.0) + _sign_bit(signed, parameters.d)


def step_size(bits: float | Tensor, q_m: Tensor, t: Tensor, signed: bool | Tensor) -> Tensor:
    """d(b) = q_m^t / (2^(b-1) - 1) (unsigned: 2^b - 1), the inverse of `bit_width`; elementwise.

    `bits` is a number or a tensor, above 1 when signed and above 0 when unsigned; `signed` may be a boolean tensor.
    """
    dtype = _computing_dtype(q_m, t)
    q_m = q_m.to(dtype).clamp(*Q_M_DOMAIN)
    top = q_m.pow(t.to(dtype).clamp(*T_DOMAIN))
    magnitude_bits = torch.as_tensor(bits, dtype=dtype, device=q_m.device) - _sign_bit(signed, q_m)
    return top / (torch.exp2(magnitude_bits) - 1.0)


def _sign_bit(signed: bool | Tensor, like: Tensor) -> Tensor | float:
    return signed.to(like) if isinstance(signed, Tensor) else float(signed)
