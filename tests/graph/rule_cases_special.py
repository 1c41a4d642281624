"""Cases of operators with conventions of their own: complex numbers, Fourier, windows, recurrent layers, stored weights, quantizers."""

# ruff: noqa: E731 - a table of small functions

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graph.rule_cases_layers import chan, number
from graph.rule_cases_pointwise import SIX, TWO, Function, aten, last, lin, pair
from graph.rule_cases_structure import heads, joined
from graph.rule_contract import Case, Net, Spec

WIDE = (torch.float64, torch.float32)
SINGLE = (torch.float32,)
FIVE = {"a": (6, 4), "c": (5, 4)}


def spectral() -> list[Case]:
    """Complex numbers: real and imaginary part of an entry live and die together."""

    def of_complex(name: str, f: Function, label: str = "") -> Case:
        return pair(name, lambda x, y: f(aten.complex(x, y)), 6, label, dtypes=WIDE)

    def flat(z: Tensor) -> Tensor:
        return joined(aten.view_as_real(z))

    def made(op: str, f: Function) -> Case:
        fn = lambda p, x: lin(flat(f(lin(x, p.a), lin(x, p.c))), p.b)
        return Case(f"aten::{op}", fn, {**TWO, "b": (3, 12)}, {"a.0": 6, "c.0": 6}, dtypes=WIDE)

    def couples(x: Tensor) -> Tensor:
        return flat(aten.view_as_complex(heads(x, x.shape[-1] // 2)))

    cases = [
        last("view_as_complex", couples, 3, dtypes=WIDE),
        last("view_as_real", couples, 3, dtypes=WIDE),
        made("complex", aten.complex),
        made("polar", aten.polar),
        of_complex("real", aten.real, "complex"),
        of_complex("imag", aten.imag),
        of_complex("angle", aten.angle),
        *[
            of_complex(name, lambda z, name=name: aten.imag(getattr(aten, name)(z)))
            for name in ("conj", "_conj", "conj_physical", "_conj_physical")
        ],
        of_complex("resolve_conj", lambda z: aten.imag(aten.resolve_conj(aten._conj(z)))),
    ]
    for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
        calls: dict[str, Function] = {
            f"fft_{kind}": lambda x, kind=kind, d=1: getattr(aten, f"fft_{kind}")(x, None, d),
            f"fft_{kind}2": lambda x, kind=kind, d=1: getattr(aten, f"fft_{kind}2")(x, None, [0, d]),
            f"fft_{kind}n": lambda x, kind=kind, d=1: getattr(aten, f"fft_{kind}n")(x, None, [d]),
        }
        for name, f in calls.items():
            whole = lambda p, x, f=f: aten.real(f(lin(x, p.a), d=-1))
            cases.append(last(name, lambda x, f=f: aten.real(f(x)), 6, "along another dimension", dtypes=WIDE))
            cases.append(Case(f"aten::{name}", whole, {"a": (6, 4)}, {"a.0": "is transformed by"}, label="features", dtypes=WIDE))
    return cases


def windows() -> list[Case]:
    columns = lambda p, x: aten.conv1d(aten.im2col(aten.conv2d(x, p.a), [2, 2], [1, 1], [0, 0], [1, 1]), p.b)
    image = lambda p, x: aten.conv2d(aten.col2im(aten.conv1d(x, p.a), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]), p.b)
    return [
        last("unfold", lambda x: aten.sum(aten.unfold(x, 1, 3, 1), [-1])),
        Case("aten::unfold", lambda p, x: aten.unfold(lin(x, p.a), -1, 3, 1), {"a": (6, 4)}, {"a.0": "sliding windows"}, label="features"),
        Case("aten::im2col", columns, {"a": (6, 4, 1, 1), "b": (3, 24, 1)}, {"a.0": 6, "b.1": 6}, ((2, 4, 4, 4),)),
        Case("aten::col2im", image, {"a": (12, 4, 1), "b": (3, 3, 1, 1)}, {"a.0": 3, "b.1": 3}, ((2, 4, 9),)),
        Case(
            "aten::bilinear",
            lambda p, x: aten.bilinear(lin(x, p.a), lin(x, p.c), p.w, p.v),
            {**FIVE, "w": (3, 6, 5), "v": (3,)},
            {"a.0": 6, "c.0": 5, "w.1": 6},
        ),
        Case(
            "aten::bilinear",
            lambda p, x: lin(aten.bilinear(x, x, p.w, p.v), p.b),
            {"w": (6, 4, 4), "v": (6,), "b": (3, 6)},
            {"w.0": 6},
            label="made",
        ),
        Case("aten::vdot", lambda p, x: aten.vdot(aten.mv(p.a, x), p.v), {"a": (6, 4), "v": (6,)}, {"a.0": 6, "v.0": 6}, ((4,),)),
        last("tensor", lambda x: aten.mul(x, aten.to(aten.tensor(2.0), x.dtype))),
    ]


def recurrent() -> list[Case]:
    def layer(op: str, gates: int, *, ways: int = 1, layers: int = 1, biases: bool = True) -> Case:
        params: dict[str, Spec] = {"a": (5, 4), "b": (3, 3 * ways)}
        for depth in range(layers):
            for way in range(ways):
                at = f"{depth}{way}"
                params |= {f"wi{at}": (3 * gates, 5 if depth == 0 else 3 * ways), f"wh{at}": (3 * gates, 3)}
                params |= {f"bi{at}": (3 * gates,), f"bh{at}": (3 * gates,)} if biases else {}

        def fn(p: Net, x: Tensor) -> Tensor:
            start = aten.zeros([ways * layers, x.shape[0], p.wh00.shape[1]], dtype=x.dtype)
            weights = [getattr(p, name) for name in params if name not in ("a", "b")]
            state = [start, start] if op == "lstm" else start
            return lin(getattr(aten, op)(lin(x, p.a), state, weights, biases, layers, 0.0, False, ways == 2, True)[0], p.b)

        expect = {"wh00.1": 3, "wh00.0": 3, "a.0": 5, "wi00.1": 5}
        return Case(f"aten::{op}", fn, params, expect, label=f"{ways} ways {layers} layers {biases}", dtypes=WIDE)

    cases = []
    for op, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
        cases += [layer(op, gates), layer(op, gates, ways=2), layer(op, gates, layers=2, biases=False)]
    return cases


def stored() -> list[Case]:
    """Weights computed from stored tensors."""
    normed = {"v": (6, 4), "g": (6, 1), "b": (3, 6)}
    reads = {"a": (6, 4), "v": (3, 6), "g": (3, 1)}
    kernel = {"v": (6, 4, 3, 3), "g": (6, 1, 1, 1), "b": (3, 6, 1, 1)}
    one = {"v": (6, 4), "g": (), "b": (3, 6)}
    return [
        Case(
            "aten::_weight_norm", lambda p, x: lin(lin(x, aten._weight_norm(p.v, p.g, 0)), p.b), normed, {"v.0": 6, "g.0": 6}, label="makes"
        ),
        Case(
            "aten::_weight_norm", lambda p, x: lin(lin(x, p.a), aten._weight_norm(p.v, p.g, 0)), reads, {"a.0": 6, "v.1": 6}, label="reads"
        ),
        Case(
            "aten::_weight_norm",
            lambda p, x: aten.conv2d(aten.conv2d(x, aten._weight_norm(p.v, p.g, 0), None, [1], [1]), p.b),
            kernel,
            {"v.0": 6},
            ((2, 4, 5, 5),),
            label="a kernel",
        ),
        Case(
            "aten::_weight_norm_interface",
            lambda p, x: lin(lin(x, aten._weight_norm_interface(p.v, p.g, 0)[0]), p.b),
            normed,
            {"v.0": 6, "g.0": 6},
        ),
        Case("aten::_weight_norm", lambda p, x: lin(lin(x, aten._weight_norm(p.v, p.g, -1)), p.b), one, {"v.0": 6}, label="one norm"),
    ]


def quantizers() -> list[Case]:
    whole: Mapping[str, Spec] = {
        "s": number(0.05),
        "z": lambda g: torch.tensor(3, dtype=torch.int32),
        "on": lambda g: torch.ones(1, dtype=torch.int64),
    }
    rows: dict[str, Spec] = {
        "s": lambda g: torch.rand(6, generator=g) * 0.05 + 0.02,
        "z": lambda g: torch.randint(-5, 5, (6,), generator=g, dtype=torch.int32),
        "on": lambda g: torch.ones(1, dtype=torch.int64),
        "low": lambda g: -torch.rand(6, generator=g),
        "high": lambda g: torch.rand(6, generator=g),
    }
    single: dict[str, Spec] = {
        "on": lambda g: torch.ones(1, dtype=torch.int64),
        "low": lambda g: torch.tensor([-1.0]),
        "high": lambda g: torch.tensor([1.0]),
        "s": lambda g: torch.tensor([0.05]),
        "z": lambda g: torch.tensor([0], dtype=torch.int32),
    }

    def quantized(op: str, f: Function, buffers: Mapping[str, Spec], label: str = "a weight", expect: int | str = 6) -> Case:
        more: dict[str, Any] = {"buffers": buffers, "dtypes": SINGLE, "label": label}
        return Case(f"aten::{op}", lambda p, x: lin(lin(x, f(p.a, p)), p.b), SIX, {"a.0": expect}, **more)

    def observed(f: Function) -> Function:
        return lambda w, p: f(w, p.on, p.on, p.low, p.high, p.s, p.z, 0.1, -128, 127, 0, False, True)

    plain = lambda x, p: aten.fake_quantize_per_tensor_affine(x, 0.05, 3, -128, 127)
    return [
        quantized("fake_quantize_per_tensor_affine", plain, {}),
        chan("fake_quantize_per_tensor_affine", plain, 6, "an activation", dtypes=SINGLE),
        quantized(
            "fake_quantize_per_tensor_affine_cachemask",
            lambda x, p: aten.fake_quantize_per_tensor_affine_cachemask(x, 0.05, 3, -128, 127)[0],
            {},
        ),
        quantized(
            "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
            lambda x, p: aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(x, aten.to(p.s, x.dtype), p.z, p.on, -128, 127)[0],
            whole,
        ),
        quantized(
            "_fake_quantize_learnable_per_tensor_affine",
            lambda x, p: aten._fake_quantize_learnable_per_tensor_affine(x, p.s, p.low, -128, 127),
            {"s": lambda g: torch.tensor([0.05]), "low": lambda g: torch.tensor([1.3])},
        ),
        quantized("fake_quantize_per_channel_affine", lambda x, p: aten.fake_quantize_per_channel_affine(x, p.s, p.z, 0, -128, 127), rows),
        quantized(
            "fake_quantize_per_channel_affine_cachemask",
            lambda x, p: aten.fake_quantize_per_channel_affine_cachemask(x, p.s, p.z, 0, -128, 127)[0],
            rows,
        ),
        quantized(
            "_fake_quantize_learnable_per_channel_affine",
            lambda x, p: aten._fake_quantize_learnable_per_channel_affine(x, p.s, p.low, 0, -128, 127),
            rows,
        ),
        quantized("fused_moving_avg_obs_fake_quant", observed(aten.fused_moving_avg_obs_fake_quant), single, "observed", "range observer"),
        quantized(
            "_fused_moving_avg_obs_fq_helper",
            lambda w, p: observed(aten._fused_moving_avg_obs_fq_helper)(w, p)[0],
            single,
            "observed",
            "range observer",
        ),
    ]


SPECIAL = [*spectral(), *windows(), *recurrent(), *stored(), *quantizers()]
