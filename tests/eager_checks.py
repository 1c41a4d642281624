"""Shared by the tests of the eager product: run, zero, choose, compare."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from geta.graph import DependencyGraph, analyze
from geta.subnet import EagerProduct, compact_eager
from geta.subnet.comparison import max_difference


def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(*args, **(kwargs or {}))) if isinstance(leaf, Tensor)]


def zeroed(model: nn.Module, graph: DependencyGraph, selection: dict[str, Tensor]) -> nn.Module:
    copied = copy.deepcopy(model)
    graph.zero_(copied, selection)
    return copied


def first_of(graph: DependencyGraph, keep: int, *, only: str = "", every: int | None = None) -> dict[str, Tensor]:
    """Keep the first `keep` groups of every prunable family whose name holds `only`; family i keeps i % every + keep."""
    chosen = [family for family in graph.prunable_families if only in family.name]
    kept = [keep + (place % every if every else 0) for place in range(len(chosen))]
    return {family.name: torch.arange(family.size) >= count for family, count in zip(chosen, kept, strict=True)}


def check(model: nn.Module, args: tuple[Any, ...], selection: dict[str, Tensor] | None = None, **options: Any) -> EagerProduct:
    """Make the product and compare it with the zeroed model."""
    model.eval()
    graph = analyze(model, args, **options)
    selection = graph.random_selection(0.5, seed=1) if selection is None else selection
    assert any(bool(remove.any()) for remove in selection.values())
    product = compact_eager(model, graph, selection)
    dense, expected = outputs(model, args), outputs(zeroed(model, graph, selection), args)
    assert max_difference(dense, expected)[1] > 1e-4, "removing groups changed nothing: the test would be empty"
    assert max_difference(expected, outputs(product.model, args))[1] <= 1e-4
    assert sum(p.numel() for p in product.model.parameters()) < sum(p.numel() for p in model.parameters())
    return product
