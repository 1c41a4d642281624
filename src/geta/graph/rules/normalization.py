"""Normalisation layers. Per-channel ones couple; those that run over the labelled dimension keep it whole (or are inexact)."""

from __future__ import annotations

from typing import Any

from geta.graph.context import Context, Place, concrete_shape
from geta.graph.labels import Track, Value, compress, squeezed
from geta.graph.rules.contraction import bind_dim, unfold_dim
from geta.graph.rules.registry import rule


def _affine(ctx: Context, channel: int, others: list[Value]) -> Value:
    """Couple x with its per-channel parameters; a channel whose weight and bias are zero is zero whatever it was."""
    x, weight, bias = ctx["input"], ctx["weight"], ctx["bias"]
    trained = [value for value in (weight, bias) if value is not None]
    places = [Place(x, tuple(range(x.rank))), *[Place(value, (channel,)) for value in (*trained, *others)]]
    ctx.align(places, x.rank)
    ctx.produce(*trained)
    forced = weight is not None and bias is not None and bool(weight.tracks) and bool(bias.tracks)
    tracks = []
    for track in x.tracks:
        code = squeezed(track.code)
        if forced and track.dims == (channel,):
            code = code | 1
        elif bias is not None or (others and not forced):
            code = code >> 1 << 1
        tracks.append(Track(code.expand(track.code.shape), track.origins))
    if not x.tracks and trained and trained[0].tracks:
        return Value(x.shape)
    return Value(x.shape, tuple(tracks), x.derived and all(value.derived for value in trained))


def _result(ctx: Context, value: Value) -> Any:
    fake = ctx.node.meta["val"]
    if isinstance(fake, (tuple, list)):
        return (value, *[Value(concrete_shape(item)) for item in fake[1:]])
    return value


@rule("aten::batch_norm", "aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::cudnn_batch_norm", "aten::instance_norm")
def batch_norm(ctx: Context) -> Any:
    """(x - mean) / std * weight + bias per channel of dimension 1. Running statistics follow but are never zeroed."""
    running = [ctx.arguments.get("running_mean"), ctx.arguments.get("running_var")]
    x = ctx["input"]
    ctx.freeze(x, tuple(range(2, x.rank)), f"crosses {ctx.where}")
    stats = [value for value in running if isinstance(value, Value)]
    return _result(ctx, _affine(ctx, 1, stats))


@rule("aten::group_norm", "aten::native_group_norm")
def group_norm(ctx: Context) -> Any:
    """Normalises over the channels of each group, so a group goes as a whole."""
    x = ctx["input"]
    groups = ctx.arguments.get("num_groups", ctx.arguments.get("group"))
    ctx.freeze(x, tuple(range(2, x.rank)), f"crosses {ctx.where}")
    grouped = unfold_dim(x, 1, (groups, x.shape[1] // groups))
    bind_dim(ctx, grouped, 2)
    if x.shape[1] > groups:
        for track in grouped.tracks:
            ctx.constraints.units.append((squeezed(track.labels).reshape(-1).numpy(), "norm groups"))
    return _result(ctx, _affine(ctx, 1, []))


@rule("aten::layer_norm", "aten::native_layer_norm", "aten::rms_norm", "aten::_fused_rms_norm")
def layer_norm(ctx: Context) -> Any:
    """Normalises over the trailing dimensions: removing part of them is inexact."""
    x = ctx["input"]
    count = len(ctx["normalized_shape"])
    dims = tuple(range(x.rank - count, x.rank))
    ctx.freeze(x, dims, f"crosses {ctx.where}", soft=True)
    trained = [value for value in (ctx.arguments.get("weight"), ctx.arguments.get("bias")) if isinstance(value, Value)]
    places = [Place(x, tuple(range(x.rank))), *[Place(value, dims) for value in trained]]
    ctx.align(places, x.rank)
    ctx.produce(*trained)
    keeps = ctx.arguments.get("bias") is None
    tracks = []
    for track in x.tracks:
        code = squeezed(compress(track.code))
        inside = set(track.dims) <= set(dims) and bool(trained)
        code = code | 1 if inside else (code if keeps else code >> 1 << 1)
        tracks.append(Track(code.expand(track.code.shape), track.origins))
    return _result(ctx, Value(x.shape, tuple(tracks), x.derived and all(value.derived for value in trained)))
