"""Laws of zeros: what an operator is said to make of zero is what it makes of zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geta.graph.capture import capture
from geta.graph.zeros import has_pole, law

OPERATORS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "relu": (lambda w, x: w.relu(), True),
    "gelu": (lambda w, x: F.gelu(w), True),
    "view": (lambda w, x: w.view(2, 2, 4), True),
    "permute": (lambda w, x: w.permute(1, 0), True),
    "narrow": (lambda w, x: w[:, 1:3], True),
    "roll": (lambda w, x: w.roll(1, 0), True),
    "flip": (lambda w, x: w.flip(0), True),
    "expand": (lambda w, x: w.expand(3, 4, 4), True),
    "pad": (lambda w, x: F.pad(w, (1, 1)), True),
    "pad with one": (lambda w, x: F.pad(w, (1, 1), value=1.0), False),
    "product": (lambda w, x: x * w, True),
    "sum": (lambda w, x: w + x, False),
    "sum with itself": (lambda w, x: w + w, True),
    "plus one": (lambda w, x: w + 1, False),
    "minus zero": (lambda w, x: w - 0, True),
    "quotient": (lambda w, x: w / x, True),
    "square": (lambda w, x: w**2, True),
    "power zero": (lambda w, x: w**0, False),
    "clamp": (lambda w, x: w.clamp(-1, 1), True),
    "clamp above": (lambda w, x: w.clamp(0.5, 1), False),
    "threshold": (lambda w, x: F.threshold(w, 0.5, 2.0), False),
    "where": (lambda w, x: torch.where(x > 0, w, w * 2), True),
    "where else": (lambda w, x: torch.where(x > 0, w, x), False),
    "masked": (lambda w, x: w.masked_fill(x > 0, 0.0), True),
    "masked with one": (lambda w, x: w.masked_fill(x > 0, 1.0), False),
    "sigmoid": (lambda w, x: w.sigmoid(), False),
    "softmax": (lambda w, x: w.softmax(-1), False),
    "exp": (lambda w, x: w.exp(), False),
    "cos": (lambda w, x: w.cos(), False),
    "mean": (lambda w, x: w.mean(-1), True),
    "amax": (lambda w, x: w.amax(-1), True),
    "norm": (lambda w, x: F.layer_norm(w, (4,)), True),
    "glu": (lambda w, x: F.glu(w, -1), True),
    "linear": (lambda w, x: F.linear(x, w), True),
    "matmul": (lambda w, x: x @ w, True),
    "einsum": (lambda w, x: torch.einsum("ab,bc->ac", x, w), True),
    "attention": (lambda w, x: F.scaled_dot_product_attention(x[None], x[None], w[None]), True),
    "attention by keys": (lambda w, x: F.scaled_dot_product_attention(x[None], w[None], x[None]), False),
    "cat": (lambda w, x: torch.cat([w, x]), False),
    "cat with itself": (lambda w, x: torch.cat([w, w]), True),
    "pool": (lambda w, x: F.max_pool2d(w[None], 2), True),
    "upsample": (lambda w, x: F.interpolate(w[None, None], scale_factor=2.0), True),
}
"""Name -> (f(w, x), whether w = 0 makes it zero)."""


class All(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(operator(self.w, x) for operator, _ in OPERATORS.values())


def test_laws_say_what_operators_do() -> None:
    model, x = All(), torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    graph = capture(model, (x,)).graph
    zero = {node for node in graph.find_nodes(op="placeholder") if node.name != "x"}
    for node in graph.nodes:
        if node.op == "call_function" and any(all(one in zero for one in option) for option in law(node)):
            zero.add(node)
    claimed = [node in zero for node in graph.output_node().args[0]]
    nn.init.zeros_(model.w)
    found = [not bool(result.any()) for result in model(x)]
    expected = {name: keeps for name, (_, keeps) in OPERATORS.items()}
    assert dict(zip(expected, found, strict=True)) == expected
    assert dict(zip(expected, claimed, strict=True)) == expected


def test_poles_are_known() -> None:
    class Poles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x / self.w, self.w.log(), self.w.rsqrt(), self.w**-2, self.w / x, self.w**2

    graph = capture(Poles(), (torch.ones(4),)).graph
    results = graph.output_node().args[0]
    assert [len(has_pole(node)) for node in results] == [1, 1, 1, 1, 1, 0]
    assert has_pole(results[0])[0].op == "placeholder"
    assert has_pole(results[4])[0].name == "x"
