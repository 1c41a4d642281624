"""Entries that the graph makes itself. Constant-filled ones can be resized, so they follow whatever they meet."""

from __future__ import annotations

from typing import Any

from torch import fx

from geta.graph.context import Context, expand_to
from geta.graph.labels import Track, Value, along
from geta.graph.rules.registry import rule


@rule("aten::zeros", "aten::ones", "aten::full", "aten::new_zeros", "aten::new_ones", "aten::new_full")
def filled(ctx: Context) -> Value:
    """Fresh labels along every dimension whose size is written in the graph."""
    fill = {"zeros": 0, "new_zeros": 0, "ones": 1, "new_ones": 1}.get(ctx.op, ctx.arguments.get("fill_value"))
    zero = 1 if fill == 0 else 0
    given = ctx.node.args[0 if ctx.op in ("zeros", "ones", "full") else 1]
    tracks = []
    for dim, size in enumerate(ctx.shape):
        written = isinstance(given, (list, tuple)) and not isinstance(given[dim], fx.Node)
        if size > 1 and written:
            labels, _ = ctx.space.new(size, dim, node=ctx.node.name)
            tracks.append(Track(along(2 * labels + zero, ctx.shape, dim)))
    return Value(ctx.shape, tuple(tracks))


@rule(
    "aten::arange",
    "aten::linspace",
    "aten::eye",
    "aten::empty",
    "aten::new_empty",
    "aten::rand",
    "aten::randn",
    "aten::randint",
    "aten::randperm",
    "aten::scalar_tensor",
    "aten::tensor",
    "aten::empty_strided",
    "aten::new_empty_strided",
    "aten::hann_window",
    "aten::normal",
)
def unlabelled(ctx: Context) -> Any:
    """The values depend on the size, so whatever meets them stays."""
    if any(isinstance(value, Value) and value.tracks for value in ctx.arguments.values()):
        return NotImplemented
    return Value(ctx.shape)


@rule("aten::expand", "aten::expand_as", "aten::broadcast_to")
def expands(ctx: Context) -> Value:
    """Copies along a dimension of size 1 get labels of their own: their number follows whatever they are joined with."""
    value, shape = ctx["self"], ctx.shape
    lead = len(shape) - value.rank
    tracks = [Track(expand_to(track.code, value.shape, shape), track.origins) for track in value.tracks]
    for dim, size in enumerate(shape):
        if size > 1 and (dim < lead or value.shape[dim - lead] == 1):
            labels, _ = ctx.space.new(size, dim, node=ctx.node.name)
            tracks.append(Track(along(2 * labels, shape, dim)))
    return ctx.free(tracks, value.derived)
