"""Contractions: sums of products over a shared axis (linear, convolution, matmul, attention, embedding).

Both sides keep the same indices of the summed axis. A removed index must contribute nothing: either one side is zero there
by itself, or the parameters that only read it join the slices to zero. Letters number the axes of one shared index space.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch

from geta.graph.context import INTERNAL, Context, Place, concrete_shape, narrow_dims
from geta.graph.labels import Track, Value, compress, make_value, never_zero, squeezed
from geta.graph.rules.elementwise import pointwise
from geta.graph.rules.registry import rule
from geta.graph.solver import Freeze


def contract(ctx: Context, left: Place, right: Place, out: Sequence[int], shape: Sequence[int], *, joined: int = -1) -> Value:
    """sum over the letters that `out` lacks of left * right; `shape` is the result's shape in the order of `out`.

    joined: a letter along which the operands were bound: what a summed operand leaves along it alone is no unit of the result.
    """
    rank = 1 + max((*left.letters, *right.letters, *out))
    shared = [letter for letter in left.letters if letter in right.letters]
    summed = [letter for letter in shared if letter not in out]
    batch = [letter for letter in shared if letter in out]
    ctx.align((left, right), rank, bound=summed, batch=batch)
    reader, source = (left, right) if left.value.derived and not right.value.derived else (right, left)
    _reads(ctx, reader, source, summed, rank)
    derived = left.value.derived and right.value.derived
    if not derived and reader.value.derived:
        for track in reader.value.tracks:
            if any(reader.letters[dim] in out for dim in track.dims):
                ctx.ledger.producers |= track.origins
    tracks: list[Track] = []
    for place in (left, right):
        laid = [Track(compress(_result(ctx, track, place, out, rank).expand(tuple(shape))), track.origins) for track in place.value.tracks]
        tracks = _joined(tracks, [track for track in laid if track.dims and [out[dim] for dim in track.dims] != [joined]])
    return make_value(shape, _without_subsets(tracks, [place for place, letter in enumerate(out) if letter in batch]), derived)


def _reads(ctx: Context, reader: Place, source: Place, summed: Sequence[int], rank: int) -> None:
    """At a removed summed index somebody must be zero: the source by itself, or the reader, if need be on demand."""
    for track in reader.value.tracks:
        if not any(reader.letters[dim] in summed for dim in track.dims):
            continue
        code = ctx.lay(track.code, reader.letters, rank)
        doubtful = ~_zero_at(ctx, source, code, summed, rank).expand(code.shape)
        if reader.value.derived:
            ctx.ledger.consumers |= track.origins
            ctx.ledger.demands.append((track.origins, code[doubtful] >> 1))
        hopeless = doubtful & ((code & 1) == 0)
        if bool(hopeless.any()):  # only if it varies along the summed axis in the end: a head goes with its whole slice, zero or not
            reason = f"would not be zero where it is summed over in {ctx.where}"
            ctx.constraints.freezes.append(Freeze(Track(code).labels, tuple(summed), reason, only=code[hopeless] >> 1))
    if source.value.derived:
        ctx.produce(source.value)


def _zero_at(ctx: Context, source: Place, code: torch.Tensor, summed: Sequence[int], rank: int) -> torch.Tensor:
    """Where the source is zero if the reader's index is removed, over the letters of the reader's track."""
    found = torch.zeros([1] * rank, dtype=torch.bool)
    for track in source.value.tracks:
        if not any(source.letters[dim] in summed and code.shape[source.letters[dim]] > 1 for dim in track.dims):
            continue
        bit = (ctx.lay(track.code, source.letters, rank) & 1).bool()
        for letter in range(rank):
            if bit.shape[letter] > 1 and code.shape[letter] == 1:
                bit = bit.all(letter, keepdim=True)
        found = found | bit
    return found


def _result(ctx: Context, track: Track, place: Place, out: Sequence[int], rank: int) -> torch.Tensor:
    """An operand's track over the result's axes; summed axes are left at their first index."""
    code = ctx.lay(track.code, place.letters, rank)
    code = narrow_dims(code, [letter for letter in range(rank) if letter not in out and code.shape[letter] > 1])
    rest = [letter for letter in range(rank) if letter not in out]
    return code.permute([*out, *rest]).reshape([code.shape[letter] for letter in out])


def _joined(left: list[Track], right: list[Track]) -> list[Track]:
    """Tracks of both sides along the same axes are aligned, so the left ones speak for both; a product is zero where either factor is."""
    joined = list(left)
    for track in right:
        same = [place for place, other in enumerate(left) if other.dims == track.dims]
        for place in same:
            joined[place] = Track(squeezed_or(joined[place].code, track.code), joined[place].origins | track.origins)
        if not same:
            joined.append(track)
    return joined


def _without_subsets(tracks: list[Track], batch: Sequence[int]) -> list[Track]:
    """A track along batch axes alone is spoken for by one that also varies along an axis of its own (a head's channels)."""
    kept = sorted(tracks, key=lambda track: len(track.dims))
    for track in list(kept):
        wider = [place for place, other in enumerate(kept) if set(track.dims) < set(other.dims) and set(track.dims) <= set(batch)]
        for place in wider:
            kept[place] = Track(squeezed_or(kept[place].code, track.code), kept[place].origins)
        if wider:
            kept = [other for other in kept if other is not track]
    return kept


def squeezed_or(code: torch.Tensor, zero_of: torch.Tensor) -> torch.Tensor:
    """`code` with the zero bits of another track of the same shape added."""
    return (squeezed(code) | (squeezed(zero_of) & 1)).expand(code.shape)


def _add_bias(ctx: Context, value: Value, bias: Value | None, dim: int) -> Value:
    """Add a bias [O] along `dim`."""
    if bias is None:
        return value
    shape = [1] * value.rank
    shape[dim] = bias.shape[0]
    tracks = tuple(Track(track.code.reshape(shape), track.origins) for track in bias.tracks)
    return pointwise(ctx, [value, Value(tuple(shape), tracks, bias.derived)], "and")


@rule("aten::linear")
def linear(ctx: Context) -> Value:
    """y[..., o] = sum_i x[..., i] w[o, i] + b[o]."""
    x, weight = ctx["input"], ctx["weight"]
    lead = tuple(range(2, 1 + x.rank))
    rows = (1,) if weight.rank == 2 else ()
    out = contract(ctx, Place(x, (*lead, 0)), Place(weight, (*rows, 0)), (*lead, *rows), ctx.shape)
    return _add_bias(ctx, out, ctx["bias"], out.rank - 1)


@rule("aten::mm", "aten::bmm", "aten::matmul", "aten::mv", "aten::dot", "aten::vdot")
def matmul(ctx: Context) -> Value:
    """y[..., m, n] = sum_k a[..., m, k] b[..., k, n], leading dimensions broadcast."""
    left, right = (value for value in ctx.arguments.values() if isinstance(value, Value))
    return product(ctx, left, right, ctx.shape)


def product(ctx: Context, left: Value, right: Value, shape: Sequence[int]) -> Value:
    """torch.matmul of two values. Letters: 0 = m, 1 = k, 2 = n, then the leading dimensions, aligned at the right."""
    depth = max(left.rank, right.rank, 2) - 2

    def lead(value: Value) -> tuple[int, ...]:
        return tuple(range(3 + depth - max(0, value.rank - 2), 3 + depth))

    letters_l = (1,) if left.rank == 1 else (*lead(left), 0, 1)
    letters_r = (1,) if right.rank == 1 else (*lead(right), 1, 2)
    out = (*range(3, 3 + depth), *((0,) if left.rank > 1 else ()), *((2,) if right.rank > 1 else ()))
    return contract(ctx, Place(left, letters_l), Place(right, letters_r), out, shape)


@rule("aten::_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_matmul(ctx: Context) -> Any:
    """y[t, n] = sum_k x[t, k] w[e(t), k, n]: rows of x in runs, one run for each expert e. Experts stay, k and n do not have to."""
    values = [value for value in ctx.arguments.values() if isinstance(value, Value)]
    x, weight = values[0], values[1]
    if x.rank != 2 or weight.rank != 3:
        return NotImplemented
    ctx.freeze(x, (0,), f"is divided among experts in {ctx.where}")
    ctx.freeze(weight, (0,), f"is one of several experts in {ctx.where}")
    ctx.freeze_all(values[2:], f"says where an expert's rows begin in {ctx.where}")
    return contract(ctx, Place(x, (3, 0)), Place(weight, (2, 0, 1)), (3, 1), ctx.shape)


@rule("aten::addmm", "aten::baddbmm", "aten::addmv")
def addmm(ctx: Context) -> Value:
    """beta * self + alpha * a @ b."""
    added, left, right = (value for value in ctx.arguments.values() if isinstance(value, Value))
    return pointwise(ctx, [product(ctx, left, right, ctx.shape), added], "and")


@rule("aten::bilinear")
def bilinear(ctx: Context) -> Value:
    """y[..., o] = sum_ij a[..., i] w[o, i, j] b[..., j] + c[o]."""
    left, right, weight = ctx["input1"], ctx["input2"], ctx["weight"]
    lead = tuple(range(3, 2 + left.rank))
    shape = (*left.shape[:-1], weight.shape[0], weight.shape[2])
    half = contract(ctx, Place(left, (*lead, 0)), Place(weight, (1, 0, 2)), (*lead, 1, 2), shape)
    out = contract(ctx, Place(half, (*lead, 1, 2)), Place(right, (*lead, 2)), (*lead, 1), ctx.shape)
    return _add_bias(ctx, out, ctx["bias"], out.rank - 1)


@rule("aten::einsum")
def einsum(ctx: Context) -> Any:
    """Two operands with plain letters; anything wilder is left to its decomposition."""
    operands = ctx["tensors"]
    equation = ctx["equation"].replace(" ", "")
    if len(operands) != 2 or "." in equation or "->" not in equation:
        return NotImplemented
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    if any(len(set(part)) != len(part) for part in (left, right, out)):
        return NotImplemented
    number = {letter: place for place, letter in enumerate(c for c in string.ascii_letters if c in left + right)}
    first, second = (Place(value, tuple(number[c] for c in part)) for value, part in zip(operands, (left, right), strict=True))
    return contract(ctx, first, second, [number[c] for c in out], ctx.shape)


def unfold_dim(value: Value, dim: int, sizes: tuple[int, int]) -> Value:
    """View dimension `dim` as two."""
    shape = (*value.shape[:dim], *sizes, *value.shape[dim + 1 :])
    return Value(shape, tuple(Track(compress(t.code.unflatten(dim, sizes)), t.origins) for t in value.tracks), value.derived)


def bind_dim(ctx: Context, value: Value, dim: int) -> None:
    """Join every track of a value along `dim`."""
    for track in value.tracks:
        if dim in track.dims:
            ctx.bind(track.code, (dim,))


@rule("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution", "aten::_convolution")
def convolution(ctx: Context) -> Value:
    """y[n, g, o, ...] = sum over i, k of x[n, g, i, ...] w[g, o, i, k] + b. Groups keep equal positions, or go as a whole."""
    if ctx.arguments.get("transposed"):
        return _transposed(ctx)
    x, weight, groups = ctx["input"], ctx["weight"], ctx["groups"]
    per_in, per_out = weight.shape[1], weight.shape[0] // groups
    split_w = unfold_dim(weight, 0, (groups, per_out))
    letters = (0, 2, 1)  # of the weight: group, output, input
    return _grouped(ctx, x, split_w, letters, (groups, per_in, per_out))


@rule("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d")
def conv_transpose(ctx: Context) -> Value:
    """As convolution, with the weight stored as [g * i, o, k]."""
    return _transposed(ctx)


def _transposed(ctx: Context) -> Value:
    x, weight, groups = ctx["input"], ctx["weight"], ctx["groups"]
    per_in, per_out = weight.shape[0] // groups, weight.shape[1]
    split_w = unfold_dim(weight, 0, (groups, per_in))
    return _grouped(ctx, x, split_w, (0, 1, 2), (groups, per_in, per_out))


def _grouped(ctx: Context, x: Value, weight: Value, letters: tuple[int, int, int], sizes: tuple[int, int, int]) -> Value:
    """Letters: 0 = group, 1 = input within it, 2 = output within it, 3 = batch, then one for every spatial axis there is."""
    groups, per_in, per_out = sizes
    space = weight.rank - 3
    channel = x.rank - space - 1
    ctx.freeze(x, tuple(range(channel + 1, x.rank)), f"is convolved along space in {ctx.where}")
    ctx.freeze(weight, tuple(range(3, weight.rank)), f"{INTERNAL}a spatial kernel")
    x = unfold_dim(x, channel, (groups, per_in))
    whole = True
    if groups > 1:
        whole = per_in == 1 or per_out == 1 or ctx.granularity == "group"
        bind_dim(ctx, x, channel + 1 if whole else channel)
        for dim, letter in enumerate(letters):
            if (letter > 0) == whole:
                bind_dim(ctx, weight, dim)
    lead = (3,) if channel else ()
    input_space, kernel_space, output_space = (tuple(range(4 + part * space, 4 + (part + 1) * space)) for part in range(3))
    out_shape = ctx.shape
    split_shape = (*out_shape[:channel], groups, per_out, *out_shape[channel + 1 :])
    result = contract(
        ctx,
        Place(x, (*lead, 0, 1, *input_space)),
        Place(weight, (*letters, *kernel_space)),
        (*lead, 0, 2, *output_space),
        split_shape,
        joined=-1 if whole else 0,
    )
    tracks = [Track(compress(t.code).reshape(out_shape), t.origins) for t in result.tracks]
    return _add_bias(ctx, make_value(out_shape, tracks, result.derived), ctx["bias"], channel)


@rule("aten::scaled_dot_product_attention")
def attention(ctx: Context) -> Value:
    """softmax(q k^T * scale + mask) v, as the two products that it is: heads fall out of the batch axis."""
    query, key, value = ctx["query"], ctx["key"], ctx["value"]
    if ctx.arguments.get("enable_gqa") and query.rank > 2:
        key, value = (_repeat_heads(side, query.shape[-3]) for side in (key, value))
    swapped = tuple(Track(track.code.transpose(-1, -2), track.origins) for track in key.tracks)
    turned = Value((*key.shape[:-2], key.shape[-1], key.shape[-2]), swapped, key.derived)
    scores_shape = (*ctx.shape[:-1], key.shape[-2])
    scores = product(ctx, query, turned, scores_shape)
    mask = ctx.arguments.get("attn_mask")
    if mask is not None:
        scores = _masked(ctx, scores, mask)
    ctx.freeze(scores, (-1,), f"crosses the softmax of {ctx.where}")
    ctx.freeze(value, (-2,), f"crosses the softmax of {ctx.where}")
    weights = Value(scores.shape, tuple(Track(never_zero(track.code), track.origins) for track in scores.tracks), scores.derived)
    return product(ctx, weights, value, ctx.shape)


def _repeat_heads(value: Value, heads: int) -> Value:
    if value.shape[-3] == 1:  # one key for all queries is broadcast, whatever their number
        return value
    times = heads // value.shape[-3]
    tracks = tuple(Track(compress(track.code.repeat_interleave(times, -3)), track.origins) for track in value.tracks)
    return Value((*value.shape[:-3], heads, *value.shape[-2:]), tracks, value.derived)


def _masked(ctx: Context, scores: Value, mask: Value) -> Value:
    rank = scores.rank
    ctx.align([Place(scores, tuple(range(rank))), Place(mask, tuple(range(rank - mask.rank, rank)))], rank)
    ctx.produce(mask)
    return scores


@rule("aten::embedding")
def embedding(ctx: Context) -> Value:
    """Rows are looked up by index, so they stay; columns become the last dimension of the result."""
    weight = ctx["weight"]
    ctx.freeze(weight, (0,), f"is looked up by index in {ctx.where}")
    ctx.freeze_all([ctx["indices"]], f"is used as an index in {ctx.where}")
    ctx.produce(weight)
    for track in weight.tracks:
        if track.dims == (0,):
            ctx.constraints.units.append((squeezed(track.labels).reshape(-1).numpy(), "rows"))
    tracks = []
    for track in weight.tracks:
        column = narrow_dims(track.code, (0,)).reshape(-1)
        tracks.append(Track(column.expand(ctx.shape), track.origins))
    return ctx.free(tracks, weight.derived and ctx["indices"].derived)


@rule("aten::embedding_bag", "aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(ctx: Context) -> Any:
    """Sums, means or maxima of rows that are looked up by index: rows stay, columns become the last dimension of the result."""
    weight = ctx["weight"]
    ctx.freeze(weight, (0,), f"is looked up by index in {ctx.where}")
    lookups = [ctx["indices"], ctx["offsets"], ctx.arguments.get("per_sample_weights")]
    ctx.freeze_all([value for value in lookups if isinstance(value, Value)], f"is used as an index in {ctx.where}")
    ctx.produce(weight)
    shapes = [concrete_shape(fake) for fake in ctx.node.meta["val"]]
    tracks = [Track(narrow_dims(t.code, (0,)).reshape(-1).expand(shapes[0]), t.origins) for t in weight.tracks]
    # which rows were the largest: one number per bag and column, and a row number is no zero
    places = [Track(never_zero(t.code), t.origins) for t in tracks] if shapes[3] == shapes[0] else []
    derived = weight.derived and ctx["indices"].derived
    found = [tracks, [], [], places]
    return [make_value(shape, parts, derived) for shape, parts in zip(shapes, found, strict=True)]
