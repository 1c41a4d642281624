"""Products, convolutions, sums and broadcasts on random layouts: with the shortcuts as without, to the last stride, or the same error."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fake_calls import both
from geta.graph.shortcut_sizes import BINARY, SCALAR
from random_layouts import laid_out

_aten = torch.ops.aten


@pytest.mark.parametrize("operator", [_aten.mm.default, _aten.bmm.default, _aten.addmm.default], ids=str)
def test_products(operator):
    rng = random.Random(3)
    for _ in range(30):
        batch, rows, inner, columns = 2, rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 4)
        wrong = inner + (rng.random() < 0.1)
        a, b = torch.randn(batch, rows, inner), torch.randn(batch, wrong, columns)
        if operator is _aten.bmm.default:
            given = [a, b if rng.random() < 0.5 else torch.randn(batch, columns, wrong).transpose(1, 2)]
        else:
            given = [a[0], b[0] if rng.random() < 0.5 else b[0].double()]
        if operator is _aten.addmm.default:
            given = [torch.randn(rng.choice((columns, 1))), *given]
        fast, slow = both(operator, *given)
        if isinstance(slow, list):
            assert fast == slow
        else:
            assert isinstance(fast, type)


def layout(rng: random.Random, x: Tensor) -> Tensor:
    """The same values, laid out in one of the ways that users have."""
    if x.dim() != 4 or rng.random() < 0.6:
        return x
    if rng.random() < 0.5:
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(2, 3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_convolutions(spatial, device):
    rng = random.Random(spatial)
    good = 0
    for _ in range(40):
        groups, inputs, outputs = rng.choice((1, 1, 2, 3)), rng.randint(1, 3), rng.randint(1, 3)
        if rng.random() < 0.3:
            inputs = 1  # one channel per group: depthwise
        kernel = [rng.choice((1, 2, 3)) for _ in range(spatial)]
        sizes = [rng.choice((1, 3, 5, 8)) for _ in range(spatial)]
        x = layout(rng, torch.randn(2, inputs * groups + (rng.random() < 0.05), *sizes, device=device))
        weight = layout(rng, torch.randn(outputs * groups, inputs, *kernel, device=device))
        bias = rng.choice((None, torch.randn(outputs * groups, device=device), torch.randn(outputs * groups + 1, device=device)))
        numbers = [[rng.choice(values) for _ in range(spatial)] for values in ((1, 1, 2), (0, 1, 2), (1, 1, 2))]
        given = [x, weight, bias, *numbers, rng.random() < 0.1, [0] * spatial, groups]
        fast, slow = both(_aten.convolution.default, *given)
        if isinstance(slow, list):
            assert fast == slow, [(arg.shape, arg.stride()) if isinstance(arg, Tensor) else arg for arg in given]
            good += 1
        else:
            assert isinstance(fast, type)
    assert good > 8


def test_concatenations():
    rng = random.Random(11)
    for _ in range(50):
        x = laid_out(rng)
        dim = rng.randrange(-x.dim(), x.dim())
        parts = [
            rng.choice((lambda x: x, lambda x: x.clone(), lambda x: x.relu(), lambda x: x.double(), lambda x: x[..., :1])) for _ in range(2)
        ]
        fast, slow = both(lambda x, dim=dim, parts=parts: _aten.cat.default([x, *(part(x) for part in parts)], dim), x)
        assert fast == slow, (x.shape, x.stride(), dim)


def test_concatenations_with_the_symbolic_size_anywhere():
    for seed in range(40):

        def call(x: Tensor, seed: int = seed) -> Tensor:
            rng = random.Random(seed)
            y = x.permute(rng.sample(range(x.dim()), x.dim()))
            y = y.contiguous() if rng.random() < 0.7 else y
            return _aten.cat.default([y, y.relu(), y] if rng.random() < 0.8 else [y], rng.randrange(x.dim()))

        fast, slow = both(call, laid_out(random.Random(seed)))
        assert fast == slow, seed


@pytest.mark.parametrize("operator", [_aten.mean.dim, _aten.sum.dim_IntList, _aten.amax.default, _aten.amin.default], ids=str)
def test_reductions(operator):
    rng = random.Random(13)
    for _ in range(50):
        x = laid_out(rng)
        dims = rng.sample(range(-x.dim(), x.dim()), rng.randint(0, x.dim()))
        given = [dims or rng.choice(([], None if operator in (_aten.mean.dim, _aten.sum.dim_IntList) else [])), rng.random() < 0.5]
        fast, slow = both(operator, x, *given)
        assert fast == slow, (x.shape, x.stride(), given)


def test_norms():
    rng = random.Random(19)
    for _ in range(40):
        x = laid_out(rng)
        if 1 in x.shape:  # the stride of a dimension with one element means nothing, and PyTorch's own ways of finding it differ
            x = x.clone(memory_format=torch.contiguous_format)
        dims = rng.sample(range(x.dim()), rng.randint(0, x.dim()))
        fast, slow = both(_aten.linalg_vector_norm.default, x, rng.choice((1, 2, 0.5, float("inf"))), dims or None, rng.random() < 0.5)
        assert fast == slow, (x.shape, x.stride(), dims)


@pytest.mark.parametrize("operator", BINARY, ids=str)
def test_binary(operator):
    rng = random.Random(5)
    for _ in range(60):
        x = laid_out(rng)
        others = [x.clone(), x, 2.0, 3, torch.randn(x.shape[-1]), torch.tensor(2.0), torch.arange(x.shape[-1]), x.double(), 1j, True]
        fast, slow = both(operator, x, rng.choice(others))
        assert fast == slow


@pytest.mark.parametrize("operator", SCALAR, ids=str)
def test_with_a_number(operator):
    rng = random.Random(23)
    for _ in range(40):
        x = laid_out(rng)
        fast, slow = both(operator, x, rng.choice((2.0, 3, 1j, True)))
        assert fast == slow


@pytest.mark.parametrize("operator", BINARY, ids=str)
def test_broadcasts(operator):
    rng = random.Random(17)
    for _ in range(60):
        x = laid_out(rng)
        kept = [dim for dim in range(x.dim()) if rng.random() < 0.5]
        others = [
            lambda x, kept=kept: x.mean(kept, keepdim=True) if kept else x,
            lambda x: x.unsqueeze(-1),
            lambda x: x.flatten(1).mean(1).view(-1, *[1] * (x.dim() - 1)),
            lambda x: x[:1],
            lambda x: x[..., :1].clone(),
            lambda x: torch.ones(x.shape[1:], dtype=x.dtype),
        ]
        other, swap = rng.choice(others), rng.random() < 0.5
        fast, slow = both(lambda x, other=other, swap=swap: operator(*((other(x), x) if swap else (x, other(x)))), x)
        assert fast == slow, (x.shape, x.stride(), kept)
