"""The quantizers of a graph are listed as branches attached to parameters or inserted between operators, and shown."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from torch import Tensor, nn

from geta.graph import DependencyGraph, analyze
from geta.graph.branches import QuantizerBranch, summary
from geta.quant import Bits, quantize

decomposed = torch.ops.quantized_decomposed


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()


def quantized(granularity: str) -> DependencyGraph:
    x = torch.randn(2, 3, 8, 8)
    model = quantize(small(), weights=Bits(4, 8), activations=Bits(8, 8), granularity=granularity, calibration=[x])  # type: ignore[arg-type]
    return analyze(model, (x,))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_branches_of_geta(granularity: str) -> None:
    branches = quantized(granularity).quantizers
    attached = [branch for branch in branches if branch.kind == "attached"]
    inserted = [branch for branch in branches if branch.kind == "inserted"]
    assert [(branch.tensor, branch.module) for branch in attached] == [("0.weight", "0"), ("3.weight", "3")]
    assert [(branch.tensor, branch.module) for branch in inserted] == [("", "0.input_quantizer"), ("", "3.input_quantizer")]
    assert {branch.operator for branch in branches} == {"geta::fake_quantize"}
    assert {branch.granularity for branch in attached} == {granularity}
    assert {branch.granularity for branch in inserted} == {"tensor"}
    assert {branch.bits for branch in branches} == {None}  # they are learned


def test_a_float_model_has_none() -> None:
    graph = analyze(small(), (torch.randn(2, 3, 8, 8),))
    assert graph.quantizers == ()
    assert "quantizers" not in str(graph)
    assert json.loads(graph.to_json())["quantizers"] == []


def test_shown_in_table_json_and_dot() -> None:
    graph = quantized("channel")
    line = next(line for line in str(graph).splitlines() if line.startswith("quantizers:"))
    assert line == (
        "quantizers: 2 attached to parameters, 2 inserted on activations (geta::fake_quantize per tensor, geta::fake_quantize per channel)"
    )
    record = json.loads(graph.to_json())["quantizers"]
    assert [entry["kind"] for entry in record] == ["inserted", "attached"] * 2
    assert set(record[0]) == {"kind", "tensor", "module", "operator", "granularity", "bits"}
    dot = graph.to_dot()
    assert dot.count("shape=note") == 2 and dot.count("shape=diamond") == 2
    assert 'label="0.weight\\nlearned bits per channel"' in dot
    assert dot.count("style=dashed") == 4


class One(nn.Module):
    """A linear layer [B, 16] -> [B, 8] behind one quantizer for its weight and one for its input."""

    def __init__(self, weight: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.value = weight, value
        self.linear = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.value(x), self.weight(self.linear.weight), self.linear.bias)


def in_groups(x: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (4, 4))
    scale = (blocks.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-8)
    return ((blocks / scale).round().clamp(-7, 7) * scale).flatten(-2)


def by_rows(x: Tensor) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-8)
    return (x / scale).round().clamp(-127, 127) * scale


def by_a_number(x: Tensor) -> Tensor:
    return (x / 0.25).round().clamp(0, 15) * 0.25


def by_channel(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_channel_affine(x, torch.full((8,), 0.1), torch.zeros(8, dtype=torch.int32), 0, -8, 7)


def as_exported(x: Tensor) -> Tensor:
    codes = decomposed.quantize_per_tensor.default(x, 0.02, 0, -128, 127, torch.int8)
    return decomposed.dequantize_per_tensor.default(codes, 0.02, 0, -128, 127, torch.int8)


@pytest.mark.parametrize(
    ("weight", "value", "expected"),
    [
        (by_channel, as_exported, [("aten::fake_quantize_per_channel_affine", "channel", 4), ("quantized_decomposed::", "tensor", 8)]),
        (by_rows, by_rows, [("written out", "channel", 8), ("written out", "token", 8)]),
        (in_groups, by_a_number, [("written out", "group", 4), ("written out", "tensor", 4)]),
    ],
)
def test_branches_of_others(
    weight: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor], expected: list[tuple[str, str, int]]
) -> None:
    branches = analyze(One(weight, value), (torch.randn(3, 16),)).quantizers
    by_kind = {branch.kind: branch for branch in branches}
    assert len(branches) == 2
    assert by_kind["attached"].tensor == "linear.weight"
    for kind, (operator, granularity, bits) in zip(("attached", "inserted"), expected, strict=True):
        found = by_kind[kind]
        assert found.operator.startswith(operator)
        assert (found.granularity, found.bits) == (granularity, bits)


def test_rounding_alone_is_no_quantizer() -> None:
    assert analyze(One(lambda w: (w * 3).round() * 0.5, lambda x: x.round().clamp(0, 3)), (torch.randn(3, 16),)).quantizers == ()


def test_a_parameter_read_twice_has_one_branch() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.relu(self.inner(x)))

    graph = analyze(quantize(Tied(), weights=8, activations=None), (torch.randn(3, 6),))
    assert [branch.tensor for branch in graph.quantizers] == ["inner.weight"]


def test_summary_leaves_out_what_there_is_none_of() -> None:
    attached = QuantizerBranch("attached", "a.weight", "a", "geta::fake_quantize", "tensor", None)
    assert summary([]) == ""
    assert summary([attached]) == "quantizers: 1 attached to parameters (geta::fake_quantize per tensor)"
