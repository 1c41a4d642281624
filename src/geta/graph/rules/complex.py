"""Complex numbers and Fourier transforms: real and imaginary part of an entry live and die together."""

from __future__ import annotations

from typing import Any

from geta.graph.context import Context, narrow_dims
from geta.graph.labels import Track, Value, compress
from geta.graph.rules.elementwise import pointwise, tensors
from geta.graph.rules.registry import rule


@rule("aten::view_as_real")
def view_as_real(ctx: Context) -> Value:
    """[...] complex -> [..., 2]: the new dimension belongs to no unit."""
    value = ctx["self"]
    return ctx.free([Track(track.code.unsqueeze(-1).expand(ctx.shape), track.origins) for track in value.tracks], value.derived)


@rule("aten::view_as_complex")
def view_as_complex(ctx: Context) -> Value:
    """[..., 2] -> [...] complex: the two entries of a pair are bound."""
    value = ctx["self"]
    last = value.rank - 1
    tracks = []
    for track in value.tracks:
        if track.dims == (last,):
            ctx.freeze(Value(value.shape, (track,)), (last,), f"is the real and imaginary part in {ctx.where}")
        elif last in track.dims:
            ctx.bind(track.code, (last,))
        tracks.append(Track(compress(narrow_dims(track.code, (last,)).squeeze(last).expand(ctx.shape)), track.origins))
    return ctx.free(tracks, value.derived)


@rule("aten::complex")
def from_parts(ctx: Context) -> Value:
    """real + i imag: zero where both are."""
    return pointwise(ctx, tensors(ctx["real"], ctx["imag"]), "and")


@rule("aten::polar")
def polar(ctx: Context) -> Value:
    """abs * exp(i angle): zero where abs is."""
    return pointwise(ctx, tensors(ctx["abs"], ctx["angle"]), "keep", by=[ctx["abs"]])


@rule("aten::imag", "aten::angle", "aten::conj", "aten::_conj", "aten::conj_physical", "aten::_conj_physical", "aten::resolve_conj")
def parts(ctx: Context) -> Value:
    """f(0) = 0, entry by entry."""
    return ctx.free(ctx["self"].tracks, ctx["self"].derived)


_LAST = tuple(f"aten::fft_{name}" for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"))
_LAST_TWO = tuple(f"{name}2" for name in _LAST)
_SEVERAL = tuple(f"{name}n" for name in _LAST)


@rule(*_LAST, *_LAST_TWO, *_SEVERAL)
def fourier(ctx: Context) -> Any:
    """Linear along the transformed dimensions, which stay whole; entry by entry along the others, and zero of zeros."""
    value = ctx["self"]
    given = ctx.arguments.get("dim")
    sizes = ctx.arguments.get("s")
    if given is None:
        count = len(sizes) if sizes is not None else value.rank
        given = range(value.rank - count, value.rank)
    dims = tuple(sorted({dim % value.rank for dim in ([given] if isinstance(given, int) else given)}))
    ctx.freeze(value, dims, f"is transformed by {ctx.where}")
    return ctx.free([Track(narrow_dims(track.code, dims).expand(ctx.shape), track.origins) for track in value.tracks], value.derived)
