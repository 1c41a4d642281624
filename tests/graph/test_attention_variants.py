"""Attention written in the ways that real code writes it: whatever the layout, whole heads are found and go exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geta
from geta.graph.labels import squeezed

HEADS, WIDTH = 4, 8


class Attention(nn.Module):
    def __init__(self, layout: str) -> None:
        super().__init__()
        size = HEADS * WIDTH
        kv = size if layout in ("per head", "partial rotary", "rotary to the end", "bias per head") else WIDTH
        self.qkv = nn.Linear(16, size + 2 * kv)
        self.out = nn.Linear(size, 16)
        self.bias = nn.Parameter(torch.randn(HEADS, 1, 1))
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = LAYOUTS[self.layout](self, self.qkv(x), b, s)
        mask = self.bias.expand(HEADS, s, s) if self.layout == "bias per head" else None
        y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=self.layout == "one key, enable_gqa")
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


def _per_head(_: Attention, h: Tensor, b: int, s: int) -> tuple[Tensor, ...]:
    return h.view(b, s, HEADS, 3 * WIDTH).transpose(1, 2).chunk(3, -1)


def _rotated(t: Tensor, count: int) -> Tensor:
    """Rotary embedding on the first `count` channels of every head."""
    angle = torch.arange(t.shape[-2]).float()[:, None] * torch.ones(count)
    turned, rest = t[..., :count], t[..., count:]
    half = torch.cat([-turned[..., count // 2 :], turned[..., : count // 2]], -1)
    return torch.cat([turned * angle.cos() + half * angle.sin(), rest], -1)


def _partial(module: Attention, h: Tensor, b: int, s: int) -> tuple[Tensor, ...]:
    q, k, v = _per_head(module, h, b, s)
    return _rotated(q, 4), _rotated(k, 4), v


def _whole(module: Attention, h: Tensor, b: int, s: int) -> tuple[Tensor, ...]:
    q, k, v = _per_head(module, h, b, s)
    return _rotated(q, WIDTH), _rotated(k, WIDTH), v  # the rest is an empty tensor


def _one_key(_: Attention, h: Tensor, b: int, s: int) -> tuple[Tensor, ...]:
    q, k, v = h.split([HEADS * WIDTH, WIDTH, WIDTH], -1)
    k, v = (t.view(b, s, 1, WIDTH).transpose(1, 2).expand(b, HEADS, s, WIDTH) for t in (k, v))
    return q.view(b, s, HEADS, WIDTH).transpose(1, 2), k, v


def _one_key_gqa(_: Attention, h: Tensor, b: int, s: int) -> tuple[Tensor, ...]:
    q, k, v = h.split([HEADS * WIDTH, WIDTH, WIDTH], -1)
    return q.view(b, s, HEADS, WIDTH).transpose(1, 2), k.view(b, s, 1, WIDTH).transpose(1, 2), v.view(b, s, 1, WIDTH).transpose(1, 2)


LAYOUTS: dict[str, Callable[[Attention, Tensor, int, int], tuple[Tensor, ...]]] = {
    "per head": _per_head,
    "partial rotary": _partial,
    "rotary to the end": _whole,
    "one key": _one_key,
    "one key, enable_gqa": _one_key_gqa,
    "bias per head": _per_head,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_are_found_and_go_exactly(layout: str) -> None:
    model = Attention(layout)
    x = torch.randn(2, 5, 16)
    graph = geta.analyze(model, (x,))
    heads = [family for family in graph.prunable_families if family.unit == "heads"]
    assert [family.size for family in heads] == [HEADS], str(graph)
    small = geta.compact(model, graph, {heads[0].name: torch.tensor([True, False, True, False])})
    assert small.info.max_difference < 1e-5
    assert small.tensors()["out.weight"].shape == (16, 2 * WIDTH)


def test_a_value_head_that_all_heads_share_stays_whole_and_says_why() -> None:
    graph = geta.analyze(Attention("one key"), (torch.randn(2, 5, 16),))
    stuck = [family.reason for family in graph.families if "folded together" in family.reason]
    assert stuck


def test_labels_are_never_as_large_as_activations() -> None:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    graph = geta.analyze(Stacked(), (torch.randn(2, 50, 16),))
    found = [squeezed(freeze.labels).numel() for freeze in graph.analysis.propagation.constraints.freezes]
    assert found and max(found) <= 48
