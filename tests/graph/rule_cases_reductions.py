"""Cases of reductions, pooling and look-ups: what must see a dimension whole."""

# ruff: noqa: E731 - a table of small functions

from __future__ import annotations

import math

import torch
from torch import Tensor

from graph.rule_cases_layers import ALL, chan, indices, number
from graph.rule_cases_pointwise import SIX, Function, aten, last, lin, pair, positive, real
from graph.rule_cases_structure import heads
from graph.rule_contract import Case, Spec

STATISTICS: dict[str, Function] = {
    "mean": lambda x, d, k: aten.mean(x, [d], k),
    "amax": lambda x, d, k: aten.amax(x, [d], k),
    "amin": lambda x, d, k: aten.amin(x, [d], k),
    "max": lambda x, d, k: aten.max(x, d, k)[0],
    "min": lambda x, d, k: aten.min(x, d, k)[0],
    "median": lambda x, d, k: aten.median(x, d, k)[0],
    "var": lambda x, d, k: aten.var(x, [d], True, k),
    "std": lambda x, d, k: aten.std(x, [d], True, k),
    "norm": lambda x, d, k: aten.norm(x, 2, [d], k),
    "linalg_vector_norm": lambda x, d, k: aten.linalg_vector_norm(x, 2, [d], k),
    "var_mean": lambda x, d, k: aten.add(*aten.var_mean(x, [d], True, k)),
    "std_mean": lambda x, d, k: aten.add(*aten.std_mean(x, [d], True, k)),
    "any": lambda x, d, k: real(aten.any(aten.gt(x, 0.5), d, k), x),
}
FOLDS: dict[str, Function] = {
    "prod": aten.prod,
    "all": lambda x, d, k: real(aten.all(aten.gt(x, 0.0), d, k), x),
    "argmax": lambda x, d, k: real(aten.argmax(x, d, k), x),
    "argmin": lambda x, d, k: real(aten.argmin(x, d, k), x),
    "logsumexp": lambda x, d, k: aten.logsumexp(x, [d], k),
}
SUMS: dict[str, Function] = {
    "sum": lambda x, d, k: aten.sum(x, [d], k),
    "count_nonzero": lambda x, d, k: real(kept_dim(aten.count_nonzero(aten.relu(x), [d]), d, k), x),
}
ALONG: dict[str, Function] = {
    "softmax": aten.softmax,
    "_softmax": lambda x, d: aten._softmax(x, d, False),
    "log_softmax": aten.log_softmax,
    "_log_softmax": lambda x, d: aten._log_softmax(x, d, False),
    "_safe_softmax": aten._safe_softmax,
    "cumsum": aten.cumsum,
    "cumprod": aten.cumprod,
    "logcumsumexp": aten.logcumsumexp,
    "sort": lambda x, d: aten.sort(x, d)[0],
    "argsort": lambda x, d: real(aten.argsort(x, d), x),
}


def kept_dim(x: Tensor, dim: int, keep: bool) -> Tensor:
    return aten.unsqueeze(x, dim) if keep else x


def reductions() -> list[Case]:
    cases = []
    for name, f in {**STATISTICS, **FOLDS, **SUMS}.items():
        op = f"aten::{name}"
        out = lambda p, x, f=f: f(lin(x, p.a), -1, False)
        crosses: int | str = 6 if name in (*SUMS, "norm", "linalg_vector_norm") else "crosses"
        cases += [
            *[
                last(name, lambda x, f=f, d=d, k=k: f(x, d, k), 6, f"dimension {d} {k}")
                for d, k in ((1, True), (1, False), (-2, False), (0, True))
            ],
            Case(op, out, {"a": (6, 4)}, {"a.0": crosses}, label="features"),
            Case(
                op,
                lambda p, x, f=f: lin(f(heads(h := lin(x, p.a), h.shape[-1] // 2), -1, False), p.b),
                {"a": (6, 4), "b": (3, 3)},
                {"a.0": 3},
                label="within heads",
            ),
        ]
        if name in STATISTICS:
            cases.append(Case(op, out, {"a": (6, 4)}, {"a.0": 6}, label="features, inexact", exact=False))
    for name, f in ALONG.items():
        cases += [last(name, lambda x, f=f, d=d: f(x, d), 6, f"dimension {d}") for d in (1, -2)]
        cases.append(Case(f"aten::{name}", lambda p, x, f=f: lin(f(lin(x, p.a), -1), p.b), SIX, {"a.0": "crosses"}, label="features"))
    return [
        *cases,
        *[
            Case(
                f"aten::{name}",
                lambda p, x, name=name: getattr(aten, name)(lin(x, p.a)),
                {"a": (6, 4)},
                {"a.0": "crosses"},
                label="everything",
            )
            for name in ("mean", "max", "min", "median", "prod")
        ],
        Case("aten::sum", lambda p, x: aten.sum(lin(x, p.a)), {"a": (6, 4)}, {"a.0": 6}, label="everything"),
        Case(
            "aten::sum",
            lambda p, x: aten.sum(aten.sigmoid(lin(x, p.a)), [-1]),
            {"a": (6, 4)},
            {"a.0": "is summed over while not zero"},
            label="no zeros",
        ),
        last("sum", lambda x: aten.sum(aten.sigmoid(x), [1]), 6, "no zeros along another dimension"),
        last("diff", lambda x: aten.diff(x, 1, 1)),
        pair("max", aten.max, 6, "of two tensors"),
        pair("min", aten.min, 6, "of two tensors"),
        Case(
            "aten::norm",
            lambda p, x: aten.norm(positive(lin(x, p.a)), math.inf, [1]),
            {"a": (6, 4)},
            {"a.0": "reaches"},
            label="to the output",
        ),
    ]


def pools() -> list[Case]:
    """Channel by channel."""
    kinds: dict[str, dict[int, Function]] = {
        "max_pool{}d": {n: lambda x, n=n: getattr(aten, f"max_pool{n}d")(x, 2, 2, 0) for n in (1, 2, 3)},
        "avg_pool{}d": {n: lambda x, n=n: getattr(aten, f"avg_pool{n}d")(x, 3, 1, 1) for n in (1, 2, 3)},
        "adaptive_avg_pool{}d": {n: lambda x, n=n: getattr(aten, f"adaptive_avg_pool{n}d")(x, [2] * n) for n in (1, 2, 3)},
        "adaptive_max_pool{}d": {n: lambda x, n=n: getattr(aten, f"adaptive_max_pool{n}d")(x, [2] * n)[0] for n in (1, 2, 3)},
        "upsample_nearest{}d": {n: lambda x, n=n: getattr(aten, f"upsample_nearest{n}d")(x, [9] * n) for n in (1, 2, 3)},
    }
    cases = []
    without = (torch.float64, torch.float32)  # no bfloat16 kernels
    for name, calls in kinds.items():
        for space, f in calls.items():
            dtypes = without if space == 3 else ALL
            cases.append(chan(name.format(space), lambda x, p, f=f: f(x), 6, "", space=space, dtypes=dtypes))
            cases.append(chan(name.format(space), lambda x, p, f=f: f(positive(x)), 6, "no zeros", space=space, dtypes=dtypes))
    smooth: dict[str, tuple[int, Function]] = {
        "upsample_linear1d": (1, lambda x: aten.upsample_linear1d(x, [9], False)),
        "upsample_bilinear2d": (2, lambda x: aten.upsample_bilinear2d(x, [9, 7], True)),
        "upsample_bicubic2d": (2, lambda x: aten.upsample_bicubic2d(x, [9, 7], False)),
        "upsample_trilinear3d": (3, lambda x: aten.upsample_trilinear3d(x, [5, 5, 5], False)),
        "_upsample_bilinear2d_aa": (2, lambda x: aten._upsample_bilinear2d_aa(x, [3, 4], False)),
        "_upsample_bicubic2d_aa": (2, lambda x: aten._upsample_bicubic2d_aa(x, [3, 4], False)),
        "max_pool2d_with_indices": (2, lambda x: aten.max_pool2d_with_indices(x, [2, 2], [2, 2])[0]),
        "_adaptive_avg_pool2d": (2, lambda x: aten._adaptive_avg_pool2d(x, [2, 3])),
    }
    for name, (space, f) in smooth.items():
        cases.append(chan(name, lambda x, p, f=f: f(x), 6, "", space=space, dtypes=without))
    cases.append(chan("upsample_nearest2d", lambda x, p: aten.upsample_nearest2d(x, None, [2.0, 1.5]), 6, "by factors"))
    cases.append(chan("avg_pool2d", lambda x, p: aten.avg_pool2d(x, [2, 3], [2, 1], [1, 1], True, False), 6, "ceil, padding not counted"))
    return cases


def lookups() -> list[Case]:
    def by(op: str, f: Function, label: str, expect: int | str = 6) -> Case:
        fn = lambda p, x, i: lin(f(lin(x, p.a), i), p.b)
        return Case(f"aten::{op}", fn, SIX, {"a.0": expect}, ((2, 5, 4), indices(6, below=5)), label=label)

    table = {"a": (5, 6), "b": (3, 6)}
    fake = torch.ops.geta.fake_quantize
    lsq = torch.ops.geta.lsq_quantize
    per_row: dict[str, Spec] = {"d": lambda g: torch.rand(6, 1, generator=g, dtype=torch.float64) * 0.05 + 0.01}
    by_block: Spec = lambda g: torch.rand(6, 2, generator=g, dtype=torch.float64) * 0.05 + 0.01
    ints: Spec = lambda g: torch.randint(-8, 8, (6, 4), generator=g, dtype=torch.int8)
    return [
        by("index", lambda x, i: aten.index(x, [None, i]), "one dimension"),
        by("index", lambda x, i: aten.index(x, [aten.fmod(i, 2), i]), "two dimensions"),
        by("index", lambda x, i: aten.index(x, [None, None, i]), "features", "is indexed"),
        by("index_select", lambda x, i: aten.index_select(x, 1, i), "another dimension"),
        by("index_select", lambda x, i: aten.index_select(x, -1, i), "features", "is indexed"),
        Case(
            "aten::gather",
            lambda p, i: lin(aten.gather(p.a, 0, aten.expand(i, [-1, p.a.shape[1]])), p.b),
            table,
            {"a.1": 6, "a.0": "is gathered"},
            (indices(4, 1, below=5),),
            label="rows",
        ),
        by(
            "gather",
            lambda x, i: aten.gather(x, 1, aten.unsqueeze(aten.expand(aten.unsqueeze(i, 1), [-1, x.shape[-1]]), 0)),
            "short of the batch",
            "has no rule",
        ),
        by("gather", lambda x, i: aten.gather(x, 1, aten.expand(aten.unsqueeze(i, 1), [2, 6, x.shape[-1]])), "another dimension"),
        by(
            "take_along_dim",
            lambda x, i: aten.take_along_dim(x, aten.expand(aten.unsqueeze(i, 1), [2, 6, x.shape[-1]]), 1),
            "another dimension",
        ),
        Case(
            "aten::gather",
            lambda p, x, i: aten.gather(lin(x, p.a), -1, i),
            {"a": (6, 4)},
            {"a.0": "is gathered"},
            ((2, 5, 4), indices(2, 5, 3, below=6)),
            label="features",
        ),
        Case(
            "aten::index",
            lambda p, i: lin(aten.index(p.a, [i]), p.b),
            table,
            {"a.1": 6, "a.0": "is indexed"},
            (indices(4, below=5),),
            label="a table",
        ),
        Case(
            "geta::fake_quantize",
            lambda p, x: lin(fake(lin(x, p.a), p.d, p.q_m, p.t, True, True, []), p.b),
            SIX,
            {"a.0": 6},
            buffers={name: number(value) for name, value in (("d", 0.1), ("q_m", 2.0), ("t", 1.0))},
            label="an activation",
        ),
        Case(
            "geta::fake_quantize",
            lambda p, x: lin(lin(x, fake(p.a, p.d, p.q_m, p.t, True, True, [])), p.b),
            {**SIX, **per_row},
            {"a.0": 6, "d.0": 6},
            buffers={name: number(value) for name, value in (("q_m", 2.0), ("t", 1.0))},
            label="a weight by rows",
        ),
        Case(
            "geta::fake_quantize",
            lambda p, x: lin(lin(x, fake(p.a, p.d, p.q_m, p.t, True, True, [], blocks=[2])), p.b),
            {**SIX, **dict.fromkeys(("d", "q_m", "t"), by_block)},
            {"a.0": 6, "d.0": 6, "q_m.0": 6, "t.0": 6},
            label="a weight by rows and blocks of columns",
        ),
        Case(
            "geta::lsq_quantize",
            lambda p, x: lin(lsq(lin(x, p.a), p.d, 2, -2, 1, []), p.b),
            SIX,
            {"a.0": 6},
            buffers={"d": number(0.5)},
            label="an activation",
        ),
        Case(
            "geta::lsq_quantize",
            lambda p, x: lin(lin(x, lsq(p.a, p.d, 2, -1, 1, [])), p.b),
            {**SIX, **per_row},
            {"a.0": 6, "d.0": 6},
            label="a weight by rows",
        ),
        Case(
            "geta::lsq_quantize",
            lambda p, x: lin(lin(x, lsq(p.a, p.d, 1, -1, 1, [])), p.b),
            {**SIX, **per_row},
            {"a.0": 6, "b.1": 6},
            label="a binary weight, which zeros of the next must switch off",
        ),
        Case(
            "geta::lsq_quantize",
            lambda p, x: lin(lin(x, lsq(p.a, p.d, 1, -1, 1, [])), lsq(p.b, p.d, 1, -1, 1, [])),
            SIX,
            {"a.0": "would not be zero"},
            buffers={"d": number(0.5)},
            label="two binary weights, none of which can be zero",
        ),
        Case(
            "geta::dequantize",
            lambda p, x: lin(lin(x, torch.ops.geta.dequantize(p.codes, p.d, 4)), p.b),
            {"b": (3, 6), **per_row},
            {"b.1": 6},
            buffers={"codes": ints},
        ),
    ]


def triangles() -> list[Case]:
    """A triangle counts indices, so both dimensions stay."""
    cases = []
    for name in ("tril", "triu"):
        call = getattr(aten, name)
        cases += [
            Case(f"aten::{name}", lambda p, x, call=call: lin(call(lin(x, p.a)), p.b), SIX, {"a.0": "triangle"}, label="features"),
            last(name, lambda x, call=call: aten.permute(call(aten.permute(x, [2, 0, 1])), [1, 2, 0]), 6, "other dimensions"),
        ]
    return cases


REDUCTIONS = [*reductions(), *pools(), *lookups(), *triangles()]
