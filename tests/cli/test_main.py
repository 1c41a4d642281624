"""The command line: exit codes, where messages go, and what the commands print."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import geta
from geta.cli.main import main
from geta.cost.outlook import outlook
from geta.errors import UnsupportedOpError


def net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A factory for `geta analyze`: one prunable family between a frozen input and a frozen output."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(2, 4),)


@pytest.fixture
def factory(monkeypatch):
    monkeypatch.setitem(sys.modules, "factory_of_the_test", sys.modules[__name__])
    return "factory_of_the_test:net"


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("demo", "analyze", "inspect"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"geta {geta.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["analyze"],
        ["demo", "--epochs", "many"],
        ["demo", "--epochs", "0"],
        ["demo", "--sparsity", "1"],
        ["demo", "--sparsity", "-0.1"],
        ["demo", "--bits", "8,4"],
        ["demo", "--bits", "1,8"],
        ["demo", "--bits", "four"],
        ["demo", "--seed", "-1"],
        ["analyze", "resnet"],
        ["analyze", "geta.recipes.nets.resnet:resnet20"],
        ["analyze", "geta.recipes.nets.resnet:resnet20", "--input-shape", "0"],
    ],
)
def test_bad_arguments_end_with_code_2_and_a_message(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.strip()
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_job_ends_with_code_1_and_one_message(capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("geta: ")
    assert "nothing" in message
    assert "Traceback" not in message


def test_debug_shows_the_traceback(capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "nothing"), "--debug"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_unexpected_error_is_a_message_too(factory, capsys, monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("a mistake of our own")

    monkeypatch.setattr(geta.graph.DependencyGraph, "__str__", broken)
    assert main(["analyze", factory]) == 1
    message = capsys.readouterr().err
    assert "unexpected RuntimeError: a mistake of our own" in message
    assert "--debug" in message
    assert "Traceback" not in message


def interrupted() -> nn.Module:
    raise KeyboardInterrupt


def test_an_interrupt_ends_with_code_130(factory):
    assert main(["analyze", "factory_of_the_test:interrupted", "--input-shape", "1,4"]) == 130


def test_wrong_example_inputs_are_a_failed_job(factory, capsys):
    assert main(["analyze", "geta.recipes.nets.resnet:resnet20", "--input-shape", "2,3,8,8"]) == 1
    assert capsys.readouterr().err.startswith("geta: ")


def test_analyze_prints_the_table_and_writes_the_families(factory, capsys, tmp_path):
    path = tmp_path / "out" / "families.json"
    assert main(["analyze", factory, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    model, args = net()
    graph = geta.analyze(model, args)
    assert printed == f"{graph}\n\n{outlook(graph)}\nfamilies written to {path}\n"
    assert graph.num_groups == 8
    assert json.loads(path.read_text()) == json.loads(graph.to_json())


def test_analyze_lists_residual_branches_when_asked(factory, capsys):
    assert (
        main(["analyze", "geta.recipes.nets.resnet:resnet20", "--input-shape", "2,1,8,8", "--no-costs", "--depth", "--only", "layers"]) == 0
    )
    printed = capsys.readouterr().out
    assert "7 groups in 7 families can be removed" in printed
    assert "stage2.1 (layer)" in printed
    assert main(["analyze", factory, "--no-costs", "--only", "layers"]) == 2
    assert "found with depth=True alone" in capsys.readouterr().err


def test_analyze_without_costs_prints_families_alone(factory, capsys):
    assert main(["analyze", factory, "--no-costs"]) == 0
    model, args = net()
    assert capsys.readouterr().out == f"{geta.analyze(model, args)}\n"


def test_costs_that_cannot_be_counted_leave_the_families(factory, capsys, monkeypatch):
    def refused(_graph):
        raise UnsupportedOpError("no shape")

    monkeypatch.setattr(sys.modules["geta.cost.outlook"], "outlook", refused)
    assert main(["analyze", factory]) == 0
    printed = capsys.readouterr().out
    assert "8 groups in 1 families can be removed" in printed
    assert printed.endswith("costs are not counted: no shape\n")


def test_analyze_plans_memory(factory, capsys):
    options = ["--memory", "--gpus", "2", "--batch", "6", "--optimizer", "SGD", "--dtype", "bf16", "--weight-bits", "4,8"]
    assert main(["analyze", factory, "--no-costs", *options]) == 0
    printed = capsys.readouterr().out
    assert "memory on each of 2 GPUs (FSDP2): 67 parameters in bfloat16, SGD, inputs [6, 4] per GPU" in printed
    assert f"{2 * (4 * 4 + 4 + 2 * 8 + 2)} B  exact  parameters" in printed  # the last layer's three rows are two and one
    assert f"{2 * 3 * 4} B  exact  quantizers: step size, range and exponent of 2" in printed
    assert "peak with checkpointing" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus", "2"], "--gpus has no effect without --memory"),
        (["--compute-dtype", "bf16"], "--compute-dtype has no effect without --memory"),
        (["--memory", "--gpus", "0"], "--gpus is 0; it must be at least 1"),
        (["--memory", "--dtype", "int8"], "--dtype 'int8' is unknown; write one of fp32, bf16, fp16"),
        (["--memory", "--optimizer", "Optimizer"], "--optimizer 'Optimizer' is none of torch.optim: adadelta"),
        (["--memory", "--weight-bits", "4,6,8"], "--weight-bits '4,6,8' is no range of bits"),
        (["--memory", "--sequence", "8"], "--sequence has no effect: none of the model's inputs is a batch of token ids"),
    ],
)
def test_bad_memory_options_are_explained(factory, options, words, capsys):
    assert main(["analyze", factory, "--no-costs", *options]) == 2
    assert words in capsys.readouterr().err


def test_inspect_shows_costs_bits_and_kept_groups(capsys, tmp_path):
    model, args = net()
    graph = geta.analyze(model, args)
    geta.quantize(model, weights=4, activations=None, initial_bits=4)
    selection = graph.random_selection(sparsity=0.5, seed=0)
    graph.zero_(model, selection)
    small = geta.compact(model, graph, selection)
    small.save(tmp_path / "small")
    assert main(["inspect", str(tmp_path / "small")]) == 0
    printed = capsys.readouterr().out
    assert f"{4 * 4 + 4 + 3 * 4 + 3:,}" in printed
    assert "0.weight" in printed
    family = next(iter(small.kept))
    rows = [line.split() for line in printed.splitlines() if family in line]
    assert any("4" in row and "8" in row for row in rows)


def test_the_module_can_be_run_as_a_command():
    code = "from geta.cli.main import main; raise SystemExit(main(['demo', '--bits', 'x']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("geta: --bits 'x'")
    assert done.stdout == ""
