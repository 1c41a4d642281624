"""Quantizers, whoever put them in: geta's own, `torch.fake_quantize_*`, `quantized_decomposed`, torchao, plain arithmetic.

They work element by element, so a scale or zero point per channel follows its channel like any other tensor (and is never zeroed)
and a single one takes no part. They keep zeros: an affine quantizer maps 0 to round(0 / s) + z = z, the clamp leaves z alone
because a zero point lies between the smallest and the largest code, and z is mapped back to (z - z) * s = 0. With a zero
point that is a fraction, round(z) - z remains, so a floating-point zero point loses zeros unless the operator rounds it itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from geta.graph.context import INTERNAL, Context, Place, Rule, concrete_shape, narrow_dims
from geta.graph.labels import Track, Value, compress, make_value, never_zero, squeezed
from geta.graph.rules.affine import Recognised, argument, name_of, root, users_beyond_moves
from geta.graph.rules.elementwise import pointwise
from geta.graph.rules.registry import rule

_OUTPUT = ("quantize_affine", "quantize_per_tensor", "quantize_per_channel", "quantize_per_token", "quantize_per_channel_group")
_PARAMETERS = ("scale", "scales", "zero_point", "zero_points")
_PAIRS = {name: f"de{name}" for name in _OUTPUT}


AFFINE = (
    "aten::fake_quantize_per_tensor_affine",
    "aten::fake_quantize_per_tensor_affine_cachemask",
    "aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
    "aten::_fake_quantize_learnable_per_tensor_affine",
    "aten::fake_quantize_per_channel_affine",
    "aten::fake_quantize_per_channel_affine_cachemask",
    "aten::_fake_quantize_learnable_per_channel_affine",
    "quantized_decomposed::fake_quant_per_channel",
)
"""Fake quantizers in one operator, with a scale and a zero point that are given to them."""
OBSERVED = ("aten::fused_moving_avg_obs_fake_quant", "aten::_fused_moving_avg_obs_fq_helper")
"""The same with an observer that sets both."""


def special_rules(found: Recognised) -> dict[fx.Node, Rule]:
    """Rules for single nodes that mean more than their operator says."""
    rules: dict[fx.Node, Rule] = {}
    for node, place in found.scaled.items():
        rules[node] = _with_place(place)
    for node, places in found.shifted.items():
        rules[node] = _among_codes(places)
    rules.update(dict.fromkeys(found.inverses, inverse))
    return {**rules, **dict.fromkeys(found.ranges, ranges)}


def quantized(ctx: Context, x: Value, scales: Sequence[tuple[Value, Sequence[int]]], *, keeps_zero: bool = True) -> Value:
    """x with its own labels; scales = (tensor, the dimension of x that each of its dimensions runs along)."""
    ctx.align([Place(x, tuple(range(x.rank))), *[Place(scale, tuple(letters)) for scale, letters in scales]], x.rank)
    tracks = x.tracks if keeps_zero else tuple(Track(never_zero(track.code), track.origins) for track in x.tracks)
    return Value(x.shape, tracks, x.derived)  # whatever the scale is: what is zero in x stays zero, so zeros can be asked for


def _trailing(x: Value, scale: Value) -> tuple[Value, tuple[int, ...]]:
    """A scale that broadcasts against x; one with more dimensions than x holds a single number."""
    if scale.rank > x.rank:
        scale = Value((), (), scale.derived)
    return scale, tuple(range(x.rank - scale.rank, x.rank))


def _values(*values: Any) -> list[Value]:
    return [value for value in values if isinstance(value, Value)]


@rule("geta::fake_quantize")
def fake_quantize(ctx: Context) -> Value:
    """geta's own quantizer: d, q_m and t broadcast against x."""
    x: Value = ctx["x"]
    return quantized(ctx, x, _own_scales(ctx, x, [ctx[name] for name in ("d", "q_m", "t")]))


@rule("geta::lsq_quantize")
def lsq_quantize(ctx: Context) -> Value:
    """geta's own quantizer of fixed width: its scale broadcasts against x; the binary one has no zero and makes +1 of it."""
    x: Value = ctx["x"]
    binary = ctx["bits"] == 1 and ctx["quant_min"] < 0
    return quantized(ctx, x, _own_scales(ctx, x, [ctx["scale"]]), keeps_zero=not binary)


@rule("geta::dequantize")
def dequantize(ctx: Context) -> Value:
    """Integer codes times scale."""
    codes = ctx["codes"]
    return quantized(ctx, codes, _own_scales(ctx, codes, [ctx["scale"]]))


def _own_scales(ctx: Context, x: Value, scales: Sequence[Value]) -> list[tuple[Value, Sequence[int]]]:
    """Parameters that broadcast, or with one number per row and block of columns, where only the rows are coupled.

    Columns go one by one: the operator's list of block lengths follows, and a block without columns loses its numbers.
    """
    blocks = ctx["blocks"]
    if not blocks:
        return [_trailing(x, scale) for scale in scales]
    axis = next(axis for axis in (1, 0) if _is_cut_along(axis, x.shape, scales[0].shape, blocks))
    if not isinstance(ctx.node.args[0], fx.Node) or ctx.node.args[0].op != "placeholder":
        ctx.freeze(x, (axis,), f"is quantized in blocks by {ctx.where}, and is not a parameter itself")
    for scale in scales:
        ctx.freeze(scale, (axis,), f"{INTERNAL}belongs to blocks of {ctx.where}")
    row = 1 - axis
    return [(Value((scale.shape[row],), _row_tracks(scale, axis), scale.derived), (row,)) for scale in scales]


def _row_tracks(scale: Value, axis: int) -> tuple[Track, ...]:
    return tuple(Track(track.code.select(axis, 0), track.origins) for track in _without(scale, (axis,)))


def _is_cut_along(axis: int, shape: Sequence[int], parameter: Sequence[int], blocks: Sequence[int]) -> bool:
    """As `geta.quant.blocks` decides it: one block length stands for all of them."""
    count = len(blocks) if len(blocks) > 1 else -(-shape[axis] // blocks[0])
    size = sum(blocks) if len(blocks) > 1 else shape[axis]
    return parameter[1 - axis] == shape[1 - axis] and (parameter[axis], shape[axis]) == (count, size)


@rule(*AFFINE)
def fake_quantize_affine(ctx: Context) -> Any:
    """(clamp(round(x / s) + z) - z) * s. The learnable ones round and clamp their zero point themselves."""
    x = ctx.arguments.get("self", ctx.arguments.get("input"))
    assert isinstance(x, Value)
    parameters = _values(*[ctx.arguments.get(name) for name in _PARAMETERS])
    axis = ctx.arguments.get("axis")
    keeps = "learnable" in ctx.op or not _fractional(ctx)
    letters = () if axis is None else (axis % x.rank,)
    result = quantized(ctx, x, [(_as_rank(value, len(letters)), letters) for value in parameters], keeps_zero=keeps)
    if isinstance(ctx.node.meta["val"], (tuple, list)):
        mask = Value(result.shape, tuple(Track(never_zero(track.code)) for track in result.tracks))
        return result, mask
    return result


def _as_rank(value: Value, rank: int) -> Value:
    """A parameter per channel has one dimension; one for the whole tensor is stored as [1] or []."""
    return value if value.rank == rank else Value((), (), value.derived)


def _fractional(ctx: Context) -> bool:
    """Whether the zero point is a floating-point tensor, which need not be an integer."""
    given = argument(ctx.node, "zero_point", "zero_points")
    return isinstance(given, fx.Node) and given.meta["val"].is_floating_point() and not _from_qparams(given)


def _from_qparams(node: fx.Node) -> bool:
    """Zero points of `choose_qparams` are integers whatever dtype they are stored in."""
    origin = root(node)
    return isinstance(origin, fx.Node) and bool(origin.args) and name_of(origin.args[0]).rpartition("::")[2].startswith("choose_qparams")


@rule(*OBSERVED)
def observed(ctx: Context) -> Any:
    """Updates its range from what it sees: a moving average of minima and maxima, which zeros may move."""
    x: Value = ctx["self"]
    own = ctx["ch_axis"] % x.rank if ctx["per_row_fake_quant"] else None
    reason = f"is seen by a range observer in {ctx.where} (switched off by torch.ao.quantization.disable_observer)"
    for dim in range(x.rank):
        internal = INTERNAL if x.derived and dim > 1 else ""  # a kernel's height
        ctx.freeze(x, () if dim == own else (dim,), f"{internal}{reason}", soft=not internal)
    letters = (ctx["ch_axis"] % x.rank,) if ctx["per_row_fake_quant"] else ()
    parameters = [_as_rank(ctx[name], len(letters)) for name in ("running_min", "running_max", "scale", "zero_point")]
    result = quantized(ctx, x, [(value, letters) for value in parameters])
    if isinstance(ctx.node.meta["val"], (tuple, list)):
        return result, Value(result.shape, tuple(Track(never_zero(track.code)) for track in result.tracks))
    return result


# ---- pairs of operators: quantize, dequantize ------------------------------------------------------------------


def _blocks(x: Value, scale: Value, sizes: Sequence[int]) -> tuple[int, ...] | None:
    """The dimension of x that each dimension of a scale runs along, or None when a dimension is cut into several blocks."""
    whole = tuple(dim for dim, size in enumerate(sizes) if size == 1)
    if any(size not in (1, x.shape[dim]) for dim, size in enumerate(sizes)):
        return None
    return tuple(range(x.rank)) if scale.rank == x.rank else whole if scale.rank == len(whole) else None


def _pair_scales(ctx: Context, x: Value) -> list[tuple[Value, tuple[int, ...]]] | None:
    """The scale and zero point of one half of a pair with the dimensions they run along; None when they are per block."""
    scales = _values(*[ctx.arguments.get(name) for name in _PARAMETERS])
    if ctx.op.endswith("_group") or "block_size" in ctx.arguments:
        sizes = ctx["block_size"] if "block_size" in ctx.arguments else [1] * (x.rank - 1) + [ctx["group_size"]]
        found = [(scale, _blocks(x, scale, sizes)) for scale in scales]
        return None if any(letters is None for _, letters in found) else [(s, letters) for s, letters in found if letters is not None]
    if "axis" in ctx.arguments:
        return [(scale, (ctx["axis"] % x.rank,)) for scale in scales]
    if ctx.op.endswith("per_token"):
        return [_trailing(x, scale) for scale in scales]
    return [(_as_rank(scale, 0), ()) for scale in scales]


def _in_blocks(ctx: Context, x: Value) -> None:
    """Scales per block of a dimension: blocks go as a whole, and the table of scales with them is left to the freeze."""
    sizes = ctx["block_size"] if "block_size" in ctx.arguments else [1] * (x.rank - 1) + [ctx["group_size"]]
    dims = [dim for dim, size in enumerate(sizes) if size != 1]
    ctx.freeze(x, dims, f"is quantized in blocks by {ctx.where}")
    for scale in _values(*[ctx.arguments.get(name) for name in _PARAMETERS]):
        ctx.freeze(scale, [dim for dim in dims if dim < scale.rank], f"belongs to blocks of {ctx.where}")
        if scale.rank == x.rank:
            shape = tuple(1 if dim in dims else size for dim, size in enumerate(scale.shape))
            laid = Value(shape, _without(scale, dims), scale.derived)
            ctx.align([Place(x, tuple(range(x.rank))), Place(laid, tuple(range(x.rank)))], x.rank)


def _without(value: Value, dims: Sequence[int]) -> tuple[Track, ...]:
    return tuple(Track(compress(narrow_dims(t.code, dims)), t.origins) for t in value.tracks if not set(t.dims) & set(dims))


@rule(*[f"{space}::{name}" for space in ("quantized_decomposed", "torchao") for name in (*_PAIRS, *_PAIRS.values())])
def half_of_a_pair(ctx: Context) -> Value:
    """Codes know zero as their zero point; they keep it if all that ever reads them takes the same zero point off again."""
    x: Value = ctx["input"]
    if ctx.op in _PAIRS:
        keeps = not _fractional(ctx) and _read_back(ctx.node)
    else:
        origin = root(ctx.node.args[0])
        keeps = name_of(origin).rpartition("::")[2] in _PAIRS or zero_point(ctx.node) == 0.0
    scales = _pair_scales(ctx, x)
    if scales is None:
        _in_blocks(ctx, x)
        scales = []
    return quantized(ctx, x, scales, keeps_zero=keeps)


def zero_point(node: fx.Node) -> Any:
    """Where an operator's zero point comes from (a node or a number); 0 when it has none."""
    given = argument(node, "zero_point", "zero_points")
    return 0.0 if given is None else root(given)


def _read_back(node: fx.Node) -> bool:
    """Whether every use of these codes is the matching dequantize with the same zero point, which lies within the codes."""
    zero = zero_point(node)
    low, high = argument(node, "quant_min"), argument(node, "quant_max")
    if isinstance(zero, float) and isinstance(low, (int, float)) and isinstance(high, (int, float)) and not low <= zero <= high:
        return False
    own = name_of(node).rpartition("::")[2]
    users = [user for user, _ in users_beyond_moves(node)]
    return bool(users) and all(name_of(user).rpartition("::")[2] == _PAIRS[own] and zero_point(user) == zero for user in users)


# ---- ranges ----------------------------------------------------------------------------------------------------


def ranges(ctx: Context) -> Any:
    """A minimum or maximum that zeros can't move: what is left out must be zero, in a weight on demand."""
    value = next(value for value in ctx.arguments.values() if isinstance(value, Value))
    given = ctx.arguments.get("dim")
    dims = tuple(range(value.rank)) if given is None or given == [] else given if isinstance(given, (list, tuple)) else (given,)
    dims = tuple(sorted({dim % value.rank for dim in dims})) if value.rank else ()
    narrowed = _reduced(ctx, value, dims)
    keepdim = bool(ctx.arguments.get("keepdim", False))
    tracks = narrowed if keepdim else [Track(_dropped(track.code, dims), track.origins) for track in narrowed]
    fake = ctx.node.meta["val"]
    if isinstance(fake, (tuple, list)):
        shape = concrete_shape(fake[0])
        return tuple(make_value(shape, tracks, value.derived) for _ in fake)
    return ctx.free(tracks, value.derived)


def _dropped(code: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    for dim in sorted(dims, reverse=True):
        code = code.squeeze(dim)
    return code


def _reduced(ctx: Context, value: Value, dims: Sequence[int]) -> list[Track]:
    """The tracks that survive, with size 1 along `dims`. A block that is only partly left would have another range, so it goes whole."""
    tracks = []
    for track in value.tracks:
        across = [dim for dim in track.dims if dim in dims]
        if across:
            code = squeezed(track.code)
            if bool(((code & 1) == 0).any()):
                ctx.freeze(Value(value.shape, (track,)), dims, f"crosses {ctx.where}", soft=True)
            if value.derived:
                ctx.ledger.demands.append((track.origins, code.reshape(-1) >> 1))
            if len(across) < len(track.dims):
                ctx.bind(track.code, across)
        tracks.append(Track(narrow_dims(track.code, dims), track.origins))
    return tracks


@rule("torchao::choose_qparams_affine")
def choose_qparams_affine(ctx: Context) -> Any:
    """Scale and zero point per block of `block_size`, from a range that spans zero: min(amin(x), 0) and max(amax(x), 0)."""
    value: Value = ctx["input"]
    shape: list[int] = []
    reduced: list[int] = []
    for size, block in zip(value.shape, ctx["block_size"], strict=True):
        if block not in (1, size):
            shape.append(size // block)
        if block != 1:
            reduced.append(len(shape))
        shape.append(block if block not in (1, size) else size)
    laid = Value(tuple(shape), tuple(Track(compress(t.code.reshape(shape)), t.origins) for t in value.tracks), value.derived)
    tracks = _reduced(ctx, laid, reduced)
    return _parameters(ctx, [Track(_dropped(track.code, reduced), track.origins) for track in tracks], value)


@rule(
    "quantized_decomposed::choose_qparams",
    "quantized_decomposed::choose_qparams_symmetric",
    "quantized_decomposed::choose_qparams_per_token",
    "quantized_decomposed::choose_qparams_per_token_asymmetric",
    "quantized_decomposed::_choose_qparams_per_token_asymmetric_impl",
)
def choose_qparams(ctx: Context) -> Any:
    """For the whole tensor, or for the last dimension of every token; the range spans zero."""
    value: Value = ctx["input"]
    if "per_token" not in ctx.op:
        _reduced(ctx, value, range(value.rank))
        return _parameters(ctx, [], value)
    tracks = _reduced(ctx, value, (value.rank - 1,))
    for track in tracks if ctx.op == "choose_qparams_per_token" else ():
        if track.dims:  # amax(|x|) without a smallest scale: a row of zeros would be divided by zero
            ctx.freeze_all([Value(value.shape, (track,))], f"divides by a value that removal makes zero in {ctx.where}")
    return _parameters(ctx, tracks, value)


def _parameters(ctx: Context, tracks: list[Track], value: Value) -> tuple[Value, ...]:
    """(scale, zero point): neither is zero where x is."""
    plain = [Track(never_zero(compress(track.code)), track.origins) for track in tracks]
    shapes = [concrete_shape(fake) for fake in ctx.node.meta["val"]]
    return tuple(make_value(shape, [Track(track.code.reshape(shape), track.origins) for track in plain], value.derived) for shape in shapes)


# ---- quantizers in plain arithmetic (see geta.graph.rules.affine) ------------------------------------------------------


def _with_place(place: int) -> Rule:
    """x / s or q * s: the result has the labels and zeros of its data."""

    def scaled(ctx: Context) -> Any:
        names = [schema.name for schema in ctx.node.target._schema.arguments[:2]]  # type: ignore[union-attr]
        x, scale = ctx[names[place]], ctx[names[1 - place]]
        if not isinstance(x, Value) or concrete_shape(ctx.node.meta["val"]) != x.shape:
            return pointwise(ctx, _values(x, scale), "or")
        if not isinstance(scale, Value):
            return quantized(ctx, x, [])
        _refuse_zero_scale(ctx, x, scale)
        return quantized(ctx, x, [_trailing(x, scale)])

    return scaled


def inverse(ctx: Context) -> Value:
    """1 / s of a stored scale."""
    return quantized(ctx, ctx["self"], [], keeps_zero=False)


def _refuse_zero_scale(ctx: Context, x: Value, scale: Value) -> None:
    """A range without a smallest scale becomes zero together with its channel, and 0 / 0 is not zero."""
    substance = frozenset(owner for track in x.tracks for owner in track.origins)
    for track in scale.tracks:
        if not scale.derived or track.origins & substance:
            code = squeezed(track.code)
            doomed = (code >> 1)[(code & 1).bool()]
            ctx.constraints.fixed.append((doomed.numpy(), f"divides by a value that removal makes zero in {ctx.where}"))


def _among_codes(places: tuple[int, ...]) -> Rule:
    """Adding or taking off the zero point, and the clamp in between: zero as seen from the zero point."""

    def shifted(ctx: Context) -> Value:
        names = [schema.name for schema in ctx.node.target._schema.arguments[:2]]  # type: ignore[union-attr]
        data = [ctx[names[place]] for place in places]
        others = _values(*[ctx[name] for place, name in enumerate(names) if place not in places])
        if len(data) == 1 and data[0].shape == ctx.shape:
            return quantized(ctx, data[0], [_trailing(data[0], other) for other in others])
        return pointwise(ctx, [*data, *others], "and", by=data)

    return shifted
