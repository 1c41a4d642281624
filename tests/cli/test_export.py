"""`geta export`: files beside the folder, what is printed, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from export_nets import CASES, compacted, inputs
from geta.cli.main import main
from geta.export.parity import run_file


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    compacted("residual").save(folder / "small")
    compacted("residual without quantized results").save(folder / "mixed")
    return folder


def test_onnx(saved, capsys):
    assert main(["export", str(saved / "small")]) == 0
    printed = capsys.readouterr().out
    assert f"{saved}/model.onnx: {(saved / 'model.onnx').stat().st_size:,} bytes, opset 21; inputs x; outputs output" in printed.replace(
        "\n", ""
    )
    assert "open sizes: x [0]" in printed
    assert "batch norms folded: 3" in printed
    assert "layers that integer kernels can run: 4 of 4" in printed
    (found,) = run_file(saved / "model.onnx", [inputs(CASES["residual"], 3)])
    assert found.shape == (3, 5)


def test_notes_are_printed(tmp_path, capsys):
    compacted("8 bits per channel").save(tmp_path / "small")
    assert main(["export", str(tmp_path / "small")]) == 0
    assert "note: 4 layers have 8-bit weights as uint8" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "small"), "--int8-weights"]) == 0
    assert "note:" not in capsys.readouterr().out


def test_reasons_are_printed(saved, tmp_path, capsys):
    assert main(["export", str(saved / "mixed"), "--out", str(tmp_path / "mixed.onnx")]) == 0
    printed = capsys.readouterr().out
    assert "layers that integer kernels can run: 2 of 4" in printed
    assert "  conv2: its result isn't quantized, which integer convolutions need" in printed


def test_floats(saved, tmp_path, capsys):
    assert main(["export", str(saved / "small"), "--float", "--dynamic", "none", "--out", str(tmp_path / "float.onnx")]) == 0
    printed = capsys.readouterr().out
    assert "open sizes: none" in printed
    assert "integer kernels" not in printed


def test_pt2(saved, tmp_path, capsys):
    assert main(["export", str(saved / "small"), "--format", "pt2", "--out", str(tmp_path / "model.pt2")]) == 0
    assert f"{(tmp_path / 'model.pt2').stat().st_size:,} bytes" in capsys.readouterr().out
    (found,) = torch.export.load(tmp_path / "model.pt2").module()(inputs(CASES["residual"], 3))
    assert found.shape == (3, 5)


def test_compressed_tensors(saved, capsys):
    assert main(["export", str(saved / "small"), "--format", "compressed-tensors"]) == 0
    printed = capsys.readouterr().out
    folder = saved / "compressed-tensors"
    assert f"{folder}: {(folder / 'model.safetensors').stat().st_size:,} bytes of tensors; 1 linear layers as integers" in printed
    assert "  conv1.weight: it is read by aten.conv2d.default" in printed
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--format", "pt2", "--float"], 2, "--float is about onnx and the format is pt2"),
        (["--format", "pt2", "--int8-weights"], 2, "--int8-weights is about onnx and the format is pt2"),
        (["--compiled"], 2, "--compiled is about pt2 and the format is onnx"),
        (["--format", "compressed-tensors", "--dynamic", "all"], 2, "--dynamic is about onnx and pt2 and the format is compressed-tensors"),
        (["--format", "tflite"], 2, "tflite"),
        (["--out", "no/such/folder/model.onnx"], 2, "there is no folder"),
    ],
)
def test_bad_arguments(saved, arguments, code, words, capsys):
    assert main(["export", str(saved / "small"), *arguments]) == code
    assert words in capsys.readouterr().err


def test_a_folder_that_holds_no_model(tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_the_folder_of_a_run_means_its_compact_model(tmp_path, capsys):
    compacted("perceptron").save(tmp_path / "run" / "compact")
    (tmp_path / "run" / "recipe.yaml").write_text("version: 1\n")
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--format", "onnx", "--out", str(tmp_path / "model.onnx")]) == 0
    assert main(["bench", str(tmp_path / "run"), "--runtime", "eager", "--rounds", "1", "--batch", "2"]) == 0
    assert f"{tmp_path / 'run' / 'compact'}: " in capsys.readouterr().out
    (tmp_path / "run" / "recipe.yaml").unlink()
    assert main(["inspect", str(tmp_path / "run")]) == 1
