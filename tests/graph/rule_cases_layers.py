"""Cases of contractions and normalisations."""

# ruff: noqa: E731 - a table of small functions

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graph.rule_cases_pointwise import F64, FIXED, SIX, TWO, Function, aten, last, lin
from graph.rule_cases_structure import heads, joined
from graph.rule_contract import Case, Net, Spec

ALL = (torch.float64, torch.float32, torch.bfloat16)
CONV = [None, aten.conv1d, aten.conv2d, aten.conv3d]


def indices(*shape: int, below: int) -> Spec:
    return lambda generator: torch.randint(below, shape, generator=generator)


def number(value: float) -> Spec:
    return lambda generator: torch.tensor(value, dtype=torch.float64)


def spread(*shape: int) -> Spec:
    """Above zero, as variances are."""
    return lambda generator: torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5


def chan(
    op: str, f: Function, expect: int | str = 6, label: str = "", *, space: int = 2, extra: Mapping[str, Spec] | None = None, **more: Any
) -> Case:
    """[2, 4, 6, 6] -> six channels -> f(x, tensors) -> three."""
    kernel = (1,) * space
    params = {"a": (6, 4, *kernel), "b": (3, 6, *kernel), **(extra or {})}
    more = {"inputs": ((2, 4, *(6 if space < 3 else 4,) * space),), **more}
    return Case(f"aten::{op}", lambda p, x: CONV[space](f(CONV[space](x, p.a), p), p.b), params, {"a.0": expect}, label=label, **more)


def products() -> list[Case]:
    turned = {"a": (4, 6), "b": (6, 3)}
    both = {"a.0": 6, "c.0": 6}

    def scores(op: str, f: Function, label: str, expect: Mapping[str, int | str]) -> Case:
        return Case(f"aten::{op}", lambda p, x: f(lin(x, p.a), aten.transpose(lin(x, p.c), -1, -2)), TWO, expect, label=label)

    def split(x: Tensor) -> Tensor:
        return aten.transpose(heads(x, x.shape[-1] // 3), 1, 2)

    return [
        last("linear", aten.relu),
        Case(
            "aten::linear",
            lambda p, x: aten.linear(aten.linear(x, p.a, p.v), p.b, p.w),
            {**SIX, "v": (6,), "w": (3,)},
            {"a.0": 6, "v.0": 6},
            label="bias",
        ),
        Case("aten::linear", lambda p, x: aten.linear(lin(x, p.a), p.b), SIX, {"a.0": 6}, ((4,),), label="one-dimensional input"),
        Case(
            "aten::linear",
            lambda p, x: aten.linear(lin(x, p.a), p.v),
            {"a": (6, 4), "v": (6,)},
            {"a.0": 6, "v.0": 6},
            label="a row as weight",
        ),
        Case("aten::linear", lambda p, x: lin(aten.sigmoid(lin(x, p.a)), p.b), SIX, {"a.0": 6, "b.1": 6}, label="reads no zero"),
        Case("aten::linear", lambda p, x: lin(lin(x, p.a), aten.sigmoid(p.b)), SIX, {"a.0": 6}, label="a weight without zeros"),
        Case("aten::mm", lambda p, x: aten.mm(aten.mm(x, p.a), p.b), turned, {"a.1": 6, "b.0": 6}, ((5, 4),)),
        Case(
            "aten::bmm",
            lambda p, x: aten.bmm(aten.bmm(x, aten.expand(p.a, [2, -1, -1])), aten.expand(p.b, [2, -1, -1])),
            turned,
            {"a.1": 6},
        ),
        scores("bmm", aten.bmm, "two branches", both),
        scores("matmul", aten.matmul, "two branches", both),
        Case("aten::matmul", lambda p, x: aten.matmul(aten.matmul(x, p.a), p.b), turned, {"a.1": 6}, label="weights"),
        Case(
            "aten::matmul", lambda p, x: aten.matmul(lin(x, p.a), p.v), {"a": (6, 4), "v": (6,)}, {"a.0": 6}, label="a vector at the right"
        ),
        Case(
            "aten::matmul",
            lambda p, x: aten.matmul(p.v, aten.t(aten.select(lin(x, p.a), 0, 0))),
            {"a": (6, 4), "v": (6,)},
            {"a.0": 6},
            label="a vector at the left",
        ),
        Case(
            "aten::matmul",
            lambda p, x: aten.matmul(aten.select(aten.select(lin(x, p.a), 0, 0), 0, 1), p.v),
            {"a": (6, 4), "v": (6,)},
            {"a.0": 6},
            label="two vectors",
        ),
        Case(
            "aten::matmul",
            lambda p, x: lin(
                joined(
                    aten.transpose(
                        aten.matmul(aten.matmul(split(lin(x, p.a)), aten.transpose(split(lin(x, p.c)), -1, -2)), split(lin(x, p.d))), 1, 2
                    )
                ),
                p.b,
            ),
            {"a": (6, 4), "c": (6, 4), "d": (6, 4), "b": (3, 6)},
            {"a.0": 2, "c.0": 2, "d.0": 2, "b.1": 2},
            label="heads",
        ),
        Case(
            "aten::_grouped_mm",
            lambda p, x, ends: aten._grouped_mm(aten._grouped_mm(x, p.a, ends), p.b, ends),
            {"a": (2, 16, 8), "b": (2, 8, 16)},
            {"a.2": 8, "b.1": 8, "a.0": "is one of several experts"},
            ((8, 16), lambda generator: torch.tensor([3, 8], dtype=torch.int32)),
            runs=False,
            dtypes=(torch.bfloat16,),
        ),
        Case("aten::mv", lambda p, x: aten.mv(p.b, aten.mv(p.a, x)), SIX, {"a.0": 6, "b.1": 6}, ((4,),)),
        Case("aten::dot", lambda p, x: aten.dot(aten.mv(p.a, x), p.v), {"a": (6, 4), "v": (6,)}, {"a.0": 6, "v.0": 6}, ((4,),)),
        Case("aten::addmm", lambda p, x: aten.mm(aten.addmm(p.v, x, p.a), p.b), {**turned, "v": (6,)}, {"a.1": 6, "v.0": 6}, ((5, 4),)),
        Case(
            "aten::addmm",
            lambda p, x: aten.addmm(p.v, aten.mm(x, p.a), p.b, beta=0.5, alpha=2),
            {**turned, "v": (3,)},
            {"a.1": 6},
            ((5, 4),),
            label="factors",
        ),
        Case(
            "aten::baddbmm",
            lambda p, x: aten.baddbmm(lin(x, p.c), lin(x, p.a), aten.expand(p.b, [2, -1, -1])),
            {"a": (6, 4), "b": (6, 3), "c": (3, 4)},
            {"a.0": 6},
        ),
        Case("aten::addmv", lambda p, x: aten.mv(p.b, aten.addmv(p.v, p.a, x)), {**SIX, "v": (6,)}, {"a.0": 6, "v.0": 6}, ((4,),)),
        *einsums(),
        *attention(),
    ]


def einsums() -> list[Case]:
    def case(equation: str, second: str, expect: Mapping[str, int | str], label: str = "") -> Case:
        fn = lambda p, x: aten.einsum(second, [aten.einsum(equation, [x, p.a]), p.b])
        return Case("aten::einsum", fn, SIX, expect, label=label or equation)

    return [
        case("bsi,oi->bso", "bsh,oh->bso", {"a.0": 6}),
        case("bsi,oi->obs", "hbs,oh->sbo", {"a.0": 6}),
        case("abc,dc->abd", "abd,ed->aeb", {"a.0": 6}),
        Case("aten::einsum", lambda p, x: aten.einsum("bsh,bth->bst", [lin(x, p.a), lin(x, p.c)]), TWO, {"a.0": 6}, label="two branches"),
        Case(
            "aten::einsum",
            lambda p, x: aten.einsum(
                "bhst,bthd->bshd",
                [
                    aten.einsum(
                        "bshd,bthd->bhst", [heads(lin(x, p.a), p.below("a.0", 6) // 3), heads(lin(x, p.c), p.below("c.0", 6) // 3)]
                    ),
                    heads(lin(x, p.d), p.below("d.0", 6) // 3),
                ],
            ),
            {"a": (6, 4), "c": (6, 4), "d": (6, 4)},
            {"a.0": 0},
            label="heads that reach the output",
        ),
    ]


def attention() -> list[Case]:
    def case(label: str, groups: int, *, kv: int = 8, **options: Any) -> Case:
        """Heads of width 2; `kv` key-value features."""
        params = {"q": (8, 4), "k": (kv, 4), "v": (kv, 4), "b": (3, 8), "m": (5, 5)}

        def split(x: Tensor) -> Tensor:
            return aten.transpose(aten.view(x, [*x.shape[:-1], x.shape[-1] // 2, 2]), 1, 2)

        def fn(p: Net, x: Tensor) -> Tensor:
            given = {name: p.m if value == "m" else value for name, value in options.items()}
            y = aten.scaled_dot_product_attention(split(lin(x, p.q)), split(lin(x, p.k)), split(lin(x, p.v)), **given)
            return lin(joined(aten.transpose(y, 1, 2)), p.b)

        values: int | str = groups if kv > 2 else "is folded together with an independent dimension"  # heads that share one value
        return Case("aten::scaled_dot_product_attention", fn, params, {"q.0": groups, "v.0": values, "b.1": groups}, label=label)

    single = {"q": (6, 4), "k": (6, 4), "v": (8, 4), "b": (3, 8)}
    scale = 6**-0.5
    return [
        case("heads", 4),
        case("causal", 4, is_causal=True),
        case("a bias", 4, attn_mask="m"),
        case("grouped queries", 2, kv=4, enable_gqa=True),
        case("one key-value head", 4, kv=2, enable_gqa=True),
        Case(
            "aten::scaled_dot_product_attention",
            lambda p, x: lin(aten.scaled_dot_product_attention(lin(x, p.q), lin(x, p.k), lin(x, p.v), scale=scale), p.b),
            single,
            {"q.0": 6, "k.0": 6, "v.0": 8},
            label="no heads: widths",
        ),
    ]


def convolutions() -> list[Case]:
    cases = []
    for space in (1, 2, 3):
        name = f"conv{space}d"
        kernel = (3,) * space
        more: dict[str, Any] = {"space": space}
        cases += [
            chan(name, lambda x, p, c=CONV[space]: c(x, p.w, p.v, [2], [1]), 6, "stride", extra={"w": (6, 6, *kernel), "v": (6,)}, **more),
            chan(name, lambda x, p, c=CONV[space]: c(x, p.w, None, [1], [2], [2]), 6, "dilation", extra={"w": (6, 6, *kernel)}, **more),
            chan(
                name, lambda x, p, c=CONV[space]: c(x, p.w, None, [1], "same"), 6, "padding by name", extra={"w": (6, 6, *kernel)}, **more
            ),
            chan(
                name,
                lambda x, p, c=CONV[space]: c(x, p.w, None, [1], [1], [1], x.shape[1]),
                6,
                "depthwise",
                extra={"w": (6, 1, *kernel)},
                **more,
            ),
            chan(
                name,
                lambda x, p, c=CONV[space]: c(x, p.w, p.v, [1], [1], [1], x.shape[1] // p.w.shape[1]),
                3,
                "grouped",
                extra={"w": (6, 3, *kernel), "v": (6,)},
                **more,
            ),
        ]
        up = getattr(aten, f"conv_transpose{space}d")
        cases += [
            chan(
                f"conv_transpose{space}d",
                lambda x, p, c=up: c(x, p.w, p.v, [2]),
                6,
                "stride",
                extra={"w": (6, 6, *kernel), "v": (6,)},
                **more,
            ),
            chan(
                f"conv_transpose{space}d",
                lambda x, p, c=up: c(x, p.w, None, [1], [0], [0], x.shape[1]),
                6,
                "depthwise",
                extra={"w": (6, 1, *kernel)},
                **more,
            ),
            chan(
                f"conv_transpose{space}d",
                lambda x, p, c=up: c(x, p.w, None, [1], [0], [0], 2),
                3,
                "grouped",
                extra={"w": (6, 3, *kernel)},
                **more,
            ),
        ]
    several = {"a": (6, 4, 1, 1), "w": (12, 1, 3, 3), "b": (3, 12, 1, 1)}
    narrow = {"a": (6, 4, 1, 1), "w": (2, 3, 1, 1), "b": (3, 2, 1, 1)}
    shape = ((2, 4, 6, 6),)
    deep = lambda p, x: aten.conv2d(aten.conv2d(h := aten.conv2d(x, p.a), p.w, None, [1], [1], [1], h.shape[1] // p.w.shape[1]), p.b)
    bare = {"w": (6, 3, 3, 3)}
    full = lambda x, p: aten.convolution(x, p.w, p.v, [2, 2], [1, 1], [1, 1], False, [0, 0], 1)
    turned = lambda x, p: aten.convolution(x, p.w, p.v, [2, 2], [0, 0], [1, 1], True, [1, 1], 1)
    old = lambda x, p: aten._convolution(
        x, p.w, p.v, [1, 1], [1, 1], [1, 1], False, [0, 0], x.shape[1] // p.w.shape[1], False, False, True, True
    )
    weights: dict[str, Spec] = {"w": (6, 6, 3, 3), "v": (6,)}
    return [
        *cases,
        Case("aten::conv2d", deep, several, {"a.0": 6, "w.0": 6, "b.1": 6}, shape, label="two outputs per input"),
        Case("aten::conv2d", deep, narrow, {"a.0": 2, "w.0": 2, "b.1": 2}, shape, label="one output per group"),
        chan(
            "conv2d", lambda x, p: aten.conv2d(aten.sigmoid(x), p.w, None, [1], [1]), 6, "pads what is no zero", extra={"w": (6, 6, 3, 3)}
        ),
        Case(
            "aten::conv2d",
            lambda p, x: aten.conv2d(aten.conv2d(x, p.a), p.b),
            {"a": (6, 4, 3, 3), "b": (3, 6, 1, 1)},
            {"a.0": 6},
            ((4, 6, 6),),
            label="no batch",
        ),
        chan(
            "conv2d",
            lambda x, p: aten.conv2d(x, aten.sigmoid(p.w), None, [1], [1], [1], x.shape[1] // p.w.shape[1]),
            3,
            "grouped, no zeros",
            extra=bare,
        ),
        chan(
            "conv_transpose2d", lambda x, p: aten.conv_transpose2d(x, aten.sigmoid(p.w), None, [1], [1], [0], 2), 3, "no zeros", extra=bare
        ),
        chan("convolution", full, 6, "", extra=weights),
        chan("convolution", turned, 6, "transposed", extra=weights),
        chan("_convolution", old, 3, "grouped", extra={"w": (6, 3, 3, 3), "v": (6,)}),
        Case(
            "aten::embedding",
            lambda p, i: lin(aten.embedding(p.a, i), p.b),
            {"a": (10, 6), "b": (3, 6)},
            {"a.1": 6, "a.0": "is looked up by index"},
            (indices(2, 5, below=10),),
        ),
        Case(
            "aten::embedding",
            lambda p, i: lin(aten.embedding(p.a, i, 1), p.b),
            {"a": (10, 6), "b": (3, 6)},
            {"a.1": 6},
            (indices(4, below=10),),
            label="padding index",
        ),
        *_bags(),
    ]


def _bags() -> list[Case]:
    starts = torch.tensor([0, 2])

    def case(op: str, mode: int, label: str, f: Function) -> Case:
        shapes = {"a": (10, 6), "b": (3, 6), **({"c": (5,)} if label else {})}
        prunable = {"a.1": 6, "a.0": "is looked up by index"}
        return Case(f"aten::{op}", f, shapes, prunable, (indices(5, below=10),), label=f"mode {mode} {label}".strip())

    return [
        *[case("embedding_bag", m, "", lambda p, i, m=m: lin(aten.embedding_bag(p.a, i, starts, False, m)[0], p.b)) for m in range(3)],
        case("embedding_bag", 0, "weighted", lambda p, i: lin(aten.embedding_bag(p.a, i, starts, False, 0, False, p.c)[0], p.b)),
        case("_embedding_bag", 1, "", lambda p, i: lin(aten._embedding_bag(p.a, i, starts, False, 1)[0], p.b)),
        case("_embedding_bag_forward_only", 1, "", lambda p, i: lin(aten._embedding_bag_forward_only(p.a, i, starts, False, 1)[0], p.b)),
    ]


def norms() -> list[Case]:
    """Every kind with and without affine parameters and statistics."""
    affine: dict[str, Spec] = {"w": (6,), "v": (6,)}
    stats: dict[str, Spec] = {"mean": (6,), "var": spread(6)}
    features = {**SIX, "w": (6,), "v": (6,)}
    wide: dict[str, Spec] = {"a": (12, 4, 1, 1), "b": (3, 12, 1, 1), "w": (12,), "v": (12,)}
    image = ((2, 4, 6, 6),)

    def groups(op: str, f: Function, label: str = "") -> Case:
        return Case(
            f"aten::{op}",
            lambda p, x: aten.conv2d(f(aten.conv2d(x, p.a), p), p.b),
            wide,
            {"a.0": 4, "w.0": 4 if "affine" in label else "is never"},
            image,
            label=label,
        )

    def native(x: Tensor, p: Net, groups: int) -> Tensor:
        return aten.native_group_norm(x, p.w, p.v, x.shape[0], x.shape[1], x.shape[2] * x.shape[3], groups, 1e-5)[0]

    bn = lambda x, w, b, p: aten.batch_norm(x, w, b, p.mean, p.var, False, 0.1, 1e-5, False)
    return [
        chan("batch_norm", lambda x, p: bn(x, p.w, p.v, p), 6, "affine", extra=affine, buffers=stats),
        chan("batch_norm", lambda x, p: bn(x, None, None, p), 6, "statistics alone", buffers=stats),
        chan("batch_norm", lambda x, p: bn(x, p.w, None, p), 6, "no bias", extra={"w": (6,)}, buffers=stats),
        chan("batch_norm", lambda x, p: aten.batch_norm(x, p.w, p.v, None, None, True, 0.1, 1e-5, False), 6, "of the batch", extra=affine),
        chan("batch_norm", lambda x, p: aten.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False), 6, "of the batch, bare"),
        Case(
            "aten::batch_norm",
            lambda p, x: lin(bn(lin(x, p.a), p.w, p.v, p), p.b),
            features,
            {"a.0": 6, "w.0": 6},
            ((5, 4),),
            stats,
            label="two dimensions",
        ),
        chan(
            "native_batch_norm",
            lambda x, p: aten.native_batch_norm(x, p.w, p.v, p.mean, p.var, False, 0.1, 1e-5)[0],
            6,
            "",
            extra=affine,
            buffers=stats,
        ),
        chan(
            "_native_batch_norm_legit",
            lambda x, p: aten._native_batch_norm_legit(x, p.w, p.v, p.mean, p.var, False, 0.1, 1e-5)[0],
            6,
            "",
            extra=affine,
            buffers=stats,
        ),
        chan(
            "cudnn_batch_norm",
            lambda x, p: aten.cudnn_batch_norm(x, p.w, p.v, p.mean, p.var, False, 0.1, 1e-5)[0],
            6,
            "",
            extra=affine,
            buffers=stats,
            runs=False,
            dtypes=F64,
        ),
        chan("instance_norm", lambda x, p: aten.instance_norm(x, p.w, p.v, None, None, True, 0.1, 1e-5, False), 6, "affine", extra=affine),
        chan(
            "instance_norm",
            lambda x, p: aten.instance_norm(x, None, None, p.mean, p.var, False, 0.1, 1e-5, False),
            6,
            "statistics",
            buffers=stats,
        ),
        groups("group_norm", lambda x, p: aten.group_norm(x, x.shape[1] // 3, p.w, p.v), "affine"),
        groups("group_norm", lambda x, p: aten.group_norm(x, x.shape[1] // 3), "bare"),
        chan("group_norm", lambda x, p: aten.group_norm(x, x.shape[1], p.w, p.v), 6, "one channel each", extra=affine),
        chan("group_norm", lambda x, p: aten.group_norm(x, 1, p.w, p.v), "is a single group", "all in one", extra=affine),
        groups("native_group_norm", lambda x, p: native(x, p, x.shape[1] // 3), "affine"),
        *layer_norms(features),
    ]


def layer_norms(features: Mapping[str, Spec]) -> list[Case]:
    crosses = "crosses"
    kinds: dict[str, Function] = {
        "layer_norm": lambda x, n, w, v: aten.layer_norm(x, x.shape[-n:], w, v),
        "native_layer_norm": lambda x, n, w, v: aten.native_layer_norm(x, x.shape[-n:], w, v, 1e-5)[0],
        "rms_norm": lambda x, n, w, v: aten.rms_norm(x, x.shape[-n:], w, 1e-5),
        "_fused_rms_norm": lambda x, n, w, v: aten._fused_rms_norm(x, x.shape[-n:], w, 1e-5)[0],
    }
    cases = []
    for name, call in kinds.items():
        op = f"aten::{name}"
        over = lambda p, x, call=call: lin(call(lin(x, p.a), 1, p.w, p.v), p.b)
        bare = lambda p, x, call=call: lin(call(lin(x, p.a), 1, None, None), p.b)
        of_heads = lambda p, x, call=call: lin(joined(call(heads(h := lin(x, p.a), h.shape[-1] // 3), 1, p.w, p.v)), p.b)
        kept = lambda p, x, call=call: aten.conv2d(call(aten.conv2d(x, p.a), 2, p.w, p.v), p.b)
        image: dict[str, Spec] = {"a": (6, 4, 1, 1), "b": (3, 6, 1, 1), "w": (4, 4), "v": (4, 4)}
        cases += [
            Case(op, over, features, {"a.0": crosses}, label="over features"),
            Case(op, over, features, {"a.0": 6, "w.0": 6, "b.1": 6}, label="over features, inexact", exact=False),
            Case(op, bare, SIX, {"a.0": 6}, label="bare, inexact", exact=False),
            Case(op, of_heads, {**SIX, "w": (3,), "v": (3,)}, {"a.0": 2}, label="within heads"),
            Case(op, kept, image, {"a.0": 6, "w.0": FIXED}, ((2, 4, 4, 4),), label="over space"),
        ]
    return cases


LAYERS = [*products(), *convolutions(), *norms()]
