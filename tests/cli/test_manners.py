"""What every command shares: help with examples, completion, machine-readable results."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from export_nets import compacted
from geta.cli.examples import EXAMPLES
from geta.cli.main import app, main

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "commands.md").read_text()
COMMANDS = [str(command.name) for command in app.registered_commands]
RUN = [sys.executable, "-c", "from geta.cli.main import main; raise SystemExit(main())"]


def command(name: str):
    return typer.main.get_command(app).commands[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_its_parser_takes(name, capsys):
    assert main([name, "--help"]) == 0
    shown = " ".join(re.sub(r"[│╭╮╰╯]", " ", capsys.readouterr().out).split())
    assert len(EXAMPLES[name]) >= 2
    for line in EXAMPLES[name]:
        assert line in shown
        program, first, *rest = shlex.split(line)
        assert (program, first) == ("geta", name)
        command(name).make_context(name, rest)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented_with_debug(name):
    assert f"## geta {name}\n" in DOCUMENT
    assert "--debug" in {option for parameter in command(name).params for option in parameter.opts}


def test_without_arguments_the_help_is_shown(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "Usage: geta" in captured.out + captured.err


def completed(words: str) -> list[str]:
    """What bash offers after these words."""
    environment = {**os.environ, "_GETA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    return subprocess.run(RUN, capture_output=True, text=True, check=True, env=environment).stdout.split()


def test_completion():
    assert completed("geta in") == ["inspect"]
    assert completed("geta export small --format p") == ["pt2"]
    script = subprocess.run(
        ["bash", "-c", f"{shlex.join(RUN)} --show-completion; exit $?"],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "_GETA_COMPLETE=complete_bash" in script
    assert "complete -o default -F" in script


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manners") / "small"
    compacted("perceptron").save(folder)
    return folder


_TARGET = ["nets_of_the_test:net", "--input-shape", "2,4"]
RUNS = {
    "analyze": [*_TARGET, "--no-costs"],
    "inspect": ["SMALL"],
    "export onnx": ["SMALL", "--out", "OUT/a.onnx"],
    "export pt2": ["SMALL", "--format", "pt2", "--out", "OUT/a.pt2"],
    "export compressed-tensors": ["SMALL", "--format", "compressed-tensors", "--out", "OUT/packed"],
    "bench": ["SMALL", "--runtime", "eager", "--rounds", "2", "--batch", "1"],
    "latency": [*_TARGET, "--runtime", "eager", "--seconds", "0.1"],
}


@pytest.fixture
def arguments(request, small, tmp_path, monkeypatch):
    (tmp_path / "nets_of_the_test.py").write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    rest = [text.replace("SMALL", str(small)).replace("OUT", str(tmp_path)) for text in RUNS[request.param]]
    yield [request.param.split()[0], *rest]
    sys.modules.pop("nets_of_the_test", None)


def paths(data: object, prefix: str = "") -> set[str]:
    """Keys as docs/commands.md writes them; names of layers, files and the like are one `*`."""
    named = ("bits", "families", "latency_ms", "missing", "dynamic", "floating", "lost", "packed", "inputs", "groups")
    if isinstance(data, list):
        return {path for one in data for path in paths(one, f"{prefix}[]")}
    if not isinstance(data, dict):
        return set()
    inner = prefix.rpartition(".")[2] in named or prefix.endswith("latency_ms.*")
    found = set()
    for key, value in data.items():
        path = f"{prefix}.{'*' if inner else key}".lstrip(".")
        found |= ({path} if not inner else set()) | paths(value, path)
    return found


def documented(title: str) -> set[str]:
    section = DOCUMENT.partition(f"### The JSON of {title}\n")[2].partition("\n#")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE))


@pytest.mark.parametrize("arguments", RUNS, indirect=True)
def test_json_on_standard_output_stands_alone_and_to_a_file_beside_the_words(arguments, tmp_path, capsys, request):
    assert main([*arguments, "--json", "-"]) == 0
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    assert captured.err.strip()
    if arguments[0] != "analyze":  # docs/json-format.md has that one's keys, and a test of its own
        title = f"geta {request.node.callspec.id}"
        assert paths(shown) == documented(title) != set()
    assert shown["format"] == 1
    if arguments[0] in ("bench", "latency"):
        return  # times differ, and a second measurement would add nothing
    target = tmp_path / "folder of its own" / "out.json"
    assert main([*arguments, "--json", str(target)]) == 0
    assert json.loads(target.read_text()) == shown
    assert f"written to {target}\n" in capsys.readouterr().out


def test_names_that_cannot_be_encoded_are_shown_with_backslashes(small, tmp_path, monkeypatch):
    odd = tmp_path / os.fsdecode(b"m\xffdel")
    compacted("perceptron").save(odd)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["inspect", str(odd)]) == 0
    terminal.flush()
    assert b"m\\udcffdel: " in terminal.buffer.getvalue()
