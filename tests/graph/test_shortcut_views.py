"""Views on random layouts: with the shortcuts as without, to the last stride, or the same error."""

from __future__ import annotations

import random
from unittest import mock

import pytest
import torch
from torch import Tensor

from fake_calls import both
from geta.graph.shortcut_views import VIEWS
from random_layouts import laid_out

_aten = torch.ops.aten


def factors(rng: random.Random, number: int) -> list[int]:
    """The number as a product of random length, with ones in between."""
    found = []
    while number > 1:
        divisors = [d for d in range(2, number + 1) if number % d == 0]
        found.append(rng.choice(divisors))
        number //= found[-1]
    for _ in range(rng.randint(0, 2)):
        found.insert(rng.randint(0, len(found)), 1)
    return found


def arguments(rng: random.Random, name: str, x: Tensor) -> list:
    dim = rng.randrange(-x.dim(), x.dim())
    size = x.shape[dim]
    if name in {"view", "_unsafe_view"}:
        sizes = [x.shape[0], *factors(rng, x[0].numel())] if rng.random() < 0.7 else factors(rng, x.numel())
        if sizes and rng.random() < 0.4:
            sizes[rng.randrange(len(sizes))] = -1
        if rng.random() < 0.1:
            sizes.append(3)
        return [sizes]
    if name == "expand":
        sizes = [rng.choice((n, -1)) if n != 1 else rng.choice((1, 3, -1)) for n in x.shape]
        return [[*(rng.randint(1, 3) for _ in range(rng.randint(0, 2))), *sizes]]
    simple = {
        "permute": lambda: [rng.sample(range(x.dim()), x.dim())],
        "transpose": lambda: [dim, rng.randrange(-x.dim(), x.dim())],
        "t": list,
        "unsqueeze": lambda: [rng.randrange(-x.dim() - 1, x.dim() + 1)],
        "select": lambda: [dim, rng.randrange(-size, size + (rng.random() < 0.1))],
        "slice": lambda: [dim, rng.choice((None, 0, 1, -2, -9)), rng.choice((None, 1, 3, -1, 99, 2**63 - 1)), rng.choice((1, 1, 2))],
        "unbind": lambda: [dim],
        "split": lambda: [rng.randint(1, size + 1), dim],
        "split_with_sizes": lambda: [factors_of_sum(rng, size + (rng.random() < 0.1)), dim],
    }
    return simple[name]()


def factors_of_sum(rng: random.Random, number: int) -> list[int]:
    found = []
    while number > 0:
        found.append(rng.randint(1, number))
        number -= found[-1]
    return found


@pytest.mark.parametrize("operator", VIEWS, ids=str)
def test_views(operator):
    name = operator.name().partition("::")[2].partition(".")[0]
    rng = random.Random(name)
    good = 0
    for _ in range(60):
        x = laid_out(rng)
        given = arguments(rng, name, x)
        fast, slow = both(operator, x, *given)
        assert fast == slow, (x.shape, x.stride(), given)
        good += isinstance(fast, list)
    assert good > 15


def regrouped(rng: random.Random, shape: list) -> list:
    """The sizes with some neighbours joined, some split, and perhaps one left to be found out."""
    sizes: list = []
    for size in shape:
        if sizes and rng.random() < 0.4:
            sizes[-1] = sizes[-1] * size
        elif isinstance(size, int) and size > 1 and rng.random() < 0.5:
            sizes += factors(rng, size)
        else:
            sizes.append(size)
    if rng.random() < 0.2:
        sizes.insert(rng.randint(0, len(sizes)), 1)
    if sizes and rng.random() < 0.3:
        sizes[rng.randrange(len(sizes))] = -1
    return sizes


def test_views_with_the_symbolic_size_anywhere():
    good = 0
    for seed in range(120):

        def call(x: Tensor, seed: int = seed) -> Tensor:
            rng = random.Random(seed)
            y = x.permute(rng.sample(range(x.dim()), x.dim()))
            if rng.random() < 0.6:
                y = y.contiguous()
            for _ in range(2):
                y = _aten.view.default(y, regrouped(rng, list(y.shape)))
                if rng.random() < 0.3 and y.dim() > 1:
                    y = y.transpose(0, 1)
            return y

        x = laid_out(random.Random(seed))
        fast, slow = both(call, x)
        assert fast == slow, (seed, x.shape, x.stride())
        good += isinstance(fast, list)
    assert good > 60


def test_views_of_a_sequence_first_batch_need_no_reference():
    """The shapes that `nn.MultiheadAttention` and recurrent layers make."""
    x = torch.randn(4, 7, 6)

    def call(x: Tensor) -> Tensor:
        steps_first = x.transpose(0, 1).contiguous()
        heads = _aten.view.default(_aten.view.default(steps_first, [7, x.shape[0], 2, 3]), [7, x.shape[0] * 2, 3]).transpose(0, 1)
        parts = _aten.view.default(heads, [x.shape[0], 2, 7, 3])
        return _aten.view.default(_aten.view.default(parts, [x.shape[0] * 2, 7, 3]).transpose(0, 1), [7, x.shape[0], 6])

    with mock.patch("geta.graph.shortcuts._slowly", side_effect=AssertionError("went PyTorch's own way")):
        fast, slow = both(call, x)
    assert fast == slow
    assert isinstance(fast, list)


@pytest.mark.parametrize("memory_format", [None, torch.preserve_format, torch.contiguous_format, torch.channels_last])
def test_clone(memory_format):
    rng = random.Random(7)
    for _ in range(40):
        x = laid_out(rng)
        fast, slow = both(lambda x: _aten.clone.default(x, memory_format=memory_format), x)
        assert fast == slow, (x.shape, x.stride())
