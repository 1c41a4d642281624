"""ONNX files: the network that was trained, in integers, for a runtime that knows nothing of this library."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import Conv1D
from transformers.modeling_outputs import BaseModelOutputWithPooling

import export_nets
import geta
from export_nets import CASES, compacted, inputs
from geta.export.onnx import export_onnx
from geta.export.parity import parity, run_file


@pytest.fixture(scope="module")
def models():
    made: dict[str, geta.CompactModel] = {}

    def get(name: str) -> geta.CompactModel:
        if name not in made:
            made[name] = compacted(name)
        return made[name]

    return get


def optimized(path, folder) -> Counter[str]:
    """The operators that the runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


@pytest.mark.parametrize("name", CASES)
def test_every_quantizer_and_every_result_is_the_networks(name, models):
    found = parity(models(name), [inputs(CASES[name], seed=5)])
    assert found.largest_step < 1.01
    assert found.flips < 0.01
    assert found.output < 1e-4


@pytest.mark.parametrize("name", ["convolutions", "residual", "depthwise", "padded", "8 bits per channel", "2 to 3 bits"])
def test_convolutions_and_products_run_in_integers(name, models, tmp_path):
    report = models(name).export_onnx(tmp_path / "model.onnx")
    assert report.floating == {}
    operators = optimized(tmp_path / "model.onnx", tmp_path)
    layers = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert operators["QLinearConv"] == layers["Conv"] > 0
    assert operators["QGemm"] + operators["MatMulIntegerToFloat"] + operators["QLinearMatMul"] == layers["MatMul"] + layers["Gemm"]
    assert not any(operators[name] for name in ("Conv", "FusedConv", "MatMul", "Gemm", "FusedMatMul"))


def test_nothing_stands_between_integer_convolutions(models, tmp_path):
    models("padded").export_onnx(tmp_path / "model.onnx")
    written = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert written["Pad"] == 3  # before the two convolutions with padding at one end, and before the addition; the rest is the layers' own
    operators = optimized(tmp_path / "model.onnx", tmp_path)
    assert operators["QLinearConv"] == 5
    assert operators["QuantizeLinear"] == 3  # the input, the sum, the mean
    assert operators["DequantizeLinear"] == 3  # both sides of the sum, and what the mean is of


def test_products_of_a_transformer_run_in_integers(models, tmp_path):
    report = models("attention").export_onnx(tmp_path / "model.onnx")
    assert sorted(report.integer) == ["down", "proj", "qkv", "up"]
    operators = optimized(tmp_path / "model.onnx", tmp_path)
    assert operators["QGemm"] + operators["MatMulIntegerToFloat"] == 4


def test_the_report_says_what_stays_in_floats_and_why(models, tmp_path):
    report = models("residual without quantized results").export_onnx(tmp_path / "model.onnx")
    assert report.integer == ["conv1", "head"]
    assert {path: reason.partition(",")[0] for path, reason in report.floating.items()} == {
        "stem.0": "its result isn't quantized",
        "conv2": "its result isn't quantized",
    }
    assert report.folded == ["stem.1", "bn1", "bn2"]
    report = models("weights only").export_onnx(tmp_path / "model.onnx")
    assert set(report.floating.values()) == {"its input isn't quantized"}


def test_a_process_with_onnx_runtime_alone_computes_the_same(models, tmp_path):
    case, model = CASES["residual"], models("residual")
    model.export_onnx(tmp_path / "model.onnx")
    x = inputs(case, 3)
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1] + '/model.onnx', providers=['CPUExecutionProvider'])\n"
        "numpy.save(sys.argv[1] + '/y.npy', session.run(None, {'x': numpy.load(sys.argv[1] + '/x.npy')})[0])\n"
        "assert 'torch' not in sys.modules and 'geta' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path)], check=True)
    (here,) = run_file(tmp_path / "model.onnx", [x])
    assert np.array_equal(np.load(tmp_path / "y.npy"), here.numpy())


@pytest.mark.parametrize(("dynamic", "batches", "sizes"), [("batch", (1, 2, 7), {"x": [0]}), ("none", (2,), {})])
def test_open_sizes(dynamic, batches, sizes, models, tmp_path):
    case, model = CASES["convolutions"], models("convolutions")
    report = export_onnx(model, tmp_path / "model.onnx", dynamic=dynamic, integers=False)
    assert {"x": report.dynamic.get(report.inputs[0])} == {"x": sizes.get("x")}
    for batch in batches:
        x = inputs(case, batch)
        (found,) = run_file(tmp_path / "model.onnx", [x])
        assert (found - model(x)).abs().max() < 1e-4


def test_results_keep_their_names(models, tmp_path):
    report = models("attention").export_onnx(tmp_path / "model.onnx")
    assert report.outputs == ["hidden"]
    assert [value.name for value in onnx.load(tmp_path / "model.onnx").graph.output] == ["hidden"]


class Product(nn.Module):
    """A layer that multiplies with a matrix in its own way."""

    def __init__(self, multiply: Callable[..., torch.Tensor], *sizes: int) -> None:
        super().__init__()
        self.multiply = multiply
        self.weight, self.bias = nn.Parameter(torch.randn(sizes) / 2), nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.multiply(x, self.weight, self.bias)


INTEGER_PRODUCTS = ("QGemm", "MatMulIntegerToFloat", "QLinearMatMul")
PRODUCTS = {
    "as in GPT-2": (None, (8, 6)),
    "addmm": (lambda x, w, b: torch.addmm(b, x.view(-1, 6), w).view(*x.shape[:-1], 8), (6, 8)),
    "addmm with numbers": (lambda x, w, b: torch.addmm(b, x.view(-1, 6), w, alpha=2).view(*x.shape[:-1], 8), (6, 8)),
    "matmul, turned, as in Falcon": (lambda x, w, b: x @ w.T + b, (8, 6)),
    "matmul": (lambda x, w, b: torch.matmul(x, w) + b, (6, 8)),
    "mm": (lambda x, w, b: torch.mm(x.flatten(0, 1), w.transpose(0, 1)).view(*x.shape[:-1], 8), (8, 6)),
    "einsum": (lambda x, w, b: torch.einsum("btk,nk->btn", x, w) + b, (8, 6)),
}
IN_FLOATS = {"addmm with numbers": "aten.addmm.default", "einsum": "aten.einsum.default"}


@pytest.mark.parametrize(
    ("kind", "granularity"), [*((kind, "tensor") for kind in PRODUCTS), ("as in GPT-2", "channel"), ("matmul", "channel")]
)
def test_products_of_every_kind_run_in_integers_or_are_named(kind, granularity, tmp_path):
    multiply, sizes = PRODUCTS[kind]
    torch.manual_seed(0)
    layer = Conv1D(*sizes) if multiply is None else Product(multiply, *sizes)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(3, 5, 4)
    graph = geta.analyze(model, (x,))
    geta.quantize(model, weights=8, activations=8, calibration=[x], exclude=(), initial_bits=8, granularity=granularity)
    small = geta.compact(model, graph, graph.random_selection(0.5)).eval()
    report = small.export_onnx(tmp_path / "model.onnx")
    if kind in IN_FLOATS:
        assert report.integer == ["0", "4"]
        assert report.floating == {"2": f"its weight is read by {IN_FLOATS[kind]}, which isn't written in integers"}
    elif sizes == (6, 8) and granularity == "channel":  # the first dimension of an unknown layer's weight is taken for its outputs
        assert (report.integer, report.floating) == (["0", "4"], {"2": "its weight has one scale per input channel"})
    else:
        assert (report.integer, report.floating) == (["0", "2", "4"], {})
        operators = optimized(tmp_path / "model.onnx", tmp_path)
        assert sum(operators[name] for name in INTEGER_PRODUCTS) == 3, operators
        assert operators["MatMul"] == operators["Gemm"] == 0
    found = parity(small, [x])
    assert found.largest_step <= 1.001
    assert found.output < 1e-4


class Described(nn.Module):
    """Gives what models of `transformers` give."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> BaseModelOutputWithPooling:
        hidden = torch.relu(self.first(x))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.second(hidden))


def test_results_of_a_result_class_are_called_like_its_fields(tmp_path):
    model, x = Described().eval(), torch.randn(3, 4)
    graph = geta.analyze(model, (x,))
    small = geta.compact(model, graph, graph.random_selection(0.0))
    small.save(tmp_path / "small")
    for each in (small, geta.load(tmp_path / "small")):
        report = each.export_onnx(tmp_path / "model.onnx")
        assert report.outputs == ["last_hidden_state", "pooler_output"]
        hidden, pooled = run_file(tmp_path / "model.onnx", [x])
        torch.testing.assert_close(hidden, each(x).last_hidden_state)
        torch.testing.assert_close(pooled, each(x).pooler_output)


@pytest.mark.parametrize("name", ["residual", "fixed", "nonlinear", "words"])
def test_floats_are_the_same_numbers(name, models, tmp_path):
    case, model = CASES[name], models(name)
    report = model.export_onnx(tmp_path / "model.onnx", integers=False)
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert not operators["QuantizeLinear"] + operators["DequantizeLinear"]
    assert report.integer == []
    x = inputs(case, seed=3)
    (found,) = run_file(tmp_path / "model.onnx", [x])
    steps = (found - model(x)).abs().max() / model(x).abs().max()
    assert steps < 0.02  # a rounding step may flip somewhere


def test_a_file_has_the_size_of_its_bits(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)), torch.randn(2, 512)
    graph = geta.analyze(model, (x,))
    geta.quantize(model, weights=geta.Bits(4, 4), calibration=[x])
    for quantizer in geta.quant.quantizers(model).values():
        quantizer.round_bits_()
    small = geta.compact(model, graph)
    report = small.export_onnx(tmp_path / "model.onnx")
    assert report.bytes == (tmp_path / "model.onnx").stat().st_size
    assert report.bytes < 1.05 * small.cost.weight_bytes
    assert b"geta" not in (tmp_path / "model.onnx").read_bytes()  # nor any folder of whoever wrote it


def test_the_same_model_gives_the_same_file(models, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom export_nets import compacted\ncompacted('residual').export_onnx(sys.argv[2])\n"
    )
    tests = str(Path(export_nets.__file__).parent)
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-W", "ignore", "-c", code, tests, str(tmp_path / f"{seed}.onnx")], check=True, env=environment)
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()


def test_eight_bit_weights_overflow_nowhere_unless_asked(models, tmp_path):
    model = models("8 bits per channel")
    report = model.export_onnx(tmp_path / "safe.onnx")
    assert [note.split(" as ")[0] for note in report.notes] == [f"{len(report.integer)} layers have 8-bit weights"]
    assert model.export_onnx(tmp_path / "fast.onnx", uint8_weights=False).notes == []
    assert models("2 to 3 bits").export_onnx(tmp_path / "narrow.onnx").notes == []
    kinds = {}
    for name in ("safe", "fast"):
        stored = onnx.load(tmp_path / f"{name}.onnx").graph.initializer
        kinds[name] = {tensor.data_type for tensor in stored if tensor.name.endswith("stored")}
    assert kinds == {"safe": {onnx.TensorProto.UINT8}, "fast": {onnx.TensorProto.INT8}}
    assert parity(model, uint8_weights=True).largest_step < 1.01


@pytest.mark.parametrize("name", list(CASES))
def test_no_initializer_is_unread(name, models, tmp_path):
    models(name).export_onnx(tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    read = {tensor for node in graph.node for tensor in node.input} | {output.name for output in graph.output}
    assert {initializer.name for initializer in graph.initializer} <= read


def test_errors_leave_the_old_file(models, tmp_path, monkeypatch):
    model, path = models("perceptron"), tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(geta.ConfigError, match="there is no folder"):
        model.export_onnx(tmp_path / "none" / "model.onnx")
    with pytest.raises(geta.ConfigError, match="it is a folder"):
        model.export_onnx(tmp_path)
    with pytest.raises(geta.ConfigError, match="dynamic is 'time'"):
        model.export_onnx(path, dynamic="time")
    with pytest.raises(geta.BadModelError, match="only compact models"):
        export_onnx(nn.Linear(2, 2), path)
    with pytest.raises(geta.BadModelError, match=r"convert the model with \.float\(\)"):
        compacted("perceptron").to(torch.bfloat16).export_onnx(path)
    with monkeypatch.context() as patch:
        real = importlib.util.find_spec
        patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else real(name, *rest))
        with pytest.raises(geta.ConfigError, match=r"pip install 'geta\[onnx\]'"):
            model.export_onnx(path)
    with monkeypatch.context() as patch:

        def fail(*_args, **_kwargs):
            raise RuntimeError("no rule for this operator\nand a long story")

        patch.setattr(torch.onnx, "export", fail)
        with pytest.raises(geta.BadModelError, match=r"RuntimeError: no rule for this operator$"):
            model.export_onnx(path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_layers_of_more_than_eight_bits_stay_in_floats_and_exact(models, tmp_path):
    # ONNX Runtime rounds floating-point weights between QuantizeLinears to 8 bits; there must be none
    report = models("12 bits").export_onnx(tmp_path / "model.onnx")
    assert report.integer == []
    assert report.floating["0"].startswith("its weight has 12 bits; its input isn't of up to 8 bits")
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert not operators["QuantizeLinear"] + operators["DequantizeLinear"]
    x = inputs(CASES["12 bits"], 3)
    (found,) = run_file(tmp_path / "model.onnx", [x])
    assert (found - models("12 bits")(x)).abs().max() < 1e-3 * found.abs().max()
