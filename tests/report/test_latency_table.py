"""Measuring latency tables: what is timed and written down, and predictions beside measurements. No times are asserted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import geta
import geta.report.latency_table as module
from export_nets import CASES, inputs
from geta.cli.main import main
from geta.cost.derive import cost_model, network_layers
from geta.errors import ConfigError
from geta.report.latency import Latency
from geta.report.latency_families import SHARES, family_savings, savings_table
from geta.report.latency_table import check_prediction, measure_layers
from geta.report.layer_calls import _Builder, eager_call, onnx_call
from latency_tables import made_up


def built(name: str, *, quantized: bool) -> tuple[nn.Module, geta.DependencyGraph]:
    torch.manual_seed(0)
    case = CASES[name]
    model, x = case.build().eval(), inputs(case)
    graph = geta.analyze(model, (x,))
    if quantized:
        geta.quantize(model, weights=(4, 8), activations=(8, 8), calibration=[x], exclude=(), results_of=graph)
    return model, graph


@pytest.mark.parametrize(
    ("name", "runtime", "precision", "batch"),
    [
        ("residual", "onnx", "integers", 1),
        ("residual", "onnx", "floats", None),
        ("attention", "onnx", "integers", 3),
        ("depthwise", "eager", "floats", 1),
    ],
)
def test_every_layer_is_in_the_table_and_the_model_is_as_before(name, runtime, precision, batch):
    model, graph = built(name, quantized=precision == "integers")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    table = measure_layers(graph, runtime=runtime, precision=precision, batch=batch, seconds=0.01)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (table.runtime, table.precision) == (runtime, precision)
    assert table.batch == (batch or inputs(CASES[name]).shape[0])
    kernels = {grid.kernel for grid in table.grids}
    assert ("integers" in kernels) == (precision == "integers") == bool(table.integer_layers)
    for layer in network_layers(graph, table.batch).layers:
        grid = table.grid(layer.path, layer.shape)
        assert all(1 <= len(axis) <= 4 and axis[-1] == extent for axis, extent in zip(grid.axes, layer.shape.extents, strict=True))
        assert np.isfinite(grid.times).all()
        assert (grid.times >= 0).all()
    assert min(table.scale, table.fixed_ms, table.per_element_ms) >= 0
    assert table.machine["cpus"]
    assert ("onnxruntime" in table.machine) == (runtime == "onnx")
    uncut = cost_model(graph, table).dense["latency_ms"]
    assert table.networks["uncut"]["predicted"] == pytest.approx(uncut) == pytest.approx(table.networks["uncut"]["measured"], rel=0.2)


def test_a_prediction_stands_beside_a_measurement():
    _, graph = built("residual", quantized=True)
    table = measure_layers(graph, precision="integers", batch=1, seconds=0.01)
    with module._final_widths(graph.model):
        small = geta.compact(graph.model, graph, graph.random_selection(0.5), verify=False)
    found = check_prediction(small, graph, table, rounds=2)
    assert found.predicted > 0
    assert found.measured > 0
    assert f"predicted {found.predicted:.4f} ms, measured {found.measured:.4f} ms" in str(found)
    assert "ONNX Runtime, integers, batch 1" in str(found)
    _, other = built("perceptron", quantized=False)
    with pytest.raises(ConfigError, match="cut with"):
        check_prediction(small, other, table)


def test_a_machine_that_became_slower_is_no_wrong_prediction(monkeypatch):
    _, graph = built("residual", quantized=False)
    table = measure_layers(graph, batch=1, seconds=0.01)
    small = geta.compact(graph.model, graph, graph.random_selection(0.5), verify=False)
    shapes = {grid.key: 3.0 * float(grid.times.flat[-1]) for grid in table.grids}
    usual = check_prediction(small, graph, table, rounds=2).predicted

    def three_times_slower(calls, *_args, **_kwargs):
        assert {"network", "empty"} < set(calls) <= {"network", "empty", *shapes}
        times = {**{name: 0.5 + time for name, time in shapes.items()}, "network": 3.0 * usual, "empty": 0.5}
        return {name: Latency(*[times[name]] * 4) for name in calls}

    monkeypatch.setattr(module, "interleaved", three_times_slower)
    found = check_prediction(small, graph, table)
    assert (found.pace, found.ratio) == (pytest.approx(3.0), pytest.approx(1.0))
    assert "layers alone take 3.00 times as long as when the table was made, so that is 1.00 times the prediction" in str(found)


def test_with_made_up_times_the_networks_come_out_exactly(monkeypatch):
    """What is fitted: a factor, a time per number written and a constant, from two whole networks."""

    def times(calls, *_args, **_kwargs):
        fixed = {"uncut": 3.0, "half": 2.0, "empty": 0.0}
        return {name: Latency(*[fixed.get(name, 0.01)] * 4) for name in calls}

    monkeypatch.setattr(module, "interleaved", times)
    _, graph = built("residual", quantized=False)
    table = measure_layers(graph, batch=1)
    assert {name: one["measured"] for name, one in table.networks.items()} == {"uncut": 3.0, "half": 2.0}
    for one in table.networks.values():
        assert one["predicted"] == pytest.approx(one["measured"], rel=1e-2)
    assert table.per_element_ms > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"runtime": "tensorrt"}, "known are 'onnx'"),
        ({"precision": "int4"}, "known are 'onnx'"),
        ({"runtime": "eager", "precision": "integers"}, "'eager', which computes in 'floats'"),
        ({"precision": "integers"}, "nothing is quantized"),
        ({"batch": 0}, "start at 1"),
        ({"threads": 0}, "start at 1"),
        ({"seconds": 0.0}, "seconds are above 0"),
    ],
)
def test_settings_that_cannot_be_had_are_refused(settings, words):
    _, graph = built("perceptron", quantized=False)
    with pytest.raises(ConfigError, match=words):
        measure_layers(graph, **settings)


def test_other_number_types_are_refused():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    with pytest.raises(ConfigError, match=r"'0\.weight' is torch\.float64"):
        measure_layers(geta.analyze(model, (torch.randn(2, 4, dtype=torch.float64),)))


LAYERS = {
    "grouped": (nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 4, 1)), (2, 8, 6, 6)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1), nn.Conv2d(8, 4, 1)), (2, 4, 6, 6)),
    "one dimension": (nn.Sequential(nn.Conv1d(4, 8, 3, padding="same"), nn.Conv1d(8, 4, 1, bias=False)), (2, 4, 6)),
    "three dimensions": (nn.Sequential(nn.Conv3d(2, 8, 3), nn.Conv3d(8, 4, 1)), (2, 2, 5, 5, 5)),
}


class Products(nn.Module):
    """Matrix products of every kind that is timed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bias = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        y = torch.addmm(self.bias, torch.mm(x, self.a).relu(), self.b)
        return torch.bmm(y[None], y.T[None]) + torch.matmul(y, y.T)


@pytest.mark.parametrize("name", [*LAYERS, "products"])
def test_every_kind_of_layer_runs_alone_at_every_point(name):
    model, shape = LAYERS.get(name, (Products(), (3, 6)))
    graph = geta.analyze(model, (torch.randn(shape),))
    layers = network_layers(graph).layers
    assert len(layers) == (4 if name == "products" else 2)
    for text, (one, kernel, values) in module._points(layers, []).items():
        assert kernel == "floats"
        results = [call() for call in (eager_call(one, values), onnx_call(one, values, integers=False, threads=1))]
        assert tuple(results[0].shape) == results[1][0].shape, text


@pytest.mark.parametrize("shared", [1, 2])
def test_attention_runs_alone(shared):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = nn.Linear(6, 16), nn.Linear(6, 16 // shared), nn.Linear(16, 6)

        def forward(self, x):
            q, k = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k))
            mixed = nn.functional.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=shared > 1)
            return self.out(mixed.transpose(1, 2).flatten(2))

    graph = geta.analyze(Attention(), (torch.randn(2, 5, 6),))
    layer = next(layer for layer in network_layers(graph).layers if layer.shape.op == "scaled_dot_product_attention")
    for values in ((extent,) for extent in range(1, layer.shape.extents[0] + 1)):
        results = [call() for call in (eager_call(layer.shape, values), onnx_call(layer.shape, values, integers=False, threads=1))]
        assert tuple(results[0].shape) == results[1][0].shape


def test_a_layer_alone_gets_the_integer_kernel_of_a_whole_file(tmp_path):
    import onnxruntime

    _, graph = built("residual", quantized=False)
    kernels = []
    for layer in network_layers(graph, 1).layers:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        model = _Builder(layer.shape, layer.shape.extents, integers=True).build()
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        kernels += [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kernels.count("QLinearConv") == 3
    assert kernels.count("QGemm") == 1
    assert not {"Conv", "MatMul", "Gemm"} & set(kernels)


def test_families_are_sorted_by_what_they_save():
    _, graph = built("residual", quantized=False)
    table = made_up(graph, fixed_ms=0.5)
    savings = family_savings(graph, table)
    assert sorted(one.family for one in savings) == sorted(family.name for family in graph.prunable_families)
    assert [one.saved_ms[1] for one in savings] == sorted((one.saved_ms[1] for one in savings), reverse=True)
    costs = cost_model(graph, table)
    for one in savings:
        number = costs.families.index(one.family)
        for place, share in enumerate(SHARES):
            removed = [0] * len(costs.families)
            removed[number] = int(share * one.groups)
            after = costs.evaluate(removed, [])
            assert one.saved_ms[place] == pytest.approx(costs.dense["latency_ms"] - after["latency_ms"])
            assert one.saved_params[place] == costs.dense["params"] - after["params"]
        assert one.ms_per_million == pytest.approx(1e6 * one.saved_ms[1] / one.saved_params[1])
        assert json.loads(json.dumps(one.to_json()))["family"] == one.family
    text = savings_table(savings, table, costs.dense["latency_ms"])
    assert text.index(savings[0].family) < text.index(savings[-1].family)
    assert f"{savings[0].saved_ms[2]:.4f}" in text
    aligned = family_savings(graph, table, multiple_of="cpu")
    assert all(one.saved_ms[0] == 0.0 for one in aligned if one.groups == 8)


def test_without_prunable_families_the_table_says_so():
    graph = geta.analyze(nn.Linear(4, 2), (torch.randn(2, 4),))
    table = made_up(graph)
    assert family_savings(graph, table) == []
    assert "no family can be pruned" in savings_table([], table, 1.0)


def factory() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """For the command line."""
    return CASES["residual"].build(), (inputs(CASES["residual"]),)


@pytest.mark.parametrize("options", [[], ["--integers", "--multiple-of", "cpu"], ["--runtime", "eager"]])
def test_the_command_prints_the_families_and_writes_the_table(options, tmp_path, capsys):
    path = tmp_path / "tables" / "latency.json"
    assert main(["latency", f"{__name__}:factory", "--seconds", "0.01", "--table", str(path), *options]) == 0
    printed = capsys.readouterr().out
    _, graph = built("residual", quantized=False)
    assert all(family.name in printed for family in graph.prunable_families)
    assert "ms uncut (predicted)" in printed
    table = geta.LatencyTable.load(path)
    assert table.precision == ("integers" if "--integers" in options else "floats")
    assert bool(table.integer_layers) == ("--integers" in options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--multiple-of", "avx512"], "did you mean 'avx512-vnni'"),
        (["--multiple-of", "0"], "at least 1"),
        (["--runtime", "tvm"], "--runtime 'tvm' is unknown: write one of onnx, eager"),
    ],
)
def test_mistakes_on_the_command_line_are_readable(options, words, capsys):
    assert main(["latency", f"{__name__}:factory", *options]) == 2
    assert words in capsys.readouterr().err


def test_another_process_reads_the_table(tmp_path):
    _, graph = built("residual", quantized=False)
    table = dataclasses.replace(made_up(graph), machine={"machine": "x86_64"})
    table.save(tmp_path / "table.json")
    code = "import geta, sys; print(geta.LatencyTable.load(sys.argv[1]).fingerprint)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "table.json")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == table.fingerprint
