"""Weights that are computed from stored tensors: weight norm. (Spectral norm and the like are made of ordinary operators.)"""

from __future__ import annotations

from typing import Any

from geta.graph.context import INTERNAL, Context, Place, concrete_shape
from geta.graph.labels import Track, Value, squeezed
from geta.graph.rules.registry import rule


@rule("aten::_weight_norm", "aten::_weight_norm_interface")
def weight_norm(ctx: Context) -> Any:
    """w = g * v / ||v||, one norm per index of `dim` (dim = -1: one for the whole tensor).

    Along `dim`, g makes the units: v is only cut, because a norm over zeros divides by zero. Along the other dimensions
    v must be zero where something is removed, so that it adds nothing to the norms.
    """
    v, g = ctx["v"], ctx["g"]
    per_unit = (ctx["dim"],) if ctx["dim"] >= 0 else ()
    ctx.align([Place(v, tuple(range(v.rank))), Place(g, tuple(range(v.rank - g.rank, v.rank)))], v.rank)
    scale = {track.dims: track for track in g.tracks}
    tracks = []
    for track in v.tracks:
        if track.dims == per_unit:
            mine = scale.get(track.dims)
            zero = squeezed(mine.code) & 1 if mine is not None else 0
            code = (squeezed(track.code) >> 1 << 1) | zero
            tracks.append(Track(code.expand(track.code.shape), mine.origins if mine is not None else frozenset()))
        elif v.rank > 2 and min(track.dims) > 1:
            ctx.freeze(Value(v.shape, (track,)), track.dims, f"{INTERNAL}a spatial kernel")
            tracks.append(track)
        else:
            labels = squeezed(track.labels).reshape(-1)
            if track.origins:
                ctx.ledger.demands.append((track.origins, labels))
            else:
                ctx.freeze(Value(v.shape, (track,)), track.dims, f"crosses the weight norm of {ctx.path or 'the model itself'}")
            tracks.append(track)
    weight = Value(v.shape, tuple(tracks), v.derived and g.derived)
    fake = ctx.node.meta["val"]
    return (weight, Value(concrete_shape(fake[1]))) if isinstance(fake, (tuple, list)) else weight
