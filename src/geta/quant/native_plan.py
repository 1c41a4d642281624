"""The short way through the linear quantizer on the CPU: everything that stays the same from step to step is looked up once.

A small weight is quantized in a few microseconds, and finding out how to do that takes ten times as long. A plan keeps the
answers for tensors of one shape, layout and type; whatever isn't covered has no plan and goes through `native_reuse`.
Values and gradients are those of `geta.quant.native`, bit by bit: the same kernels are called with the same arguments.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geta.quant import native
from geta.quant.native_reuse import Settings, is_worth_keeping
from geta.quant.surrogate import Surrogate


class Plan(NamedTuple):
    """How the kernels are called. layout: outer, channels, inner; partial: how many doubles the backward needs.

    amplitudes, harmonics: of the surrogate, ready for the kernel. settings: for whoever differentiates the backward.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]
    layout: native.Layout
    partial: int
    amplitudes: Any
    harmonics: int
    settings: Settings


class Planner:
    """The plan of one quantizer for the kind of tensor that it saw last. Copies and pickles start empty."""

    __slots__ = ("_key", "_plan")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the plan."""
        self._key: tuple[Any, ...] | None = None
        self._plan: Plan | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Planner:
        return Planner()

    def __reduce__(self) -> tuple[type[Planner], tuple[()]]:
        return Planner, ()

    def plan(self, x: Tensor, d: Tensor, q_m: Tensor, surrogate: Surrogate, *, signed: bool, keeps: bool) -> Plan | None:
        """The plan for these plain tensors and the linear quantizer, or None. keeps: whether values are kept between uses."""
        if x.is_neg():
            return None
        kind = (x.shape, x.stride(), x.dtype, x.device, surrogate, signed, keeps)
        key = (*kind, d.shape, d.stride(), d.dtype, d.device, q_m.shape, q_m.stride(), q_m.dtype, q_m.device)
        if key != self._key:
            settings = Settings(signed, True, surrogate.coefficients, surrogate.kind)
            self._key, self._plan = key, _make(x, d, q_m, settings, keeps=keeps)
        return self._plan


def _make(x: Tensor, d: Tensor, q_m: Tensor, settings: Settings, *, keeps: bool) -> Plan | None:
    if any(settings.coefficients) and settings.kind != "fourier":
        return None
    if keeps and is_worth_keeping(x, linear=True):
        return None
    layout = native.layout_of(x, d, q_m)
    same_kind = x.dtype in native._KINDS and x.dtype == d.dtype == q_m.dtype and d.is_contiguous() and q_m.is_contiguous()
    library = native._library_for(x, d, q_m) if layout is not None and same_kind else None
    if layout is None or library is None:
        return None
    kind = native._KINDS[x.dtype]
    scale = math.sqrt(2.0) * math.pi
    harmonics = len(settings.coefficients) if any(settings.coefficients) else 0
    return Plan(
        getattr(library, f"geta_forward_{kind}"),
        getattr(library, f"geta_backward_{kind}"),
        layout,
        2 * int(library.geta_blocks(*layout)),
        (ctypes.c_double * max(1, harmonics))(*(scale * a_k for a_k in settings.coefficients[:harmonics])),
        harmonics,
        settings,
    )


def quantize(plan: Plan, x: Tensor, d: Tensor, q_m: Tensor) -> Tensor:
    """x_Q, with autograd where it is needed."""
    if torch.is_grad_enabled() and (x.requires_grad or d.requires_grad or q_m.requires_grad):
        quantized: Tensor = _Planned.apply(x, d, q_m, plan)  # type: ignore[no-untyped-call]
        return quantized
    return _values(plan, x, d, q_m)


def _values(plan: Plan, x: Tensor, d: Tensor, q_m: Tensor) -> Tensor:
    out = torch.empty_like(x)
    plan.forward(x.data_ptr(), d.data_ptr(), q_m.data_ptr(), out.data_ptr(), *plan.layout, plan.settings.signed, native._threads(x))
    return out


class _Planned(torch.autograd.Function):
    """The linear `geta::fake_quantize` of plain tensors that a plan covers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: Tensor, q_m: Tensor, plan: Plan) -> Tensor:
        ctx.save_for_backward(x, d, q_m)
        ctx.plan = plan
        return _values(plan, x, d, q_m)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, d, q_m = ctx.saved_tensors
        plan: Plan = ctx.plan
        if torch.is_grad_enabled() or not native.is_eager(grad, x, d, q_m) or grad.dtype != x.dtype or grad.is_neg():
            t = torch.ones_like(q_m)
            return (*torch.ops.geta.fake_quantize_backward(grad, x, d, q_m, t, *plan.settings)[:3], None)
        grad = native.like(grad, x)
        dx, dd, dq_m = torch.empty_like(x), torch.empty_like(d), torch.empty_like(q_m)
        partial = torch.empty(plan.partial, dtype=torch.float64)
        plan.backward(
            grad.data_ptr(),
            x.data_ptr(),
            d.data_ptr(),
            q_m.data_ptr(),
            dx.data_ptr(),
            dd.data_ptr(),
            dq_m.data_ptr(),
            partial.data_ptr(),
            *plan.layout,
            plan.amplitudes,
            plan.harmonics,
            plan.settings.signed,
            native._threads(x),
        )
        return dx, dd, dq_m, None
