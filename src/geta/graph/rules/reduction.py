"""Reductions, softmax, pooling, indexing: what must see a dimension whole keeps it whole."""

from __future__ import annotations

from typing import Any

import torch

from geta.graph.context import Context, Place, concrete_shape, narrow_dims
from geta.graph.labels import Track, Value, compress, never_zero, squeezed
from geta.graph.rules.data_movement import call
from geta.graph.rules.elementwise import pointwise
from geta.graph.rules.registry import rule


def _dims(ctx: Context, value: Value) -> tuple[int, ...]:
    given = ctx.arguments.get("dim", ctx.arguments.get("normalized_shape"))
    if given is None or given == []:
        return tuple(range(value.rank))
    dims = given if isinstance(given, (list, tuple)) else [given]
    return tuple(sorted({dim % value.rank for dim in dims}))


def _reduced(ctx: Context, value: Value, dims: tuple[int, ...], *, keeps_zero: bool) -> Any:
    """The tracks that survive a reduction over `dims`."""
    keepdim = bool(ctx.arguments.get("keepdim", False))
    tracks = []
    for track in value.tracks:
        code = narrow_dims(track.code, dims)
        if not keepdim:
            for dim in reversed(dims):
                code = code.squeeze(dim)
        tracks.append(Track(code if keeps_zero else never_zero(code), track.origins))
    fake = ctx.node.meta["val"]
    if isinstance(fake, (tuple, list)):
        shape = concrete_shape(fake[0])
        plain = Value(shape, tuple(Track(compress(t.code), t.origins) for t in tracks), value.derived)
        return tuple(
            Value(plain.shape, tuple(Track(never_zero(t.code), t.origins) for t in plain.tracks)) if place else plain
            for place in range(len(fake))
        )
    return ctx.free(tracks, value.derived)


@rule(
    "aten::mean",
    "aten::amax",
    "aten::amin",
    "aten::max",
    "aten::min",
    "aten::var",
    "aten::std",
    "aten::median",
    "aten::any",
    "aten::var_mean",
    "aten::std_mean",
)
def statistics(ctx: Context) -> Any:
    """Fewer entries would change the result, unless the whole reduced slice goes (a head). f(0, ..., 0) = 0."""
    value = next(value for value in ctx.arguments.values() if isinstance(value, Value))
    if isinstance(ctx.arguments.get("other"), Value):
        return pointwise(ctx, [ctx["self"], ctx["other"]], "and")
    dims = _dims(ctx, value)
    ctx.freeze(value, dims, f"crosses {ctx.where}", soft=True)
    return _reduced(ctx, value, dims, keeps_zero=True)


@rule("aten::sum", "aten::count_nonzero")
def sums(ctx: Context) -> Any:
    """Zeros add nothing; entries that would not be zero must stay."""
    value = ctx["self"]
    dims = _dims(ctx, value)
    for track in value.tracks:
        code = squeezed(track.code)
        if set(track.dims) & set(dims) and bool(((code & 1) == 0).any()):
            ctx.freeze(Value(value.shape, (track,)), dims, f"is summed over while not zero in {ctx.where}")
    return _reduced(ctx, value, dims, keeps_zero=True)


@rule("aten::norm", "aten::linalg_vector_norm")
def norms(ctx: Context) -> Any:
    """Zeros add nothing to a norm of order >= 0; other entries would change it."""
    value = ctx["self"]
    dims = _dims(ctx, value)
    order = ctx.arguments.get("ord", ctx.arguments.get("p"))
    for track in value.tracks:
        bits = squeezed(track.code) & 1
        if set(track.dims) & set(dims) and (bool((bits == 0).any()) or (order is not None and order < 0)):
            ctx.freeze(Value(value.shape, (track,)), dims, f"crosses {ctx.where}", soft=True)
    return _reduced(ctx, value, dims, keeps_zero=True)


@rule("aten::prod", "aten::all", "aten::argmax", "aten::argmin", "aten::logsumexp")
def folds(ctx: Context) -> Any:
    """As statistics, but not zero of zeros."""
    value = ctx["self"]
    dims = _dims(ctx, value)
    ctx.freeze(value, dims, f"crosses {ctx.where}")
    return _reduced(ctx, value, dims, keeps_zero=False)


@rule(
    "aten::softmax",
    "aten::_softmax",
    "aten::log_softmax",
    "aten::_log_softmax",
    "aten::_safe_softmax",
    "aten::cumsum",
    "aten::cumprod",
    "aten::logcumsumexp",
    "aten::sort",
    "aten::argsort",
    "aten::diff",
)
def along_one(ctx: Context) -> Any:
    """Keeps its shape; the dimension it runs along must stay."""
    value = ctx["self"]
    dims = (ctx["dim"] % value.rank,) if value.rank else ()
    if ctx.op == "diff" and value.tracks:
        return NotImplemented
    ctx.freeze(value, dims, f"crosses {ctx.where}")
    tracks = tuple(Track(never_zero(track.code), track.origins) for track in value.tracks)
    fake = ctx.node.meta["val"]
    if isinstance(fake, (tuple, list)):
        return tuple(Value(value.shape, tracks, value.derived) for _ in fake)
    return ctx.free(tracks, value.derived)


_POOLS = {f"aten::{name}{n}d": n for n in (1, 2, 3) for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")}
_POOLS |= {
    "aten::max_pool2d_with_indices": 2,
    "aten::_adaptive_avg_pool2d": 2,
    "aten::upsample_nearest1d": 1,
    "aten::upsample_nearest2d": 2,
    "aten::upsample_nearest3d": 3,
    "aten::upsample_bilinear2d": 2,
    "aten::upsample_bicubic2d": 2,
    "aten::upsample_linear1d": 1,
    "aten::_upsample_bilinear2d_aa": 2,
    "aten::_upsample_bicubic2d_aa": 2,
    "aten::upsample_trilinear3d": 3,
}


@rule(*_POOLS)
def pooling(ctx: Context) -> Any:
    """Works channel by channel; spatial dimensions stay. Zero channels stay zero."""
    value = next(value for value in ctx.arguments.values() if isinstance(value, Value))
    dims = tuple(range(value.rank - _POOLS[ctx.node.target._schema.name], value.rank))  # type: ignore[union-attr]
    ctx.freeze(value, dims, f"is pooled along space in {ctx.where}")
    fakes = ctx.node.meta["val"]
    shape = concrete_shape(fakes[0] if isinstance(fakes, (tuple, list)) else fakes)
    tracks = tuple(Track(compress(narrow_dims(track.code, dims).expand(shape)), track.origins) for track in value.tracks)
    result = Value(shape, tracks, value.derived)
    if not isinstance(fakes, (tuple, list)):
        return result
    places = tuple(Track(never_zero(track.code), track.origins) for track in tracks)  # where the maximum lies is no zero
    return result, Value(shape, places)


@rule("aten::index")
def index(ctx: Context) -> Any:
    """Advanced indexing: the indexed dimensions stay, the others pass."""
    value, indices = ctx["self"], list(ctx["indices"])
    ctx.freeze_all([item for item in indices if isinstance(item, Value)], f"is used as an index in {ctx.where}")
    fakes = ctx.node.args[1]
    masks = [isinstance(fake, torch.fx.Node) and fake.meta["val"].dtype in (torch.bool, torch.uint8) for fake in fakes]  # type: ignore[union-attr]
    if any(masks):
        return _masked(ctx) if masks == [True] else NotImplemented
    dims = tuple(dim for dim, item in enumerate(indices) if item is not None)
    ctx.freeze(value, dims, f"is indexed in {ctx.where}")
    ctx.produce(value)
    plain = [None if item is None else torch.zeros(item.shape, dtype=torch.int64) for item in indices]
    tracks = [
        Track(call(ctx.node.target, {"self": narrow_dims(t.code, dims).expand(value.shape), "indices": plain}), t.origins)
        for t in value.tracks
    ]
    return ctx.free(tracks, value.derived and all(item.derived for item in indices if item is not None))


def _masked(ctx: Context) -> Value:
    """value[mask] with a mask over the leading dimensions: they become one, and the others pass."""
    value, mask = ctx["self"], ctx["indices"][0]
    lead = tuple(range(mask.rank))
    ctx.freeze(value, lead, f"is indexed in {ctx.where}")
    tracks = []
    for track in value.tracks:
        code = narrow_dims(track.code, lead)
        tracks.append(Track(code.reshape(1, *code.shape[mask.rank :]).expand(ctx.shape), track.origins))
    return ctx.free(tracks, value.derived and mask.derived)


@rule("aten::index_select")
def index_select(ctx: Context) -> Value:
    """The indexed dimension stays, the others pass."""
    value, dim = ctx["self"], ctx["dim"] % ctx["self"].rank
    ctx.freeze_all([ctx["index"]], f"is used as an index in {ctx.where}")
    ctx.freeze(value, (dim,), f"is indexed in {ctx.where}")
    tracks = [Track(narrow_dims(t.code, (dim,)).expand(ctx.shape), t.origins) for t in value.tracks]
    return ctx.free(tracks, value.derived and ctx["index"].derived)


@rule("aten::gather", "aten::take_along_dim")
def gather(ctx: Context) -> Any:
    """out[.., j, ..] = x[.., index[.., j, ..], ..]: the gathered dimension stays, along the others both keep the same indices."""
    value, places, dim = ctx["self"], ctx.arguments.get("index", ctx.arguments.get("indices")), ctx.arguments["dim"]
    if dim is None or any(d != dim % value.rank and value.shape[d] != places.shape[d] for d in range(value.rank)):
        return NotImplemented  # a smaller index reads only the first entries of the other dimensions
    dim %= value.rank
    ctx.freeze(value, (dim,), f"is gathered by index in {ctx.where}")
    ctx.freeze(places, (dim,), f"is used as an index in {ctx.where}")
    letters = tuple(value.rank if d == dim else d for d in range(value.rank))
    ctx.align([Place(value, tuple(range(value.rank))), Place(places, letters)], value.rank + 1)
    tracks = [Track(narrow_dims(t.code, (dim,)).expand(ctx.shape), t.origins) for t in value.tracks]
    return ctx.free(tracks, value.derived and places.derived)
