"""The ONNX files are ordinary: OpenVINO's own converter reads them and makes the same numbers as ONNX Runtime."""

from __future__ import annotations

import openvino
import pytest
import torch

from export_nets import CASES, compacted, inputs
from geta.export.parity import run_file

FLIPPED = 0.02
"""Of the largest result. Both runtimes compute the same integers and scales; where a sum lies on a rounding boundary one 8-bit code may
differ by one step, 1/127 of that tensor's range, which the layers behind it pass on to the results about as large. Without such a flip
the difference is that of float32 sums, below 1e-6."""


@pytest.mark.parametrize("name", ["residual", "attention", "words of few bits", "8 bits per channel"])
def test_openvino_computes_what_onnx_runtime_computes(name, tmp_path):
    path = tmp_path / "model.onnx"
    report = compacted(name).export_onnx(path, integers=True)
    assert report.integer
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    precisions = {
        operator.get_rt_info()["runtimePrecision"].astype(str)
        for operator in compiled.get_runtime_model().get_ops()
        if operator.get_rt_info()["layerType"].astype(str) == "FullyConnected"
    }
    assert precisions == {"u8"}  # products of linear layers are of integers there, too
    for batch in (CASES[name].shape[0], 3):
        x = inputs(CASES[name], batch, seed=5)
        (expected,) = run_file(path, [x])
        found = torch.from_numpy(compiled([x.numpy()])[0])
        assert found.shape == expected.shape
        gap = (found - expected).abs() / expected.abs().max()
        assert gap.max() < FLIPPED
        assert gap.median() < 1e-3  # a flip is rare
