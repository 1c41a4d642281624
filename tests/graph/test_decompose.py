"""The second try: an operator without a rule is replaced by what it is made of; if that fails too, its name is the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import geta
from geta.graph.capture import capture
from geta.graph.decompose import decompose


class Through(nn.Module):
    """Linear, something, linear."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], out: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(out, 3)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.function(self.first(x)))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: torch.einsum("...i,ij,jk->...k", h, torch.eye(6), torch.ones(6, 6)) * 0 + h,
        lambda h: torch.einsum("bi,bi->bi", h, h),
        lambda h: nn.functional.logsigmoid(h) + 0,
        lambda h: torch.nn.functional.cosine_similarity(h[:, None], h[:, None], dim=-1) * h,
        lambda h: torch.addcdiv(h, h, torch.full((6,), 2.0)),
        lambda h: torch.aminmax(h, dim=1, keepdim=True)[1] * 0 + h,
        lambda h: torch.stack([h, h], 2).unbind(2)[1],
    ],
    ids=["einsum of three", "einsum with repeats", "logsigmoid", "cosine", "addcdiv", "named tuple", "unbind"],
)
def test_what_decomposes_is_exact(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Through(function)
    graph = geta.analyze(model, (X,))
    small = geta.compact(model, graph, graph.random_selection(0.5, seed=1))
    assert small.info.max_difference < 1e-5


def test_einsum_of_three_operands_is_prunable_and_keeps_the_batch_open() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("...i,ij,jk->...k", self.a(x), self.b, self.c)

    model = Three()
    graph = geta.analyze(model, (X,))
    sizes = {family.name: family.size for family in graph.prunable_families}
    assert sorted(sizes.values()) == [5, 6]
    selection = graph.random_selection(0.5, seed=0)
    small = geta.compact(model, graph, selection)
    graph.zero_(model, selection)
    wide = torch.randn(11, 4)
    torch.testing.assert_close(small(wide), model(wide))


def test_the_new_operators_keep_the_module_path_and_the_symbolic_batch() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Through(lambda h: torch.einsum("ij,jk,kl->il", h, torch.eye(6), torch.eye(6)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    captured = capture(Outer(), (X,))
    node = next(node for node in captured.graph.nodes if "einsum" in node.name)
    pieces = decompose(node)
    assert isinstance(pieces, list)
    assert pieces
    assert {captured.module_path(piece) for piece in pieces} == {"inner"}
    assert all(node.name != "einsum" for node in captured.graph.nodes)
    assert any(
        isinstance(size, torch.SymInt)
        for piece in pieces
        if isinstance(piece.meta["val"], torch.Tensor)
        for size in piece.meta["val"].shape
    )


def test_an_operator_without_rule_and_decomposition_names_itself() -> None:
    graph = geta.analyze(Through(lambda h: torch.cummax(h, 1).values), (X,))
    family = next(family for family in graph.families if family.name == "first")
    assert not family.prunable
    assert "aten.cummax" in family.reason
    assert "has no rule" in family.reason


def test_a_loop_that_unrolls_into_too_much_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geta.graph.decompose.MOST_OPERATORS", 2)
    graph = geta.analyze(Through(lambda h: torch.einsum("ij,jk,kl->il", h, torch.eye(6), torch.eye(6))), (X,))
    family = next(family for family in graph.families if family.name == "first")
    assert not family.prunable
    assert "decomposes into" in family.reason
