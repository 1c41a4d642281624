"""Every command with every mistake: one readable block, the right exit code, no traceback, and nothing of the user's is lost."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import geta
from bad_input_cases import ODD, ROWS, furnish
from full_disk import REFUSALS, full_disk
from geta.cli.main import app, main

_NOBODY = 65534


@pytest.fixture(scope="module")
def room() -> Iterator[Path]:
    """Outside of pytest's own folders, which only their owner may enter: some rows are run as another user."""
    folder = Path(tempfile.mkdtemp(prefix="geta room "))
    folder.chmod(0o755)
    furnish(folder)
    geta.load(folder / "small")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _inside(room, monkeypatch):
    monkeypatch.chdir(room)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    for name in ("nets", "latin", "broken", "locked"):
        sys.modules.pop(name, None)


@contextmanager
def without_rights(wanted: bool) -> Iterator[None]:
    """As a user to whom locked files are locked: another one for root, the same for anybody else."""
    drop = wanted and os.geteuid() == 0
    if drop:
        os.seteuid(_NOBODY)
    try:
        yield
    finally:
        if drop:
            os.seteuid(0)


def fingerprints(folder: Path) -> dict[str, str]:
    """Every file and folder below, with a hash of what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def assert_a_block(message: str) -> None:
    assert message.startswith("geta: ")
    assert "Traceback" not in message
    assert "unexpected " not in message.partition("\n")[0] or "unexpected extra argument" in message
    assert len(message.splitlines()) <= 8


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_mistakes(row, room, capsys):
    before = fingerprints(room)
    with without_rights(row.nobody):
        code = main(list(row.arguments))
    message = capsys.readouterr().err
    assert row.words in message
    assert code == row.code
    assert_a_block(message)
    assert fingerprints(room) == before


def test_every_command_has_rows():
    registered = {command.name for command in app.registered_commands}
    assert registered == {row.arguments[0] for row in ROWS if row.code and row.arguments[0] in registered}


@pytest.mark.parametrize("name", ["with spaces", ODD])
def test_odd_names_are_no_mistake(name, capsys):
    assert main(["inspect", name, "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert '"bytes_on_disk"' in captured.out
    assert captured.err.isprintable() or "Costs" in captured.err


@pytest.mark.parametrize(
    ("arguments", "old", "free_pages"),
    [
        (["analyze", "nets:net", "--input-shape", "2,4", "--json", "disk/x.json"], "x.json", 0),
        (["analyze", "nets:net", "--input-shape", "2,4", "--html", "disk/x.html"], "x.html", 1),
        (["inspect", "small", "--json", "disk/x.json"], "x.json", 0),
        (["latency", "nets:net", "--input-shape", "2,4", "--table", "disk/x.json"], "x.json", 0),
        (["bench", "small", "--runtime", "eager", "--rounds", "1", "--json", "disk/x.json"], "x.json", 0),
        (["export", "small", "--out", "disk/model.onnx"], "model.onnx", 0),
        (["export", "small", "--format", "pt2", "--out", "disk/model.pt2"], "model.pt2", 0),
        (["export", "small", "--format", "compressed-tensors", "--out", "disk"], "model.safetensors", 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_full_disk_leaves_what_was_there(arguments, old, free_pages, room, capsys):
    before = fingerprints(room)
    disk = room / "disk"
    with full_disk(disk, {old: b"old"}, free_pages=free_pages):
        code = main(arguments)
        left = {path.name for path in disk.iterdir()} - {"filler"}
        content = (disk / old).read_bytes()
    shutil.rmtree(disk)
    message = capsys.readouterr().err
    assert (code, left, content) == (1, {old}, b"old")
    assert_a_block(message)
    assert any(words in message for words in REFUSALS)
    assert fingerprints(room) == before


def test_the_kernels_own_full_device(room, capsys, monkeypatch):
    """Space that runs out only when the JSON itself is written, after the work is done."""

    def full_device(*, dir: Path, prefix: str) -> tuple[int, str]:  # noqa: A002 - as tempfile names it
        return os.open("/dev/full", os.O_WRONLY), str(dir / f"{prefix}full")

    import geta.report.files

    monkeypatch.setattr(geta.report.files.tempfile, "mkstemp", full_device)
    before = fingerprints(room)
    assert main(["inspect", "small", "--json", "old.json"]) == 1
    message = capsys.readouterr().err
    assert message == (
        "geta: --json 'old.json' can't be written (No space left on device); nothing there was changed: "
        "free some space, or name another file\n"
    )
    assert fingerprints(room) == before


@pytest.mark.parametrize("command", ["inspect", "export", "bench"])
def test_an_interrupt_is_one_line(command, capsys, monkeypatch):
    def interrupted(_folder: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(geta, "load", interrupted)
    assert main([command, "small"]) == 130
    assert capsys.readouterr().err == "geta: interrupted\n"


@pytest.mark.parametrize("arguments", [["inspect", "nothing", "--debug"], ["--debug", "inspect", "nothing"]])
def test_debug_adds_the_traceback_to_the_block(arguments, capsys):
    assert main(arguments) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("geta: there is no folder 'nothing'")
