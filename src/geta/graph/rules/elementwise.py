"""Elementwise operators: operands that span the same dimension keep the same indices; each knows whether it keeps zeros."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from geta.graph.context import Context, Place, expand_to
from geta.graph.labels import Track, Value, compress, never_zero, squeezed, varying
from geta.graph.rules.registry import rule

ZeroLaw = Literal["keep", "lose", "and", "or"]
"""When is the result zero: as its operand, never, if all operands are, if one is."""

_KEEP = """abs absolute alias alpha_dropout arcsinh arctan asin asinh atan atanh celu clone contiguous deg2rad detach dropout elu erf
erfinv expm1 feature_alpha_dropout feature_dropout fix floor frac gelu hardshrink hardswish isinf isnan leaky_relu lift_fresh
lift_fresh_copy log1p mish nan_to_num native_dropout neg negative positive real relu relu6 round rrelu selu sgn sign silu sin sinh
softshrink sqrt square tan tanh to _to_copy trunc type_as zero zeros_like""".split()
_LOSE = """acos bernoulli bitwise_not cos cosh empty_like erfc exp exp2 fill full_like hardsigmoid isfinite log_sigmoid logical_not
ones_like rand_like randn_like sigmoid sinc softplus""".split()
_POLES = "acosh digamma lgamma log log10 log2 logit reciprocal rsqrt".split()


def pointwise(ctx: Context, operands: Sequence[Value], law: ZeroLaw, *, by: Sequence[Value] | None = None) -> Value:
    """Couple the operands and return the result under a law of zeros, read from `by` (default: all operands)."""
    out = ctx.shape
    rank = len(out)
    derived = all(value.derived for value in operands)
    if not any(value.tracks for value in operands):
        return Value(out, (), derived)
    ctx.align([Place(value, tuple(range(rank - value.rank, rank))) for value in operands], rank)
    if not derived:
        ctx.produce(*[value for value in operands if value.derived])
    return ctx.free(_merged(operands, operands if by is None else by, out, law), derived)


def _merged(operands: Sequence[Value], by: Sequence[Value], out: tuple[int, ...], law: ZeroLaw) -> list[Track]:
    """One track per maximal set of varying dimensions; its zero bit from the operands that vary in the same way."""
    laid = [[(expand_to(track.code, value.shape, out), track.origins) for track in value.tracks] for value in operands]
    judges = [any(value is judge for judge in by) for value in operands]
    seen = [dims for tracks in laid for code, _ in tracks if (dims := varying(code))]
    maximal = [dims for dims in dict.fromkeys(seen) if not any(set(dims) < set(other) for other in seen)]
    merged = []
    for dims in maximal:
        mine = [[(code, origin) for code, origin in tracks if varying(code) == dims] for tracks in laid]
        bits = [_bits(value, tracks, dims, out) for value, tracks in zip(operands, laid, strict=True)]
        origins = frozenset(owner for same in mine for _, origin in same for owner in origin)
        # Several tracks of one operand may run along the same axes; those of the operand that has most speak for all.
        speaker = max(range(len(mine)), key=lambda number: len(mine[number]))
        for code, _ in mine[speaker]:
            own = [zero_bit(code) if number == speaker else bit for number, bit in enumerate(bits)]
            zero = combine([bit for bit, judge in zip(own, judges, strict=True) if judge], law)
            merged.append(Track((squeezed(code).bitwise_and(-2) | squeezed(compress(zero))).expand(out), origins))
    return merged


def _bits(value: Value, tracks: Sequence[tuple[torch.Tensor, frozenset[int]]], dims: tuple[int, ...], out: tuple[int, ...]) -> torch.Tensor:
    """Zero bits of one operand where a track varies along `dims`.

    A track along fewer of them (heads, not heads and their channels) speaks too if the operand spans them all: then the
    units can only be what that track varies along, because anything finer would have to match a tensor of fixed size.
    """
    same = [code for code, _ in tracks if varying(code) == dims]
    lead = len(out) - value.rank
    if not same and all(dim >= lead and value.shape[dim - lead] > 1 for dim in dims):
        same = [code for code, _ in tracks if varying(code) and set(varying(code)) < set(dims)]
    return combine([zero_bit(code) for code in same], "and") if same else torch.zeros(1, dtype=torch.int64).expand(out)


def zero_bit(code: torch.Tensor) -> torch.Tensor:
    """The zero bits of a compressed track; stride 0 stays stride 0, so that nothing of the tensor's full size is made."""
    return squeezed(code).bitwise_and(1).expand(code.shape)


def combine(bits: Sequence[torch.Tensor], law: ZeroLaw) -> torch.Tensor:
    """The zero bit of a result from its operands' bits (int64 0 / 1)."""
    shape = bits[0].shape
    small = [squeezed(bit) for bit in bits]
    if law == "lose":
        return torch.zeros(1, dtype=torch.int64).expand(shape)
    result = small[0]
    if law in ("and", "keep"):
        for bit in small[1:]:
            result = result & bit
    elif law == "or":
        for bit in small[1:]:
            result = result | bit
    return result.expand(shape)


def tensors(*values: Any) -> list[Value]:
    return [value for value in values if isinstance(value, Value)]


@rule(*[f"aten::{name}" for name in _KEEP])
def keeps_zero(ctx: Context) -> Any:
    """f(0) = 0."""
    value = next(value for value in ctx.arguments.values() if isinstance(value, Value))
    return _unary(ctx, value, "keep")


@rule(*[f"aten::{name}" for name in _LOSE])
def loses_zero(ctx: Context) -> Any:
    """f(0) != 0."""
    value = next(value for value in ctx.arguments.values() if isinstance(value, Value))
    return _unary(ctx, value, "lose")


@rule(*[f"aten::{name}" for name in _POLES])
def poles(ctx: Context) -> Any:
    """f(0) is infinite or no number, and no consumer's zero takes that back, so what removal makes zero stays."""
    value = ctx["self"]
    if not ctx.arguments.get("eps"):  # logit clamps its input if it is given eps
        _keep_from_zero(ctx, value)
    return _unary(ctx, value, "lose")


def _keep_from_zero(ctx: Context, value: Value) -> None:
    for track in value.tracks:
        code = squeezed(track.code)
        doomed = (code >> 1)[(code & 1).bool()]
        ctx.constraints.fixed.append((doomed.numpy(), f"is not finite at zero, which removal makes it, in {ctx.where}"))


@rule("aten::tril", "aten::triu")
def triangles(ctx: Context) -> Any:
    """Which entries are cut off depends on the indices of both dimensions, so both stay."""
    ctx.freeze(ctx["self"], (-2, -1), f"is cut to a triangle in {ctx.where}")
    return _unary(ctx, ctx["self"], "keep")


def _unary(ctx: Context, value: Value, law: ZeroLaw) -> Any:
    result = Value(value.shape, value.tracks, value.derived)
    if law == "lose":
        result = Value(value.shape, tuple(Track(never_zero(t.code), t.origins) for t in value.tracks), value.derived)
    if isinstance(ctx.node.meta["val"], (tuple, list)):
        return (result, *[Value(value.shape) for _ in ctx.node.meta["val"][1:]])
    return result


@rule("aten::hardtanh", "aten::clamp", "aten::clip", "aten::clamp_min", "aten::clamp_max")
def clamps(ctx: Context) -> Value:
    """Keeps zero when 0 lies inside the bounds."""
    low = ctx.arguments.get("min_val", ctx.arguments.get("min"))
    high = ctx.arguments.get("max_val", ctx.arguments.get("max"))
    bounds = tensors(low, high)
    if bounds:
        return pointwise(ctx, [ctx["self"], *bounds], "and")
    inside = (low is None or low <= 0) and (high is None or high >= 0)
    return pointwise(ctx, [ctx["self"]], "keep" if inside else "lose")


@rule("aten::threshold")
def threshold(ctx: Context) -> Value:
    """x if x > threshold else value."""
    keeps = ctx["value"] == 0 or ctx["threshold"] < 0
    return pointwise(ctx, [ctx["self"]], "keep" if keeps else "lose")


@rule("aten::add", "aten::sub", "aten::rsub", "aten::subtract")
def sums(ctx: Context) -> Value:
    """0 + 0 = 0; a non-zero number added loses it."""
    operands = tensors(ctx["self"], ctx["other"])
    numbers = [number for number in (ctx["self"], ctx["other"]) if not isinstance(number, Value)]
    return pointwise(ctx, operands, "lose" if any(number != 0 for number in numbers) else "and")


@rule("aten::mul", "aten::multiply", "aten::__and__", "aten::logical_and", "aten::bitwise_and")
def products(ctx: Context) -> Value:
    """0 * x = 0."""
    return pointwise(ctx, tensors(ctx["self"], ctx["other"]), "or")


@rule("aten::div", "aten::divide", "aten::true_divide", "aten::floor_divide", "aten::remainder", "aten::fmod")
def quotients(ctx: Context) -> Value:
    """0 / x = 0 where x != 0; a divisor that becomes zero with its unit would give NaN, so it freezes."""
    divisor = ctx["other"]
    if not isinstance(divisor, Value):
        return pointwise(ctx, tensors(ctx["self"]), "keep")
    for track in divisor.tracks:
        code = squeezed(track.code)
        doomed = (code >> 1)[(code & 1).bool()]
        ctx.constraints.fixed.append((doomed.numpy(), f"divides by a value that removal makes zero in {ctx.where}"))
    dividend = ctx["self"]
    if not isinstance(dividend, Value):
        return pointwise(ctx, [divisor], "lose")
    return pointwise(ctx, [dividend, divisor], "keep", by=[dividend])


@rule("aten::pow")
def powers(ctx: Context) -> Value:
    """x ** p keeps zero for p > 0."""
    exponent = ctx["exponent"]
    if isinstance(ctx["self"], Value) and (isinstance(exponent, Value) or exponent < 0):
        _keep_from_zero(ctx, ctx["self"])
    if isinstance(exponent, Value) or not isinstance(ctx["self"], Value):
        return pointwise(ctx, tensors(ctx["self"], exponent), "lose")
    return pointwise(ctx, [ctx["self"]], "keep" if exponent > 0 else "lose")


@rule(
    "aten::maximum",
    "aten::minimum",
    "aten::fmax",
    "aten::fmin",
    "aten::hypot",
    "aten::__or__",
    "aten::logical_or",
    "aten::bitwise_or",
    "aten::ne",
    "aten::lt",
    "aten::gt",
    "aten::less",
    "aten::greater",
    "aten::__xor__",
    "aten::logical_xor",
    "aten::bitwise_xor",
)
def zero_of_zeros(ctx: Context) -> Value:
    """f(0, 0) = 0."""
    operands = tensors(ctx["self"], ctx["other"])
    return pointwise(ctx, operands, "and" if len(operands) == 2 or ctx["other"] == 0 else "lose")


@rule("aten::eq", "aten::le", "aten::ge", "aten::less_equal", "aten::greater_equal", "aten::atan2")
def one_of_zeros(ctx: Context) -> Value:
    """f(0, 0) may differ from 0."""
    return pointwise(ctx, tensors(ctx["self"], ctx["other"]), "lose")


@rule("aten::where")
def where(ctx: Context) -> Any:
    """Zero where both branches are zero; a scalar branch must be 0."""
    if "self" not in ctx.arguments:
        return NotImplemented  # where(condition) alone is nonzero(condition): its shape depends on values
    branches = tensors(ctx["self"], ctx["other"])
    numbers = [number for number in (ctx["self"], ctx["other"]) if not isinstance(number, Value)]
    law: ZeroLaw = "lose" if not branches or any(number != 0 for number in numbers) else "and"
    return pointwise(ctx, [ctx["condition"], *branches], law, by=branches or [ctx["condition"]])


@rule("aten::masked_fill")
def masked_fill(ctx: Context) -> Value:
    """Keeps zero only when zeros are filled in."""
    keeps = not isinstance(ctx["value"], Value) and ctx["value"] == 0
    return pointwise(ctx, [ctx["self"], ctx["mask"]], "keep" if keeps else "lose", by=[ctx["self"]])


@rule("aten::addcmul", "aten::lerp")
def three_operands(ctx: Context) -> Value:
    """a + b * c, a + w (b - a): zero when every operand is."""
    return pointwise(ctx, tensors(*ctx.arguments.values()), "and")


@rule("aten::prelu")
def prelu(ctx: Context) -> Value:
    """max(0, x) + a * min(0, x); the slope [C] runs along dimension 1."""
    x, slope = ctx["self"], ctx["weight"]
    channel = 1 if x.rank > 1 else 0
    ctx.align([Place(x, tuple(range(x.rank))), Place(slope, (channel,))], x.rank)
    ctx.produce(slope)
    return ctx.free(x.tracks, x.derived and slope.derived)


@rule("aten::copy")
def copy(ctx: Context) -> Value:
    """self becomes src."""
    return pointwise(ctx, [ctx["self"], ctx["src"]], "keep", by=[ctx["src"]])
