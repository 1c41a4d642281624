"""Progress: plain lines when the output is no terminal, a bar when it is, and a log file that survives an error."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.table import Table

from geta.report.progress import RunLog


def plain() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=100, force_terminal=False), stream


def test_milestones_are_lines_on_a_plain_output_and_in_the_log(tmp_path):
    console, stream = plain()
    with RunLog(tmp_path / "log.txt", console) as log, log.track("dense", 2) as track:
        track.advance({"loss": "1.0"})
        track.milestone({"epoch": "1/1", "loss": "0.5"})
    assert stream.getvalue() == "dense  epoch 1/1  loss 0.5\n"
    assert (tmp_path / "log.txt").read_text().endswith("  dense  epoch 1/1  loss 0.5\n")


def test_a_terminal_shows_a_bar_and_keeps_the_lines_for_the_log(tmp_path):
    stream = io.StringIO()
    console = Console(file=stream, width=120, force_terminal=True)
    with RunLog(tmp_path / "log.txt", console) as log, log.track("dense", 2) as track:
        track.advance({"loss": "1.0"})
        track.milestone({"epoch": "1/1"})
        track.advance({"loss": "0.25"})
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "2/2 steps, left" in frames
    assert re.search(r"loss +epoch *\n +0\.25 +1/1", frames)
    assert "dense  epoch 1/1" not in frames
    assert "dense  epoch 1/1" in (tmp_path / "log.txt").read_text()


def test_the_log_is_on_disk_line_by_line_and_tells_why_the_run_stopped(tmp_path):
    console, _ = plain()
    path = tmp_path / "log.txt"
    with pytest.raises(RuntimeError), RunLog(path, console) as log:
        log.note("first")
        assert path.read_text().endswith("  first\n")
        raise RuntimeError("the loss is nan")
    assert path.read_text().splitlines()[-1].endswith("stopped: RuntimeError: the loss is nan")


def test_tables_go_to_both(tmp_path):
    console, stream = plain()
    table = Table("name", "value")
    table.add_row("accuracy", "99 %")
    with RunLog(tmp_path / "log.txt", console) as log:
        log.show(table)
    assert "99 %" in stream.getvalue()
    assert "99 %" in (tmp_path / "log.txt").read_text()


def test_a_log_is_gone_on_with_and_a_run_without_files_has_none(tmp_path):
    console, stream = plain()
    for _ in range(2):
        with RunLog(tmp_path / "log.txt", console, append=True) as log, log.track("dense", 5, 3) as track:
            track.milestone({"epoch": "1"})
    assert (tmp_path / "log.txt").read_text().count("dense  epoch 1") == 2
    with RunLog(None, console) as log:
        log.note("heard")
    assert stream.getvalue().endswith("heard\n")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
