"""Graphs as JSON: exact round trips, deterministic bytes, and refusal of everything that isn't a tensor operator."""

from __future__ import annotations

import json
import math
import operator

import pytest
import torch
from torch import fx

from geta.errors import CheckpointError
from geta.export.graph_json import graph_from_json, graph_to_json, resolve_target, target_name
from geta.graph.capture import capture
from nets import NETS

aten = torch.ops.aten


def through_text(data):
    return json.loads(json.dumps(data, allow_nan=False))


def small_graph():
    """Every kind of value that can be saved, in one graph."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example"] = {"shape": [2, 3], "dtype": "float32"}
    graph.placeholder("flag").meta["val"] = True
    w = graph.get_attr("layer1.0.weight")
    size = graph.call_function(aten.sym_size.int, (x, 0))
    half = graph.call_function(operator.floordiv, (size, 2))
    y = graph.call_function(aten.linear.default, (x, w, None))
    y.meta["module_path"] = "layer1.0"
    y = graph.call_function(aten.clamp.default, (y, float("-inf"), 1e-5))
    y = graph.call_function(aten.to.dtype_layout, (y,), {"dtype": torch.float64, "layout": torch.strided, "device": torch.device("cpu")})
    y = graph.call_function(aten.clone.default, (y,), {"memory_format": torch.contiguous_format})
    parts = graph.call_function(aten.split_with_sizes.default, (y, [1, 2], 1))
    first = graph.call_function(operator.getitem, (parts, 0))
    mixed = graph.call_function(aten.div.Tensor_mode, (first, 0.1), {"rounding_mode": "floor"})
    padded = graph.call_function(aten.constant_pad_nd.default, (mixed, (0, 1), math.nan))
    graph.output((padded, [half, slice(None, 3, None), True, -7, -0.0]))
    return graph


def describe(graph):
    return [(n.op, n.target, str(n.args), str(n.kwargs), n.meta) for n in graph.nodes]


def test_every_kind_of_value_survives():
    graph = small_graph()
    data = graph_to_json(graph)
    back = graph_from_json(through_text(data))
    assert describe(back) == describe(graph)
    assert graph_to_json(back) == data
    clamp = next(node for node in back.nodes if node.target is aten.clamp.default)
    assert clamp.args[1:] == (-math.inf, 1e-5)
    minus_zero = back.output_node().args[0][1][-1]
    assert math.copysign(1.0, minus_zero) == -1.0


@pytest.mark.parametrize("name", [name for name in NETS if name != "resnet56"])  # the same operators as resnet20, three times over
def test_captured_networks_survive_and_give_the_same_bytes(name):
    model, args, kwargs = NETS[name]()
    graph = capture(model, args, kwargs).graph
    text = json.dumps(graph_to_json(graph))
    back = graph_from_json(json.loads(text))
    assert [node.op for node in back.nodes] == [node.op for node in graph.nodes]
    assert [node.target for node in back.nodes] == [node.target for node in graph.nodes]
    assert json.dumps(graph_to_json(back)) == text


def test_a_loaded_graph_computes_the_same():
    model, args, kwargs = NETS["resnet20_conv"]()
    captured = capture(model, args, kwargs)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers()) | dict(captured.constants)
    back = graph_from_json(through_text(graph_to_json(captured.graph)))
    inputs = [
        tensors[captured.tensor_names[n.name]] if n.name in captured.tensor_names else args[0] for n in back.find_nodes(op="placeholder")
    ]
    with torch.no_grad():
        (result,) = fx.Interpreter(fx.GraphModule({}, back)).run(*inputs)
        assert torch.equal(result, model(*args))


def test_devices_are_saved_as_cpu():
    graph = fx.Graph()
    graph.output(graph.call_function(aten.zeros.default, ([2],), {"device": torch.device("cuda", 1)}))
    assert "cuda" not in json.dumps(graph_to_json(graph))
    zeros = next(iter(graph_from_json(graph_to_json(graph)).nodes))
    assert zeros.kwargs["device"] == torch.device("cpu")


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default",
        "aten.save.default",
        "aten.set_.source_Storage",
        "aten.resize_.default",
        "aten.manual_seed.default",
        "aten.no_such_op.default",
        "aten.add",
        "aten.add.__class__",
        "aten.__class__.default",
        "prim.device.default",
        "os.system",
        "operator.methodcaller",
        "operator.attrgetter",
        "builtins.eval",
        "torch.load",
        "math.pi",
        "",
        7,
        None,
    ],
)
def test_other_targets_are_refused(name):
    with pytest.raises(CheckpointError):
        resolve_target(name)


@pytest.mark.parametrize("target", [torch.relu, len, torch.nn.functional.relu, print, torch.ops.prims.add.default])
def test_other_targets_are_not_saved(target):
    with pytest.raises(CheckpointError):
        target_name(target)


def test_names_and_targets_are_inverse():
    for target in (aten.conv2d.padding, aten.add_.Tensor, torch.ops.geta.dequantize.default, operator.mul, math.ceil, torch.sym_max):
        assert resolve_target(target_name(target)) is target


def altered(change):
    data = through_text(graph_to_json(small_graph()))
    change(data["nodes"])
    return data


def call_at(nodes, target):
    return next(node for node in nodes if node[0] == "call" and node[1] == target)


@pytest.mark.parametrize(
    "change",
    [
        lambda nodes: nodes.clear(),
        lambda nodes: nodes.pop(),
        lambda nodes: nodes.append(nodes[0]),
        lambda nodes: nodes.insert(0, ["call_module", "a"]),
        lambda nodes: nodes.insert(0, "placeholder"),
        lambda nodes: nodes.insert(0, []),
        lambda nodes: nodes.insert(0, [["placeholder"], "a", None]),
        lambda nodes: nodes[0].pop(),
        lambda nodes: nodes[0].__setitem__(1, "a b"),
        lambda nodes: nodes[0].__setitem__(1, "lambda"),
        lambda nodes: nodes[0].__setitem__(1, "x): import os  #"),
        lambda nodes: nodes[0].__setitem__(2, {"shape": [-1], "dtype": "float32"}),
        lambda nodes: nodes[0].__setitem__(2, {"shape": 3, "dtype": "float32"}),
        lambda nodes: nodes[0].__setitem__(2, {"shape": [3], "dtype": "load"}),
        lambda nodes: nodes[0].__setitem__(2, [2, 3]),
        lambda nodes: nodes[1].__setitem__(2, {"value": [1]}),
        lambda nodes: nodes[2].__setitem__(1, 3),
        lambda nodes: nodes[2].__setitem__(1, "a'); print('b"),
        lambda nodes: nodes[2].__setitem__(1, "a..b"),
        lambda nodes: call_at(nodes, "aten.linear.default")[2].__setitem__(0, {"n": 99}),
        lambda nodes: call_at(nodes, "aten.linear.default")[2].__setitem__(0, {"n": -1}),
        lambda nodes: call_at(nodes, "aten.linear.default")[2].__setitem__(0, {"n": True}),
        lambda nodes: call_at(nodes, "aten.linear.default")[2].__setitem__(0, {"n": "x"}),
        lambda nodes: call_at(nodes, "aten.linear.default")[2].append(None),
        lambda nodes: call_at(nodes, "aten.linear.default")[3].__setitem__("input", None),
        lambda nodes: call_at(nodes, "aten.linear.default")[3].__setitem__("a b", None),
        lambda nodes: call_at(nodes, "aten.linear.default").__setitem__(4, 3),
        lambda nodes: call_at(nodes, "aten.linear.default").__setitem__(2, {"t": []}),
        lambda nodes: call_at(nodes, "aten.linear.default").__setitem__(3, []),
        lambda nodes: nodes[-1].__setitem__(1, {"f": "1.0"}),
        lambda nodes: nodes[-1].__setitem__(1, {"f": ["inf"]}),
        lambda nodes: nodes[-1].__setitem__(1, {"t": 1}),
        lambda nodes: nodes[-1].__setitem__(1, {"s": [1, 2]}),
        lambda nodes: nodes[-1].__setitem__(1, {"dtype": "load"}),
        lambda nodes: nodes[-1].__setitem__(1, {"layout": []}),
        lambda nodes: nodes[-1].__setitem__(1, {"device": "cuda"}),
        lambda nodes: nodes[-1].__setitem__(1, {"pickle": "gASV"}),
        lambda nodes: nodes[-1].__setitem__(1, {"n": 0, "t": []}),
        lambda nodes: nodes[-1].__setitem__(1, {}),
        lambda nodes: nodes[-1].__setitem__(1, 1 << 64),
        lambda nodes: nodes[-1].__setitem__(1, math.nan),
    ],
)
def test_damaged_graphs_are_refused(change):
    data = altered(change)
    with pytest.raises(CheckpointError):
        graph_from_json(data)


@pytest.mark.parametrize("data", [None, [], {}, {"nodes": {}}, {"nodes": [], "more": 1}, "nodes"])
def test_what_is_not_a_graph_is_refused(data):
    with pytest.raises(CheckpointError):
        graph_from_json(data)


@pytest.mark.parametrize("value", [object(), 1j, 1 << 70, {1: 2}, torch.zeros(1), torch.sparse_coo])
def test_values_that_could_not_be_loaded_are_not_saved(value):
    graph = fx.Graph()
    graph.output(None)
    graph.output_node().args = (value,)
    with pytest.raises(CheckpointError, match="can't be saved"):
        graph_to_json(graph)


def test_module_calls_are_not_saved():
    graph = fx.Graph()
    graph.output(graph.call_method("relu", (graph.placeholder("x"),)))
    with pytest.raises(CheckpointError, match="call_method"):
        graph_to_json(graph)
