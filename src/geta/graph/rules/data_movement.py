"""Data movement needs no rules of its own: the very same operator runs on the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from geta.graph.context import Context, Place, concrete_shape, narrow_dims
from geta.graph.labels import FIXED, Track, Value, compress, make_value, squeezed, varying
from geta.graph.rules.elementwise import pointwise
from geta.graph.rules.registry import rule
from geta.graph.solver import Freeze

_MOVES = """view reshape _unsafe_view _reshape_alias permute transpose t numpy_T mT swapaxes swapdims movedim moveaxis unsqueeze squeeze
flatten unflatten repeat tile flip pixel_unshuffle atleast_1d atleast_2d atleast_3d""".split()


@rule(*[f"aten::{name}" for name in _MOVES])
def moves(ctx: Context) -> Any:
    """Run the operator on every track."""
    if "dtype" in ctx.arguments:
        return NotImplemented  # view.dtype reinterprets bits
    name = next(name for name, value in ctx.arguments.items() if isinstance(value, Value))
    value = ctx[name]
    moved = [_run(ctx, name, track) for track in value.tracks]
    return ctx.free(_unfolded(ctx, value, moved), value.derived)


def _unfolded(ctx: Context, value: Value, moved: list[Track]) -> list[Track]:
    """Independent dimensions that a view folds into one can't both lose indices: the outer one may, the others stay.

    E.g. heads that all read one value head: entry (h, j) of the folded dimension would go with head h or with channel j.
    """
    before = [track.dims for track in value.tracks]
    after = [varying(compress(track.code)) for track in moved]
    result: list[int] = []
    for place in sorted(range(len(moved)), key=lambda place: (not ctx.space.of_tensor(value.tracks[place].code), before[place])):
        if any(set(after[place]) & set(after[other]) and not set(before[place]) & set(before[other]) for other in result):
            reason = f"is folded together with an independent dimension in {ctx.where}"
            ctx.freeze(Value(value.shape, (value.tracks[place],)), before[place], reason)
        else:
            result.append(place)
    return [moved[place] for place in sorted(result)]


@rule("aten::view_as", "aten::reshape_as")
def moves_as(ctx: Context) -> Value:
    """view to another tensor's shape."""
    value = ctx["self"]
    return ctx.free([Track(track.code.reshape(ctx.shape), track.origins) for track in value.tracks], value.derived)


def _run(ctx: Context, name: str, track: Track) -> Track:
    arguments = {key: track.code if key == name else value for key, value in ctx.arguments.items()}
    if ctx.op in ("view", "_unsafe_view", "_reshape_alias"):  # labels are laid out in memory differently than the data
        return Track(_reshaped(track.code, ctx["size"]), track.origins)
    return Track(call(ctx.node.target, arguments), track.origins)


def _reshaped(code: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """`code.reshape(size)`, without writing out a leading dimension along which nothing varies and that the view leaves alone."""
    same = next((dim for dim, (old, new) in enumerate(zip(code.shape, size, strict=False)) if old != new), 0)
    flat = [dim for dim in range(same) if code.stride(dim) == 0 and code.shape[dim] > 1]
    if not flat:
        return code.reshape(tuple(size))
    small = code
    for dim in flat:
        small = small.narrow(dim, 0, 1)
    wanted = [1 if dim in flat else number for dim, number in enumerate(size)]
    return small.reshape(wanted).expand([*code.shape[:same], *[-1] * (len(size) - same)])


def call(target: Any, arguments: dict[str, Any]) -> Any:
    """Call an operator by argument names, positional where the schema wants it."""
    positional, keyword = [], {}
    for argument in target._schema.arguments:
        if argument.name in arguments:
            if argument.kwarg_only:
                keyword[argument.name] = arguments[argument.name]
            else:
                positional.append(arguments[argument.name])
    return target(*positional, **keyword)


@rule("aten::pixel_shuffle", "aten::channel_shuffle", "aten::native_channel_shuffle")
def shuffles(ctx: Context) -> Value:
    """Hidden views: the r * r parts of a channel belong together, and so do equal positions of all shuffled groups."""
    value = ctx["self"]
    channel = value.rank - 3 if ctx.op == "pixel_shuffle" else 1
    for track in value.tracks:
        moved = track.code.movedim(channel, 0)
        if ctx.op == "pixel_shuffle":
            ctx.bind(compress(moved.reshape(-1, ctx["upscale_factor"] ** 2, *moved.shape[1:])), (1,))
        else:
            ctx.bind(compress(moved.reshape(ctx["groups"], -1, *moved.shape[1:])), (0,))
    return ctx.free([_run(ctx, "self", track) for track in value.tracks], value.derived)


@rule("aten::repeat_interleave")
def repeat_interleave(ctx: Context) -> Any:
    """With a fixed count; counts given by a tensor have no rule."""
    if not isinstance(ctx.arguments.get("repeats"), int):
        return NotImplemented
    return ctx.free([_run(ctx, "self", track) for track in ctx["self"].tracks], ctx["self"].derived)


@rule("aten::roll")
def roll(ctx: Context) -> Any:
    """A rotation; a roll of the flattened tensor (no dims) has no rule."""
    if not ctx["dims"] and ctx["self"].rank > 1:
        return NotImplemented
    return ctx.free([_run(ctx, "self", track) for track in ctx["self"].tracks], ctx["self"].derived)


@rule("aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::unsafe_split", "aten::unsafe_chunk")
def splits(ctx: Context) -> Any:
    """Pieces along one dimension."""
    value, dim = ctx["self"], ctx["dim"] % ctx["self"].rank
    pieces: list[list[Track]] = [[] for _ in ctx.node.meta["val"]]
    for track in value.tracks:
        for piece, code in zip(pieces, _run(ctx, "self", track).code, strict=True):
            keep_single(ctx, track.code, code, dim)
            piece.append(Track(code, track.origins))
    shapes = [concrete_shape(fake) for fake in ctx.node.meta["val"]]
    return [make_value(shape, tracks, value.derived) for shape, tracks in zip(shapes, pieces, strict=True)]


def keep_single(ctx: Context, before: torch.Tensor, after: torch.Tensor, dim: int) -> None:
    """A single index picked out of a labelled dimension is used by itself, so it must stay."""
    if after.dim() == before.dim() and after.shape[dim] != 1:
        return
    track = Track(compress(before))
    if dim in track.dims:
        reason = f"is picked out by itself in {ctx.where}"
        ctx.constraints.freezes.append(Freeze(track.labels, (dim,), reason, only=squeezed(compress(after)) >> 1))


@rule("aten::slice", "aten::narrow", "aten::select")
def slices(ctx: Context) -> Any:
    """Part of one dimension; steps other than 1 keep a labelled dimension whole."""
    value, dim = ctx["self"], ctx["dim"] % ctx["self"].rank
    if isinstance(ctx.arguments.get("start"), Value) or isinstance(ctx.arguments.get("index"), Value):
        ctx.freeze(value, (dim,), f"is sliced at a computed position in {ctx.where}")
    step = ctx.arguments.get("step", 1)
    if step != 1 and not _whole_steps(ctx, value, dim):
        ctx.freeze(value, (dim,), f"is sliced with a step in {ctx.where}")
    elif step != 1:
        for track in value.tracks:  # what lies between two picked entries goes with them, so that the step still fits
            if dim in track.dims:
                ctx.bind(compress(track.code.unflatten(dim, (-1, step))), (dim + 1,))
    tracks = []
    for track in value.tracks:
        moved = _run(ctx, "self", track)
        keep_single(ctx, track.code, moved.code, dim)
        tracks.append(moved)
    return ctx.free(tracks, value.derived)


@rule("aten::unfold")
def windows(ctx: Context) -> Value:
    """Sliding windows along one dimension, which therefore stays whole; every window has the same labels elsewhere."""
    value, dim = ctx["self"], ctx["dimension"] % max(ctx["self"].rank, 1)
    ctx.freeze(value, (dim,), f"is read through sliding windows in {ctx.where}")
    return ctx.free([_run(ctx, "self", Track(narrow_dims(t.code, (dim,)).expand(value.shape))) for t in value.tracks], value.derived)


@rule("aten::im2col", "aten::col2im")
def columns(ctx: Context) -> Value:
    """F.unfold / F.fold: channel c becomes (or is made of) the k * k rows c * k * k ... of the columns."""
    value, cells = ctx["self"], math.prod(ctx["kernel_size"])
    channel = 1 if value.rank > (3 if ctx.op == "im2col" else 2) else 0
    space = tuple(range(channel + 1, value.rank))
    ctx.freeze(value, space, f"is read through sliding windows in {ctx.where}")
    tracks = []
    for track in value.tracks:
        code = narrow_dims(track.code, space)
        line = code.reshape(*code.shape[: channel + 1])
        if ctx.op == "im2col":
            line = line.repeat_interleave(cells, channel)
        else:
            parts = line.unflatten(channel, (-1, cells))
            ctx.bind(compress(parts), (channel + 1,))
            line = narrow_dims(parts, (channel + 1,)).squeeze(channel + 1)
        tracks.append(Track(line.reshape(*line.shape, *[1] * (len(ctx.shape) - line.dim())).expand(ctx.shape), track.origins))
    return ctx.free(tracks, value.derived)


def _whole_steps(ctx: Context, value: Value, dim: int) -> bool:
    """Whether a slice with a step takes one entry out of every run of `step` entries, all runs being full."""
    start, end, step, size = ctx.arguments.get("start") or 0, ctx.arguments.get("end"), ctx["step"], value.shape[dim]
    known = isinstance(start, int) and (end is None or isinstance(end, int))
    return known and size % step == 0 and 0 <= start < step and (end is None or end >= size)


@rule("aten::cat", "aten::concat", "aten::concatenate")
def cat(ctx: Context) -> Value:
    """Joins operands along one dimension; along the others they keep the same indices."""
    whole = [value for value in ctx.arguments["tensors"] if value.shape != (0,)]
    dim = ctx["dim"] % whole[0].rank
    # What adds no entry has none to lose either (the unrotated rest of a head that is rotated whole).
    operands = [value for value in whole if value.shape[dim] > 0] or whole
    return _join(ctx, operands, dim)


@rule("aten::stack")
def stack(ctx: Context) -> Value:
    """cat along a new dimension."""
    operands = ctx["tensors"]
    dim = ctx["dim"] % (operands[0].rank + 1)
    widened = []
    for value in operands:
        tracks = [Track(track.code.unsqueeze(dim), track.origins) for track in value.tracks]
        shape = (*value.shape[:dim], 1, *value.shape[dim:])
        widened.append(Value(shape, tuple(tracks), value.derived))
    return _join(ctx, widened, dim)


def _join(ctx: Context, operands: Sequence[Value], dim: int) -> Value:
    rank = operands[0].rank
    # Along `dim` every operand has indices of its own: a private letter each.
    places = [Place(value, tuple(rank + number if d == dim else d for d in range(rank))) for number, value in enumerate(operands)]
    ctx.align(places, rank + len(operands))
    derived = all(value.derived for value in operands)
    if not derived:
        ctx.produce(*[value for value in operands if value.derived])
    tracks: list[Track] = []
    private = [[track for track in value.tracks if dim in track.dims] for value in operands]
    for slot in range(max(len(mine) for mine in private)):
        parts = []
        origins = frozenset[int]()
        for value, mine in zip(operands, private, strict=True):
            code = mine[slot].code if slot < len(mine) else torch.full((1,), 2 * FIXED, dtype=torch.int64).expand(value.shape)
            origins |= mine[slot].origins if slot < len(mine) else frozenset()
            parts.append(code)
        tracks.append(Track(torch.cat(parts, dim), origins))
    tracks += _shared(operands, dim, ctx.shape)
    return ctx.free(tracks, derived)


def _shared(operands: Sequence[Value], dim: int, shape: tuple[int, ...]) -> list[Track]:
    """Tracks along the other dimensions: labels of the operand that has most; zero where every operand is."""
    sides = [[track for track in value.tracks if dim not in track.dims] for value in operands]
    found = []
    for dims in dict.fromkeys(track.dims for side in sides for track in side):
        same = [[track for track in side if track.dims == dims] for side in sides]
        bit = torch.ones(1, dtype=torch.int64)
        for side in same:
            for one in [squeezed(track.code.narrow(dim, 0, 1)) & 1 for track in side] or [bit & 0]:
                bit = bit & one
        origins = frozenset(owner for side in same for track in side for owner in track.origins)
        for track in max(same, key=len):
            code = squeezed(track.code.narrow(dim, 0, 1))
            found.append(Track((code.bitwise_and(-2) | bit).expand(shape), origins))
    return found


@rule(
    "aten::constant_pad_nd",
    "aten::pad",
    "aten::reflection_pad1d",
    "aten::reflection_pad2d",
    "aten::reflection_pad3d",
    "aten::replication_pad1d",
    "aten::replication_pad2d",
    "aten::replication_pad3d",
)
def pad(ctx: Context) -> Value:
    """New entries get labels of their own, so that the amounts of padding follow whatever they are joined with."""
    value = ctx["self"]
    amounts = list(ctx.arguments.get("pad") or ctx.arguments["padding"])
    constant = ctx.op == "constant_pad_nd" or ctx.arguments.get("mode", "reflect") == "constant"
    fill = (ctx.arguments.get("value") or 0) if constant else None
    padded = {value.rank - 1 - place: (amounts[2 * place], amounts[2 * place + 1]) for place in range(len(amounts) // 2)}
    padded = {dim: both for dim, both in padded.items() if both != (0, 0)}
    tracks = []
    for track in value.tracks:
        code = track.code
        for dim, (before, after) in padded.items():
            code = _pad_dim(ctx, code, dim, (before, after), fill)
        tracks.append(Track(code, track.origins))
    if not constant:
        ctx.freeze(value, tuple(padded), f"is mirrored by {ctx.where}")
    return ctx.free(tracks, value.derived)


def _pad_dim(ctx: Context, code: torch.Tensor, dim: int, amounts: tuple[int, int], fill: float | None) -> torch.Tensor:
    before, after = amounts
    if before < 0 or after < 0:  # negative padding crops
        start = max(0, -before)
        code = code.narrow(dim, start, code.shape[dim] - start - max(0, -after))
        before, after = max(0, before), max(0, after)
    zero = 1 if fill == 0 else 0
    shape = list(code.shape)
    small = squeezed(compress(code))
    if dim not in varying(compress(code)):
        shape[dim] += before + after
        keeps = fill is None or fill == 0
        return (small if keeps else small >> 1 << 1).expand(shape)
    parts = [code]
    for count, place in ((before, 0), (after, 1)):
        if count:
            labels, _ = ctx.space.new(count, dim, node=ctx.node.name)
            view = [1] * code.dim()
            view[dim] = count
            size = list(code.shape)
            size[dim] = count
            parts.insert(0 if place == 0 else len(parts), (2 * labels + zero).reshape(view).expand(size))
    return torch.cat(parts, dim)


@rule("aten::glu")
def glu(ctx: Context) -> Value:
    """a * sigmoid(b), the halves of one dimension."""
    value, dim = ctx["self"], ctx["dim"] % ctx["self"].rank
    half = value.shape[dim] // 2
    shape = (*value.shape[:dim], half, *value.shape[dim + 1 :])
    left = make_value(shape, [Track(t.code.narrow(dim, 0, half), t.origins) for t in value.tracks], value.derived)
    right = make_value(shape, [Track(t.code.narrow(dim, half, half), t.origins) for t in value.tracks], value.derived)
    return pointwise(ctx, [left, right], "keep", by=[left])


@rule("aten::meshgrid", "aten::broadcast_tensors")
def unlabelled_lists(ctx: Context) -> Any:
    """Only for tensors without labels (position grids)."""
    if any(value.tracks for value in pytree.tree_leaves(ctx["tensors"])):
        return NotImplemented
    return [Value(concrete_shape(fake)) for fake in ctx.node.meta["val"]]
