"""Graphs for tests of the page: a quantized net, hostile names, and a made-up graph of any size."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import geta
import nets
from geta.graph.dependency import DependencyGraph
from geta.graph.families import Family, Member
from geta.graph.view import GraphView, NodeView

HOSTILE = "</script><img src=x onerror=alert(1)>"


def quantized_resnet20() -> DependencyGraph:
    """ResNet-20 with a quantizer on every weight and on every layer's input."""
    model, args, kwargs = nets.resnet20("conv")
    model = geta.quantize(model, weights=geta.Bits(4, 8), activations=geta.Bits(8, 8), calibration=[args[0]])
    return geta.analyze(model, args, kwargs)


def hostile_graph() -> DependencyGraph:
    """A model whose module name would end the page's script element if it were written as it is."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(HOSTILE, nn.Linear(4, 8))
    model.add_module("last", nn.Linear(8, 3))
    return geta.analyze(model, (torch.randn(2, 4),))


def big_graph(operators: int) -> DependencyGraph:
    """A made-up residual network: blocks of ten operators, one family each, quantizers, and a family that must stay."""
    blocks = operators // 10
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(blocks)])
    index = torch.arange(4)[:, None]
    families = [
        Family(
            f"{n}",
            "neurons",
            4,
            True,
            "",
            (Member(f"{n}.weight", 0, index, "producer", True), Member(f"{n}.bias", 0, index, "producer", True)),
        )
        for n in range(blocks - 1)
    ]
    families.append(
        Family(
            f"{blocks - 1}", "neurons", 4, False, "reaches the model output", (Member(f"{blocks - 1}.weight", 0, index, "producer", True),)
        )
    )
    nodes = [_node("x", "input", (), "", ())]
    stream = 0
    for n in range(blocks):
        start = len(nodes)
        family = (f"{n}",)
        nodes.append(
            replace(_node(f"q{n}", "geta::fake_quantize", (), f"{n}", family), branch="attached", fed=False, parameters=(f"{n}.weight",))
        )
        nodes.append(replace(_node(f"i{n}", "geta::fake_quantize", (stream,), f"{n}", ()), branch="inserted"))
        nodes.append(_node(f"linear{n}", "aten::linear", (start + 1, start), f"{n}", family))
        nodes.extend(_node(f"op{n}_{step}", "aten::relu", (start + 1 + step,), f"{n}", family) for step in range(1, 7))
        nodes.append(_node(f"add{n}", "aten::add", (len(nodes) - 1, stream), f"{n}", family))
        stream = len(nodes) - 1
    nodes.append(_node("output", "output", (stream,), "", ()))
    graph = geta.analyze(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), (torch.randn(2, 4),))
    big = replace(graph, model=model, families=families)
    big.__dict__["view"] = GraphView(tuple(nodes))  # in place of what would be found when it is first asked for
    return big


def _node(name: str, op: str, inputs: tuple[int, ...], module: str, families: tuple[str, ...]) -> NodeView:
    return NodeView(name, op, module, (("s0", 4),), "float32", inputs, (), families, "", True)
