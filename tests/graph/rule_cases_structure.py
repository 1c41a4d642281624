"""Cases of data movement: where every index goes."""

# ruff: noqa: E731 - a table of small functions

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graph.rule_cases_pointwise import F64, FIXED, SIX, Function, aten, last, lin, pair, weight
from graph.rule_contract import Case, Net

WIDE = {"a": (6, 4), "b": (3, 12)}


def heads(x: Tensor, count: int) -> Tensor:
    """[..., count * d] -> [..., count, d]."""
    return aten.view(x, [*x.shape[:-1], count, x.shape[-1] // count])


def joined(x: Tensor) -> Tensor:
    return aten.reshape(x, [*x.shape[:-2], x.shape[-2] * x.shape[-1]])


def wide(op: str, f: Function, label: str = "", expect: int | str = 6, **more: Any) -> Case:
    """Six features become twelve."""
    return Case(f"aten::{op}", lambda p, x: lin(f(lin(x, p.a)), p.b), WIDE, {"a.0": expect}, label=label, **more)


def shapes() -> list[Case]:
    """Views that keep every entry."""
    cases = []
    for name in ("view", "reshape", "_unsafe_view"):
        call = getattr(aten, name)
        cases += [
            last(name, lambda x, call=call: call(x, [-1, x.shape[-1]]), 6, "merged in front"),
            last(name, lambda x, call=call: aten.view(call(x, [x.shape[0], x.shape[1], x.shape[2], 1]), [*x.shape]), 6, "and back"),
            Case(
                f"aten::{name}",
                lambda p, x, call=call: lin(call(h := lin(x, p.a), [h.shape[0], h.shape[1] * h.shape[2]]), p.b),
                {"a": (6, 4), "b": (3, 30)},
                {"a.0": 6, "b.1": 6},
                label="flattened",
            ),
            Case(
                f"aten::{name}",
                lambda p, x, call=call: lin(call(aten.clone(aten.sum(heads(lin(x, p.a), 2), [-1])), [2, 5, 2]), p.b),
                {"a": (6, 4), "b": (3, 2)},
                {"a.0": 2},
                label="three of a head are summed",
            ),
        ]
    cases += [
        last("_reshape_alias", lambda x: aten._reshape_alias(x, [x.shape[0] * x.shape[1], x.shape[2]], [x.shape[2], 1])),
        Case(
            "aten::view",
            lambda p, x: aten.view(lin(x, p.a), torch.int64),
            {"a": (6, 4)},
            {"a.0": "has no rule"},
            label="as bits",
            dtypes=F64,
        ),
        last("flatten", lambda x: aten.flatten(x, 0, 1), 6, "in front"),
        Case(
            "aten::flatten", lambda p, x: lin(aten.flatten(lin(x, p.a), 1), p.b), {"a": (6, 4), "b": (3, 30)}, {"a.0": 6}, label="features"
        ),
        last("unflatten", lambda x: aten.flatten(aten.unflatten(x, 1, [1, -1]), 1, 2), 6, "another dimension"),
        last("unflatten", lambda x: joined(aten.unflatten(x, -1, [x.shape[-1] // 2, 2])), 3, "features"),
        last("unsqueeze", lambda x: aten.unsqueeze(x, 1), 6, "at 1"),
        last("unsqueeze", lambda x: aten.unsqueeze(x, -2), 6, "at -2"),
        last("squeeze", lambda x: aten.squeeze(aten.unsqueeze(x, 1)), 6, "all"),
        last("squeeze", lambda x: aten.squeeze(aten.unsqueeze(x, 1), 1), 6, "one"),
        last("squeeze", lambda x: aten.squeeze(aten.unsqueeze(aten.unsqueeze(x, 1), 0), [0, -3]), 6, "several"),
        last("expand", lambda x: aten.expand(aten.unsqueeze(x, 1), [-1, 3, -1, -1]), 6, "a new dimension"),
        last("expand", lambda x: aten.expand(aten.unsqueeze(x, 1), [x.shape[0], 3, x.shape[1], x.shape[2]]), 6, "sizes written out"),
        last("broadcast_to", lambda x: aten.broadcast_to(x, [3, *x.shape])),
        pair("expand_as", lambda x, y: aten.add(aten.expand_as(aten.unsqueeze(aten.select(x, 1, 0), 1), y), y)),
        pair("view_as", lambda x, y: aten.add(aten.view_as(x, y), y)),
        pair("reshape_as", lambda x, y: aten.add(aten.reshape_as(aten.unsqueeze(x, 0), y), y)),
        wide("repeat", lambda x: aten.repeat(x, [1, 1, 2]), "features"),
        last("repeat", lambda x: aten.repeat(x, [2, 1, 3, 1]), 6, "in front"),
        wide("tile", lambda x: aten.tile(x, [2])),
        wide("repeat_interleave", lambda x: aten.repeat_interleave(x, 2, -1)),
        last("repeat_interleave", lambda x: aten.repeat_interleave(x, 3, 1), 6, "another dimension"),
    ]
    return cases


def orders() -> list[Case]:
    """Permutations of dimensions or of indices."""
    square = lambda name, *at: last(name, lambda x: getattr(aten, name)(getattr(aten, name)(x, *at), *at), 6, f"{at}")
    columns = lambda x, p: aten.matmul(x, p.b)
    turned = {"a": (4, 6), "b": (6, 3)}
    return [
        *[square(name, *at) for name in ("transpose", "swapaxes", "swapdims") for at in ((1, 2), (0, 1), (-1, 0))],
        *[last(n, lambda x, n=n: getattr(aten, n)(getattr(aten, n)(x, -1, 0), 0, -1)) for n in ("movedim", "moveaxis")],
        last("permute", lambda x: aten.permute(aten.permute(x, [2, 0, 1]), [1, 2, 0]), 6, "there and back"),
        last("permute", lambda x: aten.permute(x, [1, 0, -1]), 6, "negative"),
        Case("aten::t", lambda p, x: columns(aten.matmul(x, aten.t(aten.t(p.a))), p), turned, {"a.1": 6, "b.0": 6}),
        Case("aten::numpy_T", lambda p, x: columns(aten.matmul(x, aten.numpy_T(aten.numpy_T(p.a))), p), turned, {"a.1": 6}),
        Case("aten::mT", lambda p, x: columns(aten.matmul(x, aten.mT(aten.mT(p.a))), p), turned, {"a.1": 6}),
        last("flip", lambda x: aten.flip(x, [-1]), 6, "features"),
        last("flip", lambda x: aten.flip(x, [1, 2]), 6, "two dimensions"),
        last("flip", lambda x: aten.flip(x, [1]), 6, "another dimension"),
        weight("flip", lambda w: aten.flip(w, [0])),
        *[
            Case(
                "aten::roll",
                lambda p, x, shift=shift: lin(aten.roll(h := lin(x, p.a), [h.shape[-1] - p.below("a.0", (-shift) % 6)], [dim_of(h)]), p.b),
                SIX,
                {"a.0": 6},
                label=f"features {shift}",
            )
            for shift in (1, 4, -2)
        ],
        last("roll", lambda x: aten.roll(x, [2], [1]), 6, "another dimension"),
        Case("aten::roll", lambda p, x: lin(aten.roll(lin(x, p.a), [2]), p.b), SIX, {"a.0": "has no rule"}, label="flattened"),
        last("atleast_1d", aten.atleast_1d),
        last("atleast_2d", lambda x: aten.atleast_2d(aten.select(x, 1, 0)), 6),
        last("atleast_3d", aten.atleast_3d, 6),
        *shuffles(),
    ]


def dim_of(x: Tensor) -> int:
    return x.dim() - 1


def shuffles() -> list[Case]:
    def conv(op: str, f: Function, sizes: tuple[int, int], expect: int) -> Case:
        params = {"a": (sizes[0], 4, 1, 1), "b": (3, sizes[1], 1, 1)}
        fn = lambda p, x: aten.conv2d(f(aten.conv2d(x, p.a)), p.b)
        return Case(f"aten::{op}", fn, params, {"a.0": expect, "b.1": expect}, ((2, 4, 4, 4),), label=f"{sizes}")

    return [
        conv("pixel_shuffle", lambda x: aten.pixel_shuffle(x, 2), (12, 3), 3),
        conv("pixel_unshuffle", lambda x: aten.pixel_unshuffle(x, 2), (3, 12), 3),
        conv("channel_shuffle", lambda x: aten.channel_shuffle(x, 2), (6, 6), 3),
        conv("native_channel_shuffle", lambda x: aten.native_channel_shuffle(x, 3), (6, 6), 2),
    ]


def parts() -> list[Case]:
    """Pieces of a dimension."""

    def halves(op: str, cut: Function, expect: int = 6, label: str = "") -> Case:
        """Two pieces with a consumer each."""
        params = {"a": (6, 4), "b": (3, 2), "c": (3, 4)}

        def fn(p: Net, x: Tensor) -> Tensor:
            left, right = cut(p, lin(x, p.a))
            return aten.add(lin(left, p.b), lin(aten.relu(right), p.c))

        return Case(f"aten::{op}", fn, params, {"a.0": expect, "b.1": 2, "c.1": 4}, label=label)

    def equal(op: str, cut: Function, label: str = "") -> Case:
        """Two pieces that meet: equal positions go together."""
        params = {"a": (6, 4), "b": (3, 3)}
        fn = lambda p, x: lin(aten.mul(*cut(lin(x, p.a))), p.b)
        return Case(f"aten::{op}", fn, params, {"a.0": 3, "b.1": 3}, label=label)

    def pieces(p: Net, h: Tensor) -> list[int]:
        return [p.below("a.0", 2), h.shape[-1] - p.below("a.0", 2)]

    return [
        halves("split_with_sizes", lambda p, h: aten.split_with_sizes(h, pieces(p, h), -1)),
        halves("split", lambda p, h: aten.split(h, pieces(p, h), 2), label="sizes"),
        halves("slice", lambda p, h: (aten.slice(h, -1, 0, pieces(p, h)[0]), aten.slice(h, 2, pieces(p, h)[0]))),
        halves("narrow", lambda p, h: (aten.narrow(h, -1, 0, pieces(p, h)[0]), aten.narrow(h, 2, *pieces(p, h)))),
        equal("split", lambda h: aten.split(h, h.shape[-1] // 2, -1), "equal"),
        equal("chunk", lambda h: aten.chunk(h, 2, -1)),
        equal("unsafe_split", lambda h: aten.unsafe_split(h, h.shape[-1] // 2, -1)),
        equal("unsafe_chunk", lambda h: aten.unsafe_chunk(h, 2, -1)),
        equal("unbind", lambda h: aten.unbind(heads(h, 2), -2)),
        equal("select", lambda h: (aten.select(heads(h, 2), -2, 0), aten.select(heads(h, 2), 2, -1)), "heads"),
        equal("split", lambda h: reversed(aten.split(h, h.shape[-1] // 2, 2)), "swapped"),
        last("split", lambda x: aten.split(x, 2, 1)[2], 6, "another dimension"),
        last("unbind", lambda x: aten.unbind(x, 1)[3], 6, "another dimension"),
        last("slice", lambda x: aten.slice(x, 1, 1, -1), 6, "another dimension"),
        last("slice", lambda x: aten.slice(x, 1, 0, 5, 2), 6, "a step along another dimension"),
        last("slice", lambda x: aten.slice(x, 2, 0, x.shape[2]), 6, "everything"),
        Case(
            "aten::slice",
            lambda p, x: lin(aten.slice(lin(x, p.a), -1, 1, 6, 2), p.b),
            {"a": (6, 4), "b": (3, 3)},
            {"a.0": 3},
            label="a step",
        ),
        Case(
            "aten::slice",
            lambda p, x: lin(aten.slice(lin(x, p.a), -1, 0, 6, 4), p.b),
            {"a": (6, 4), "b": (3, 2)},
            {"a.0": "is sliced with a step"},
            label="a step that does not fit",
        ),
        last("select", lambda x: aten.select(x, 1, -2), 6, "another dimension"),
        Case(
            "aten::select",
            lambda p, x: aten.add(lin(h := lin(x, p.a), p.b), aten.unsqueeze(aten.select(h, -1, p.below("a.0", 3)), -1)),
            SIX,
            {"a.0": 5},
            label="one index stays",
        ),
    ]


def joins() -> list[Case]:
    """cat, stack, pad, glu."""
    params = {"a": (4, 4), "c": (2, 4), "b": (3, 6)}
    cases = []
    for name in ("cat", "concat", "concatenate"):
        call = getattr(aten, name)
        cases += [
            Case(
                f"aten::{name}",
                lambda p, x, call=call: lin(call([lin(x, p.a), aten.sigmoid(lin(x, p.c))], -1), p.b),
                params,
                {"a.0": 4, "c.0": 2, "b.1": 6},
                label="features",
            ),
            pair(name, lambda x, y, call=call: call([x, y], 1), 6, "another dimension"),
        ]
    cases += [
        Case(
            "aten::cat",
            lambda p, x, y: lin(aten.cat([lin(x, p.a), y], 2), p.b),
            params | {"c": (1,)},
            {"a.0": 4, "b.1": 4},
            ((2, 5, 4), (2, 5, 2)),
            label="with an input",
        ),
        Case(
            "aten::cat",
            lambda p, x, y: lin(aten.cat([lin(x, p.a), y], 1), p.b),
            SIX,
            {"a.0": FIXED},
            ((2, 5, 4), (2, 3, 6)),
            label="behind an input",
        ),
        Case(
            "aten::cat",
            lambda p, x: lin(aten.cat([aten.expand(p.v, [2, 1, -1]), lin(x, p.a)], 1), p.b),
            {**SIX, "v": (1, 1, 6)},
            {"a.0": 6, "v.2": 6},
            label="a token",
        ),
        Case(
            "aten::cat",
            lambda p, x: lin(lin(x, aten.cat([p.a, p.c], 0)), p.b),
            params,
            {"a.0": 4, "c.0": 2},
            label="weights",
        ),
        pair("stack", lambda x, y: aten.sum(aten.stack([x, y], 1), [1]), 6, "a new dimension"),
        Case(
            "aten::stack",
            lambda p, x: lin(joined(aten.stack([lin(x, p.a), lin(x, p.c)], -1)), p.b),
            {"a": (6, 4), "c": (6, 4), "b": (3, 12)},
            {"a.0": 6},
            label="interleaved",
        ),
        pair("stack", lambda x, y: aten.stack([x, y], 0), 6, "in front"),
        Case("aten::glu", lambda p, x: lin(aten.glu(lin(x, p.a)), p.b), {"a": (12, 4), "b": (3, 6)}, {"a.0": 6}),
        last("glu", lambda x: aten.glu(aten.slice(x, 1, 0, 4), 1), 6, "another dimension"),
        Case(
            "aten::meshgrid",
            lambda p, x, y: lin(aten.mul(lin(x, p.a), aten.unsqueeze(aten.select(aten.meshgrid([y, y], indexing="ij")[0], 1, 0), -1)), p.b),
            SIX,
            {"a.0": 6},
            ((2, 5, 4), (5,)),
        ),
        Case(
            "aten::broadcast_tensors",
            lambda p, x, y, z: lin(aten.mul(lin(x, p.a), aten.broadcast_tensors([y, z])[0]), p.b),
            SIX,
            {"a.0": 6},
            ((2, 5, 4), (5, 1), (2, 1, 1)),
        ),
    ]
    return [*cases, *pads()]


def pads() -> list[Case]:
    def padded(op: str, call: Function, expect: int | str, label: str, space: int = 2) -> Case:
        conv = [None, aten.conv1d, aten.conv2d, aten.conv3d][space]
        kernel = (1,) * space
        fn = lambda p, x: conv(call(conv(x, p.a)), p.b)
        return Case(f"aten::{op}", fn, {"a": (6, 4, *kernel), "b": (3, 6, *kernel)}, {"a.0": expect}, ((2, 4, *(4,) * space),), label=label)

    cases = [
        padded("constant_pad_nd", lambda x: aten.constant_pad_nd(x, [1, 2, 0, 1]), 6, "space with 0"),
        padded("constant_pad_nd", lambda x: aten.constant_pad_nd(x, [1, 2], 0.7), 6, "space with 0.7"),
        padded("constant_pad_nd", lambda x: aten.constant_pad_nd(x, [-1, -1], 0.7), 6, "cropped"),
        padded("pad", lambda x: aten.pad(x, [1, 2, 0, 1], "constant", 0.7), 6, "constant"),
        padded("pad", lambda x: aten.pad(x, [1, 2, 0, 1], "reflect"), 6, "reflect"),
        padded("pad", lambda x: aten.pad(x, [1, 2, 0, 1], "replicate"), 6, "replicate"),
        padded("pad", lambda x: aten.pad(x, [1, 2, 0, 1], "circular"), 6, "circular"),
    ]
    for space in (1, 2, 3):
        for kind in ("reflection", "replication"):
            name = f"{kind}_pad{space}d"
            cases.append(padded(name, lambda x, n=name, s=space: getattr(aten, n)(x, [1, 2] * s), 6, "", space))
    for fill in (0.0, 0.7):
        cases += [
            Case(
                "aten::constant_pad_nd",
                lambda p, x, fill=fill: lin(
                    aten.add(
                        aten.constant_pad_nd(lin(x, p.a), [p.below("c.0", 1), p.below("c.0", 6) - p.below("c.0", 5)], fill), lin(x, p.c)
                    ),
                    p.b,
                ),
                {"a": (4, 4), "c": (6, 4), "b": (3, 6)},
                {"c.0": 6, "a.0": 4},
                label=f"a shortcut with {fill}",
            ),
        ]
    return cases


STRUCTURE = [*shapes(), *orders(), *parts(), *joins()]
