"""Timing a dense and a compact network side by side in the runtimes that are installed."""

from __future__ import annotations

import json
import re

import pytest
import torch

import geta
from export_nets import CASES, compacted, inputs
from geta.cli.main import main
from geta.report import runtimes
from geta.report.latency import Latency
from geta.report.runtimes import has_dot_products, measure


def dense() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A factory for `geta bench --dense`."""
    return CASES["residual"].build(), (inputs(CASES["residual"]),)


@pytest.fixture(scope="module")
def small():
    return compacted("residual")


def test_everything_is_timed_at_every_batch_size(small, tmp_path):
    model, args = dense()
    found = measure(small, model, args=args, folder=tmp_path, batches=(1, 3), rounds=2, runtimes=("eager", "onnx"))
    names = {
        *("compact, PyTorch", "compact, ONNX Runtime, integers", "compact, ONNX Runtime, floats"),
        *("dense, PyTorch", "dense, ONNX Runtime, floats"),
    }
    assert found.missing == {}
    assert {batch: set(times) for batch, times in found.latency.items()} == {1: names, 3: names}
    assert all(0 < one.minimum <= one.median <= one.p95 <= one.maximum for times in found.latency.values() for one in times.values())
    record = found.to_json()
    assert set(record["latency_ms"]["3"]) == names
    assert json.loads(json.dumps(record)) == record


def test_keyword_inputs_and_threads_are_put_back(tmp_path):
    model, before = compacted("words"), torch.get_num_threads()
    found = measure(model, folder=tmp_path, threads=1, batches=(2,), rounds=1, runtimes=("eager", "onnx"))
    assert found.missing == {}
    assert torch.get_num_threads() == before


def test_what_fails_is_named_and_the_rest_is_measured(small, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setattr(runtimes, "_eager", fail)
    found = measure(small, folder=tmp_path, batches=(1,), rounds=1, runtimes=("eager", "onnx"))
    assert found.missing == {"compact, PyTorch": "RuntimeError: no kernel"}
    assert "compact, ONNX Runtime, integers" in found.latency[1]


@pytest.mark.parametrize("options", [{"runtimes": ("tensorrt",)}, {"batches": (0,)}, {"batches": ()}, {"threads": 0}, {"rounds": 0}])
def test_impossible_wishes(small, options, tmp_path):
    with pytest.raises(geta.ConfigError, match=r"unknown runtime 'tensorrt'|start at 1"):
        measure(small, folder=tmp_path, **options)


def test_dot_products_are_read_from_the_cpus_description(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for flags, expected in (("fpu avx2", False), ("fpu avx2 avx512_vnni", True), ("avx_vnni", True)):
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
        assert has_dot_products(tmp_path / "cpuinfo") is expected
    assert not has_dot_products(tmp_path / "none")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert has_dot_products(tmp_path / "none")


def test_the_command_prints_ratios_and_writes_numbers(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "factory_of_the_bench", __import__("sys").modules[__name__])
    monkeypatch.setenv("COLUMNS", "200")
    small.save(tmp_path / "small")
    arguments = ["--dense", "factory_of_the_bench:dense", "--batch", "2", "--rounds", "2", "--runtime", "onnx", "--runtime", "eager"]
    assert main(["bench", str(tmp_path / "small"), *arguments, "--json", str(tmp_path / "bench.json")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"2 │ compact, ONNX Runtime, integers +│ +\d+\.\d{3} │ +\d+\.\d{3} │ +\d+\.\d\d │", printed)
    assert "times faster: than dense, ONNX Runtime, floats" in printed
    assert set(json.loads((tmp_path / "bench.json").read_text())["latency_ms"]) == {"2"}


def test_the_command_refuses_what_makes_no_sense(small, tmp_path, capsys):
    small.save(tmp_path / "small")
    assert main(["bench", str(tmp_path / "small"), "--input-shape", "1,3,8,8"]) == 2
    assert "--input-shape is about the network of --dense" in capsys.readouterr().err
    assert main(["bench", str(tmp_path / "small"), "--runtime", "tensorrt"]) == 2
    assert "--runtime 'tensorrt' is unknown: write one of eager, compile, onnx, openvino" in capsys.readouterr().err


def test_percentiles():
    times = [float(number) for number in range(1, 101)]
    from geta.report.latency import _summary

    assert _summary(times) == Latency(1.0, 50.5, 95.0, 100.0)
