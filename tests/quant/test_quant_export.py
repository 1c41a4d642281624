"""The operators inside PyTorch's tracing: one node each, any batch size, all registrations consistent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from geta.quant import Bits, Fourier, Quantizer, quantize

opcheck = torch.library.opcheck


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("shape", [(), (4, 1, 1)])
def test_operator_registrations(signed: bool, linear: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6, requires_grad=True)
    parameters = [torch.full(shape, number, requires_grad=True) for number in (0.1, 1.0, 1.2)]
    result = opcheck(torch.ops.geta.fake_quantize.default, (x, *parameters, signed, linear, [0.15, 0.02]))
    assert set(result.values()) == {"SUCCESS"}
    plain = [tensor.detach() for tensor in (torch.randn(4, 5, 6), x, *parameters)]
    result = opcheck(torch.ops.geta.fake_quantize_backward.default, (*plain, signed, linear, [0.15, 0.02]))
    assert set(result.values()) == {"SUCCESS"}


def test_half_and_strided_registrations() -> None:
    parameters = [torch.tensor(number, requires_grad=True) for number in (0.1, 1.0, 1.0)]
    for x in (torch.randn(3, 4).bfloat16(), torch.randn(4, 3).T, torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)):
        result = opcheck(torch.ops.geta.fake_quantize.default, (x.detach().requires_grad_(), *parameters, True, True, []))
        assert set(result.values()) == {"SUCCESS"}


def test_dequantize_registration() -> None:
    codes = torch.randint(-7, 8, (4, 5), dtype=torch.int8)
    result = opcheck(torch.ops.geta.dequantize.default, (codes, torch.rand(4, 1, requires_grad=True), 4))
    assert set(result.values()) == {"SUCCESS"}


def fake_nodes(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if node.target is torch.ops.geta.fake_quantize.default]


@pytest.mark.parametrize("linear", [True, False])
def test_export_keeps_one_node_per_quantizer(linear: bool) -> None:
    quantizer = Quantizer("x", "activation", Bits(4, 8), torch.tensor(1.0), linear=linear, surrogate=Fourier((0.21,)))
    x = torch.randn(3, 4)
    program = torch.export.export(quantizer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert calls == fake_nodes(program)
    assert len(calls) == 1
    assert list(calls[0].args[4:]) == [True, linear, [0.21]]
    larger = torch.randn(7, 4)
    assert torch.equal(program.module()(larger), quantizer(larger))


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch's own, in run_decompositions
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_quantized_model_with_dynamic_batch(strict: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5)).eval()
    x = torch.randn(3, 3, 6, 6)
    quantize(model, calibration=[x], exclude=())
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic, strict=strict)
    assert len(fake_nodes(program)) == 4
    larger = torch.randn(5, 3, 6, 6)
    assert torch.equal(program.module()(larger), model(larger))
    assert len(fake_nodes(program.run_decompositions({}))) == 4


def test_traced_backward_is_one_node() -> None:
    parameters = [torch.tensor(number, requires_grad=True) for number in (0.1, 1.0, 1.0)]

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        y = torch.ops.geta.fake_quantize(x, *parameters, True, True, [0.21])
        return torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))

    graph = make_fx(gradients)(torch.randn(3, 4, requires_grad=True)).graph
    targets = [node.target for node in graph.nodes if getattr(node.target, "namespace", "") == "geta"]
    assert targets == [torch.ops.geta.fake_quantize.default, torch.ops.geta.fake_quantize_backward.default]
