"""Cases of elementwise operators, reductions along them, and tensors that the graph makes itself."""

# ruff: noqa: E731 - a table of small functions

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graph.rule_contract import Case, Net

aten = torch.ops.aten
Function = Callable[..., Any]
F64 = (torch.float64,)
SIX = {"a": (6, 4), "b": (3, 6)}
TWO = {"a": (6, 4), "c": (6, 4), "b": (3, 6)}
FIXED = "must match a tensor of fixed size"


def lin(x: Tensor, weight: Tensor) -> Tensor:
    return aten.linear(x, weight)


def last(op: str, f: Function, expect: int | str = 6, label: str = "", **more: Any) -> Case:
    """[2, 5, 4] -> six features -> f -> three: the features are the family."""
    return Case(f"aten::{op}", lambda p, x: lin(f(lin(x, p.a)), p.b), SIX, {"a.0": expect, "b.1": expect}, label=label, **more)


def weight(op: str, f: Function, label: str = "on a weight", **more: Any) -> Case:
    """The same operator on a tensor that no input reaches."""
    return Case(f"aten::{op}", lambda p, x: lin(lin(x, f(p.a)), p.b), SIX, {"a.0": 6}, label=label, **more)


def pair(op: str, f: Function, expect: int | str = 6, label: str = "", **more: Any) -> Case:
    """Two branches of six features each meet in f."""
    fn = lambda p, x: lin(f(lin(x, p.a), lin(x, p.c)), p.b)
    return Case(f"aten::{op}", fn, TWO, {"a.0": expect, "c.0": expect}, label=label, **more)


def unit(x: Tensor) -> Tensor:
    """Into (-1, 1), zero stays zero."""
    return aten.mul(aten.tanh(x), 0.9)


def size(x: Tensor) -> Tensor:
    """Not below zero, zero stays zero."""
    return aten.mul(x, x)


def real(x: Tensor, like: Tensor) -> Tensor:
    return aten.to(x, like.dtype)


def whole(x: Tensor) -> Tensor:
    return aten.to(aten.mul(x, 3.0), torch.int64)


def positive(x: Tensor) -> Tensor:
    """Above zero wherever it is removed or not."""
    return aten.add(aten.sigmoid(x), 0.5)


def plain(name: str) -> Function:
    return getattr(aten, name)


def inside(name: str) -> Function:
    return lambda x: getattr(aten, name)(unit(x))


def above(name: str) -> Function:
    return lambda x: getattr(aten, name)(size(x))


def flag(name: str) -> Function:
    return lambda x: real(getattr(aten, name)(x), x)


KEEP: dict[str, Function] = {
    name: plain(name)
    for name in """abs absolute alias arcsinh arctan asinh atan celu clone contiguous deg2rad detach elu erf expm1 fix floor frac gelu
    hardshrink hardswish leaky_relu lift_fresh lift_fresh_copy mish nan_to_num neg negative positive real relu relu6 round rrelu selu sgn
    sign silu sin sinh softshrink square tan tanh trunc zero zeros_like""".split()
}
KEEP |= {name: inside(name) for name in ("asin", "atanh", "erfinv")}
KEEP |= {name: above(name) for name in ("log1p", "sqrt")}
KEEP |= {name: flag(name) for name in ("isinf", "isnan")}
KEEP |= {name: (lambda x, name=name: getattr(aten, name)(x, 0.5, False)) for name in ("dropout", "alpha_dropout")}
KEEP |= {name: (lambda x, name=name: getattr(aten, name)(x, 0.5, False)) for name in ("feature_dropout", "feature_alpha_dropout")}
KEEP["native_dropout"] = lambda x: aten.native_dropout(x, 0.5, False)[0]
KEEP["to"] = lambda x: aten.to(aten.to(x, torch.float64), x.dtype)
KEEP["_to_copy"] = lambda x: aten._to_copy(aten._to_copy(x, dtype=torch.float64), dtype=x.dtype)
KEEP["type_as"] = lambda x: aten.type_as(aten.to(x, torch.float64), x)

LOSE: dict[str, Function] = {
    name: plain(name) for name in "cos cosh erfc exp exp2 hardsigmoid ones_like sigmoid sinc softplus log_sigmoid".split()
}
LOSE["acos"] = inside("acos")
LOSE["isfinite"] = flag("isfinite")
LOSE["logical_not"] = flag("logical_not")
LOSE["bitwise_not"] = lambda x: real(aten.bitwise_not(whole(x)), x)
LOSE["fill"] = lambda x: aten.fill(x, 0.5)
LOSE["full_like"] = lambda x: aten.full_like(x, 0.5)

POLES: dict[str, Function] = {name: above(name) for name in "log log10 log2 reciprocal rsqrt digamma lgamma".split()}
"""Infinite at zero, so that no consumer can be told to ignore the value by a zero of its own."""
POLES["logit"] = lambda x: aten.logit(aten.mul(size(unit(x)), 0.9))
OUTSIDE: dict[str, Function] = {"acosh": above("acosh")}
"""Not a number at zero."""

RANDOM: dict[str, Function] = {
    name: (lambda x, name=name: aten.add(aten.mul(aten.nan_to_num(getattr(aten, name)(x)), 0.0), x))
    for name in ("empty_like", "rand_like", "randn_like")
}
RANDOM["bernoulli"] = lambda x: aten.bernoulli(real(aten.ge(x, 0), x))

IN_PLACE = "relu sigmoid tanh abs exp neg square silu hardswish leaky_relu elu floor cos".split()


def unary() -> list[Case]:
    cases = []
    for name, f in {**KEEP, **LOSE, **RANDOM}.items():
        cases += [last(name, f), weight(name, f)]
    for name, f in POLES.items():
        cases += [
            last(name, f, "zero", "at zero"),
            last(name, lambda x, name=name: getattr(aten, name)(aten.mul(positive(x), 0.5)), 6, "away from zero"),
        ]
    cases += [last("acosh", lambda x: aten.acosh(aten.add(size(x), 1.0)), 6, "away from zero"), last("acosh", OUTSIDE["acosh"], "zero")]
    for name in IN_PLACE:
        cases.append(last(f"{name}_", lambda x, name=name: getattr(aten, f"{name}_")(x), 6, "in place"))
    return cases


ANY_NUMBERS = "add sub subtract mul multiply maximum minimum fmax fmin hypot atan2".split()
COMPARE = "ne lt gt less greater eq le ge less_equal greater_equal".split()
DIVIDE = "div divide true_divide floor_divide remainder fmod".split()
LOGICAL = "logical_and logical_or logical_xor __and__ __or__ __xor__ bitwise_and bitwise_or bitwise_xor".split()


def sides(name: str, f: Function) -> list[Case]:
    """An operator of two tensors with operands of every kind."""
    vector = {**SIX, "v": (6,)}
    gate = {**SIX, "g": (1, 4)}
    return [
        pair(name, f, 6, "two branches"),
        Case(f"aten::{name}", lambda p, x: lin(f(lin(x, p.a), p.v), p.b), vector, {"a.0": 6, "v.0": 6}, label="a vector"),
        Case(f"aten::{name}", lambda p, x: lin(f(p.v, lin(x, p.a)), p.b), vector, {"a.0": 6}, label="a vector first"),
        Case(f"aten::{name}", lambda p, x: lin(f(lin(x, p.a), lin(x, p.g)), p.b), gate, {"a.0": 6}, label="a gate of size 1"),
        Case(f"aten::{name}", lambda p, x: lin(f(lin(x, p.g), lin(x, p.a)), p.b), gate, {"a.0": 6}, label="a gate of size 1 first"),
        Case(f"aten::{name}", lambda p, x, y: lin(f(lin(x, p.a), y), p.b), SIX, {"a.0": FIXED}, ((2, 5, 4), (6,)), label="an input"),
        Case(
            f"aten::{name}",
            lambda p, x: lin(f(lin(x, p.a), aten.unsqueeze(aten.select(lin(x, p.c), 1, 0), 1)), p.b),
            TWO,
            {"a.0": 6, "c.0": 6},
            label="broadcast along a middle dimension",
        ),
        Case(f"aten::{name}", lambda p, x: lin(lin(x, f(p.a, p.c)), p.b), TWO, {"a.0": 6, "c.0": 6}, label="two weights"),
    ]


def binary() -> list[Case]:
    cases = []
    for name in ANY_NUMBERS:
        cases += sides(name, lambda x, y, name=name: getattr(aten, name)(x, y))
    for name in COMPARE:
        cases += sides(name, lambda x, y, name=name: real(getattr(aten, name)(x, y), x))
        cases += [last(name, lambda x, name=name, to=to: real(getattr(aten, name)(x, to), x), 6, f"{to}") for to in (0, 0.3)]
    for name in LOGICAL:
        cases += sides(name, lambda x, y, name=name: real(getattr(aten, name)(aten.gt(x, 0.1), aten.lt(y, -0.1)), x))
    for name in DIVIDE:
        call = getattr(aten, name)
        cases += sides(name, lambda x, y, call=call: call(x, positive(y)))
        cases += [last(name, lambda x, call=call: call(x, 0.7), 6, "by a number"), pair(name, call, "divides by a value", "by zero")]
    for name in ("add", "sub", "rsub", "subtract", "mul", "multiply"):
        for other in (0, 2.0):
            cases.append(last(name, lambda x, name=name, other=other: getattr(aten, name)(x, other), 6, f"the number {other}"))
    cases += [pair("rsub", aten.rsub), pair("add", lambda x, y: aten.add(x, y, alpha=2), 6, "alpha")]
    for name in ("add_", "mul_", "sub_"):
        cases.append(pair(name, lambda x, y, name=name: getattr(aten, name)(x, y), 6, "in place"))
    cases.append(pair("div_", lambda x, y: aten.div_(x, positive(y)), 6, "in place"))
    cases.append(pair("div", lambda x, y: aten.div(x, positive(y), rounding_mode="floor"), 6, "rounding"))
    return [*cases, *powers(), *choices(), *bounds(), *residual()]


def powers() -> list[Case]:
    return [
        *[last("pow", lambda x, to=to: aten.pow(x, to), 6, f"x ** {to}") for to in (2, 3.0, 0)],
        last("pow", lambda x: aten.pow(size(x), 0.5), 6, "a root"),
        last("pow", lambda x: aten.pow(positive(x), -1.5), 6, "negative, away from zero"),
        last("pow", lambda x: aten.pow(size(x), -0.5), "zero", "negative, at zero"),
        last("pow", lambda x: aten.pow(2.0, x), 6, "of a number"),
        pair("pow", lambda x, y: aten.pow(positive(x), y), 6, "of two branches"),
        pair("pow", lambda x, y: aten.pow(size(x), unit(y)), "zero", "of two branches, at zero"),
    ]


def choices() -> list[Case]:
    """where, masked_fill, addcmul, lerp, prelu, copy."""
    three = {"a": (6, 4), "c": (6, 4), "d": (6, 4), "b": (3, 6)}

    def triple(op: str, f: Function, label: str = "") -> Case:
        fn = lambda p, x: lin(f(lin(x, p.a), lin(x, p.c), lin(x, p.d)), p.b)
        return Case(f"aten::{op}", fn, three, {"a.0": 6, "c.0": 6, "d.0": 6}, label=label)

    def masked(op: str, f: Function, label: str) -> Case:
        fn = lambda p, x, y: lin(f(lin(x, p.a), aten.gt(y, 0)), p.b)
        return Case(f"aten::{op}", fn, SIX, {"a.0": 6}, ((2, 5, 4), (5, 1)), label=label)

    def slope(rank: int, count: int) -> Case:
        shape = (2, 4) if rank == 2 else (2, 4, *(3,) * (rank - 2))
        kernel = (1,) * (rank - 2)
        mix = [None, None, aten.linear, aten.conv1d, aten.conv2d][rank]
        params = {"a": (6, 4, *kernel), "s": (count,), "b": (3, 6, *kernel)}
        return Case(
            "aten::prelu", lambda p, x: mix(aten.prelu(mix(x, p.a), p.s), p.b), params, {"a.0": 6}, (shape,), label=f"{rank} {count}"
        )

    return [
        triple("where", lambda x, y, z: aten.where(aten.gt(x, 0), y, z), "three branches"),
        masked("where", lambda x, mask: aten.where(mask, x, aten.neg(x)), "a mask of another shape"),
        masked("where", lambda x, mask: aten.where(mask, x, 0.0), "or 0"),
        masked("where", lambda x, mask: aten.where(mask, x, 1.0), "or 1"),
        masked("where", lambda x, mask: aten.where(mask, -2.0, x), "or -2 first"),
        last("where", lambda x: real(aten.where(aten.gt(x, 0), 1.0, 0.0), x), 6, "two numbers"),
        masked("masked_fill", lambda x, mask: aten.masked_fill(x, mask, 0.0), "with 0"),
        masked("masked_fill", lambda x, mask: aten.masked_fill(x, mask, -1.0), "with -1"),
        masked("masked_fill_", lambda x, mask: aten.masked_fill_(x, mask, -1.0), "in place"),
        pair("masked_fill", lambda x, y: aten.masked_fill(x, aten.gt(y, 0), 0.0), 6, "by a branch"),
        triple("addcmul", lambda x, y, z: aten.addcmul(x, y, z, value=0.5)),
        triple("lerp", aten.lerp, "tensor weight"),
        pair("lerp", lambda x, y: aten.lerp(x, y, 0.3), 6, "number weight"),
        *[slope(rank, count) for rank in (2, 3, 4) for count in (1, 6)],
        pair("copy", aten.copy),
        pair("copy_", aten.copy_, 6, "in place"),
    ]


def bounds() -> list[Case]:
    limits = {"within": (-0.3, 0.4), "above": (0.2, 0.6), "below": (-0.6, -0.2)}
    cases = []
    for name in ("clamp", "clip", "hardtanh"):
        for label, (low, high) in limits.items():
            cases.append(last(name, lambda x, name=name, low=low, high=high: getattr(aten, name)(x, low, high), 6, label))
    for low in (-0.2, 0.2):
        cases.append(last("clamp_min", lambda x, low=low: aten.clamp_min(x, low), 6, f"{low}"))
        cases.append(last("clamp_max", lambda x, low=low: aten.clamp_max(x, low), 6, f"{low}"))
        cases.append(last("clamp", lambda x, low=low: aten.clamp(x, low), 6, f"from {low}"))
    cases.append(pair("clamp", aten.clamp, 6, "by a branch"))
    for limit, value in ((0.1, 0.0), (0.1, 2.0), (-0.1, 2.0), (0.0, 2.0)):
        cases.append(last("threshold", lambda x, t=limit, v=value: aten.threshold(x, t, v), 6, f"{limit} {value}"))
    return cases


def residual() -> list[Case]:
    """Several operators whose zeros meet: a gate brings a lost zero back, a sum keeps it only if both sides are."""

    def gated(p: Net, x: Tensor) -> Tensor:
        return lin(aten.mul(lin(x, p.a), aten.sigmoid(lin(x, p.c))), p.b)

    def summed(p: Net, x: Tensor) -> Tensor:
        return lin(aten.add(lin(x, p.a), aten.exp(lin(x, p.c))), p.b)

    return [
        Case("aten::mul", gated, TWO, {"a.0": 6, "c.0": 6}, label="a lost zero regained"),
        Case("aten::add", summed, TWO, {"a.0": 6, "c.0": 6}, label="a zero and no zero"),
    ]


def factories() -> list[Case]:
    """Tensors that the graph fills with one number follow whatever they meet; others are of a fixed size."""

    def beside(name: str, make: Function) -> list[Case]:
        op = f"aten::{name}"
        joined = lambda p, x: lin(aten.add(h := lin(x, p.a), aten.to(make(h, h.shape), h.dtype)), p.b)
        scaled = lambda p, x: lin(aten.mul(h := lin(x, p.a), aten.to(make(h, h.shape[-1:]), h.dtype)), p.b)
        return [Case(op, joined, SIX, {"a.0": 6}, label="added"), Case(op, scaled, SIX, {"a.0": 6}, label="a vector multiplied")]

    def fixed(name: str, make: Function) -> Case:
        fn = lambda p, x: lin(aten.add(h := lin(x, p.a), aten.to(make(h), h.dtype)), p.b)
        return Case(f"aten::{name}", fn, SIX, {"a.0": FIXED})

    filled = [
        *beside("zeros", lambda h, shape: aten.zeros(shape)),
        *beside("ones", lambda h, shape: aten.ones(shape)),
        *beside("full", lambda h, shape: aten.full(shape, 0.5)),
        *beside("new_zeros", aten.new_zeros),
        *beside("new_ones", aten.new_ones),
        *beside("new_full", lambda h, shape: aten.new_full(h, shape, 0.5)),
    ]
    sized = {
        "arange": lambda h: aten.arange(6),
        "linspace": lambda h: aten.linspace(0, 1, 6),
        "eye": lambda h: aten.slice(aten.eye(6), 0, 0, 5),
        "empty": lambda h: aten.empty([6]),
        "new_empty": lambda h: aten.new_empty(h, [6]),
        "rand": lambda h: aten.rand([6]),
        "randn": lambda h: aten.randn([6]),
        "randint": lambda h: aten.randint(5, [6]),
        "randperm": lambda h: aten.randperm(6),
        "empty_strided": lambda h: aten.empty_strided([6], [1]),
        "new_empty_strided": lambda h: aten.new_empty_strided(h, [6], [1]),
        "hann_window": lambda h: aten.hann_window(6),
        "normal": lambda h: aten.normal(aten.zeros([6]), 1.0),
    }
    scalar = lambda x: aten.mul(x, aten.to(aten.scalar_tensor(2.0), x.dtype))
    return [*filled, *[fixed(name, make) for name, make in sized.items()], last("scalar_tensor", scalar)]


POINTWISE = [*unary(), *binary(), *factories()]
