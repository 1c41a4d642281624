"""The linear fake quantizer in one pass over memory on CUDA devices; importable only where `triton` is.

Values, and dx with the straight-through estimator, are bitwise those of the operators in `geta.quant.ops`: divisions are rounded
correctly and rounding is half to even. Each block of elements writes its own partial sums, which are added up in float64, so that
the gradients of parameters don't depend on scheduling. float32 and the half types, which are computed in float32.

Before the first use on a device, both passes are compared with the operators there; should they differ, `is_right_on` says no.
With TRITON_INTERPRET=1 in the environment before the import, the kernels run in Triton's interpreter on any device.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from geta.quant import ops

MOST_HARMONICS = 4
_BLOCK = 1024
_OLDEST_CAPABILITY = (7, 0)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_Layout = tuple[int, int, int]


def _clamp(value, low, high):  # type: ignore[no-untyped-def]
    """NaN where any of the three is, as in ATen."""
    raised = tl.maximum(value, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)


def _scaled(x, d, q_m, signed: tl.constexpr):  # type: ignore[no-untyped-def]
    """(c(x), u, round(u), d) with the parameters in their domain; |u| <= 2^23, where adding and taking away 2^23 rounds to integers."""
    high = _jit_clamp(q_m, 5.9604644775390625e-08, 1048576.0)
    step = tl.maximum(
        _jit_clamp(d, 7.52316384526264e-37, 1.2379400392853803e27), high * 1.1920928955078125e-07, propagate_nan=tl.PropagateNan.ALL
    )
    low = -high if signed else high * 0.0
    clipped = _jit_clamp(x, low, high)
    u = tl.div_rn(clipped, step)
    shift = tl.where(u < 0.0, -8388608.0, 8388608.0)
    return clipped, u, (u + shift) - shift, step


def _forward(x_ptr, d_ptr, q_m_ptr, out_ptr, channels, inner, per_row,  # type: ignore[no-untyped-def] # noqa: PLR0917
             signed: tl.constexpr, largest: tl.constexpr, block: tl.constexpr):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    row = unit // per_row
    within = (unit - row * per_row) * block + tl.arange(0, block)
    mask = within < inner
    x = tl.load(x_ptr + row * inner + within, mask=mask, other=0.0).to(tl.float32)
    channel = row % channels
    _, _, codes, step = _jit_scaled(x, tl.load(d_ptr + channel), tl.load(q_m_ptr + channel), signed)
    values = codes * step + 0.0
    if largest > 0.0:
        values = _jit_clamp(values, -largest, largest)
    tl.store(out_ptr + row * inner + within, values.to(out_ptr.dtype.element_ty), mask=mask)


def _backward(grad_ptr, x_ptr, d_ptr, q_m_ptr, strength_ptr, dx_ptr, partial_ptr,  # type: ignore[no-untyped-def] # noqa: PLR0913, PLR0917
              channels, inner, per_row, a_0, a_1, a_2, a_3,
              signed: tl.constexpr, harmonics: tl.constexpr, has_strength: tl.constexpr, block: tl.constexpr):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    row = unit // per_row
    within = (unit - row * per_row) * block + tl.arange(0, block)
    mask = within < inner
    x = tl.load(x_ptr + row * inner + within, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + row * inner + within, mask=mask, other=0.0).to(tl.float32)
    channel = row % channels
    clipped, u, codes, _ = _jit_scaled(x, tl.load(d_ptr + channel), tl.load(q_m_ptr + channel), signed)
    residual = codes - u
    dx = g * tl.where(clipped == x, 1.0, 0.0)
    sign = tl.where(clipped > 0.0, 1.0, 0.0) - tl.where(clipped < 0.0, 1.0, 0.0)
    tl.store(partial_ptr + 2 * unit, tl.sum(tl.where(mask, g * residual, 0.0), axis=0))
    tl.store(partial_ptr + 2 * unit + 1, tl.sum(tl.where(mask, (g - dx) * sign, 0.0), axis=0))
    if harmonics > 0:
        angle = residual * 3.141592653589793
        series = a_0 * tl.cos(angle)
        if harmonics > 1:
            series += a_1 * tl.cos(3.0 * angle)
        if harmonics > 2:
            series += a_2 * tl.cos(5.0 * angle)
        if harmonics > 3:
            series += a_3 * tl.cos(7.0 * angle)
        if has_strength:
            series *= tl.load(strength_ptr)
        dx = dx * tl.div_rn(1.0 - series, 1.0 + series)
    tl.store(dx_ptr + row * inner + within, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# Calls instead of decorators: a decorator without types would take those of the functions away from the type checker.
_jit_clamp: Any = triton.jit(_clamp)
_jit_scaled: Any = triton.jit(_scaled)
_forward_kernel: Any = triton.jit(_forward)
_backward_kernel: Any = triton.jit(_backward)


def quantize(x: Tensor, d: Tensor, q_m: Tensor, layout: _Layout, *, signed: bool) -> Tensor | None:
    """x_Q, or None for other element types than float32 and the half types; the layout is that of `geta.quant.native`."""
    if x.dtype not in _DTYPES:
        return None
    outer, channels, inner = layout
    per_row = -(-inner // _BLOCK)
    out = torch.empty_like(x)
    largest = torch.finfo(x.dtype).max if x.dtype == torch.float16 else 0.0
    grid = (outer * channels * per_row,)
    with _on(x.device):
        _forward_kernel[grid](x, _flat(d), _flat(q_m), out, channels, inner, per_row, signed, largest, _BLOCK, enable_fp_fusion=False)
    return out


def gradients(
    grad: Tensor,
    x: Tensor,
    d: Tensor,
    q_m: Tensor,
    layout: _Layout,
    *,
    amplitudes: Sequence[float],
    strength: Tensor | None,
    signed: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(dx, dd, dq_m), or None as above and for more than MOST_HARMONICS harmonics."""
    harmonics = len(amplitudes) if any(amplitudes) else 0
    if x.dtype not in _DTYPES or harmonics > MOST_HARMONICS:
        return None
    outer, channels, inner = layout
    per_row = -(-inner // _BLOCK)
    grid = (outer * channels * per_row,)
    grad = grad.to(x.dtype)
    grad = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
    dx = torch.empty_like(x)
    partial = torch.empty((outer, channels, per_row, 2), dtype=torch.float32, device=x.device)
    scaled = [math.sqrt(2.0) * math.pi * a_k for a_k in (*amplitudes, 0.0, 0.0, 0.0, 0.0)[:MOST_HARMONICS]]
    with _on(x.device):
        _backward_kernel[grid](
            *(grad, x, _flat(d), _flat(q_m), _flat(d if strength is None else strength), dx, partial),
            *(channels, inner, per_row, *scaled),
            *(signed, harmonics, strength is not None, _BLOCK),
            enable_fp_fusion=False,
        )
    dd, dq_m = partial.sum(dim=(0, 2), dtype=torch.float64).unbind(-1)
    return dx, dd.view(d.shape).to(d.dtype), dq_m.view(q_m.shape).to(q_m.dtype)


def _flat(parameter: Tensor) -> Tensor:
    return parameter.to(torch.float32).contiguous()


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.inference_mode(torch.is_inference_mode_enabled())


def is_right_on(device: torch.device) -> bool:
    """Whether both kernels compile for this device and give the operators' results there; tried once, outside of CUDA graphs."""
    return not torch.cuda.is_current_stream_capturing() and _is_right_on(device)


@cache
def _is_right_on(device: torch.device) -> bool:
    try:
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
            return False
        agrees = agrees_with_operators(device)
    except Exception as error:  # noqa: BLE001 - whatever a driver or compiler throws: the operators work without it
        logging.getLogger("geta").warning("Triton kernels cannot be used on %s, PyTorch's operators are: %s", device, error)
        return False
    if not agrees:
        logging.getLogger("geta").warning("Triton kernels give other results than PyTorch's operators on %s and are not used", device)
    return agrees


def agrees_with_operators(device: torch.device, dtypes: Sequence[torch.dtype] = _DTYPES) -> bool:
    """Compare both passes with `geta.quant.ops` on a few thousand numbers, among them infinite ones, NaN and -0."""
    wide = torch.linspace(-3.0, 3.0, 4099, device=device)
    wide[:5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.625], device=device)
    grad = torch.linspace(-1.0, 2.0, 4099, device=device).cos()
    d, q_m = torch.full((), 0.05, device=device), torch.full((), 1.7, device=device)
    return all(_same_values(wide.to(dtype), d, q_m) for dtype in dtypes) and all(
        _same_gradients(grad[5:], wide[5:], d, q_m, amplitudes) for amplitudes in ((), (0.15, -0.02))
    )


def _same_values(x: Tensor, d: Tensor, q_m: Tensor) -> bool:
    found = quantize(x, d, q_m, (1, 1, x.numel()), signed=True)
    wanted = ops.aten_values(x, ops.prepared(x, d, q_m, q_m, True), True, True)
    return found is not None and _same_bits(found, wanted)


def _same_gradients(grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, amplitudes: Sequence[float]) -> bool:
    found = gradients(grad, x, d, q_m, (1, 1, x.numel()), amplitudes=amplitudes, strength=None, signed=False)
    wanted = ops.aten_gradients(grad, x, d, q_m, torch.ones_like(d), False, True, amplitudes)
    if found is None or (not amplitudes and not _same_bits(found[0], wanted[0])):
        return False
    return all(torch.allclose(mine, other, rtol=1e-4, atol=1e-4) for mine, other in zip(found, wanted[:3], strict=True))


def _same_bits(left: Tensor, right: Tensor) -> bool:
    kind = {4: torch.int32, 2: torch.int16}[left.element_size()]
    return bool(((left.view(kind) == right.view(kind)) | (left.isnan() & right.isnan())).all())
