"""Views on random layouts: with the shortcuts as without, to the last stride, or the same error."""

from __future__ import annotations

import random

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


@pytest.mark.parametrize("memory_format", [None, torch.preserve_format, torch.contiguous_format, torch.channels_last])
def test_clone(memory_format):
    rng = random.Random(7)
    for _ in range(40):
        x = laid_out(rng)
        fast, slow = both(lambda x: _aten.clone.default(x, memory_format=memory_format), x)
        assert fast == slow, (x.shape, x.stride())
