"""Files of a run are written whole or not at all, and an unwritable folder is found before any work begins."""

from __future__ import annotations

import json
import os
import stat

import pytest

from geta.errors import GetaError
from geta.report.files import folder_bytes, prepare_folder, write_atomically, write_json


def test_prepare_folder_creates_parents_and_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "a" / "b"
    prepare_folder(folder)
    prepare_folder(folder)
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_prepare_folder_names_a_folder_that_is_a_file(tmp_path):
    blocked = tmp_path / "taken"
    blocked.write_text("mine")
    with pytest.raises(GetaError, match=r"taken.*nothing was started.*--out"):
        prepare_folder(blocked)
    assert blocked.read_text() == "mine"


def test_prepare_folder_names_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("geta.report.files.tempfile.TemporaryFile", refuse)
    with pytest.raises(GetaError, match="Permission denied"):
        prepare_folder(tmp_path)


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "x.bin"
    write_atomically(path, b"a longer first content")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.bin"]


def test_written_files_have_the_usual_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "x", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    write_atomically(path, b"old")

    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("geta.report.files.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.bin"]


def test_json_is_readable_and_refuses_nan(tmp_path):
    write_json(tmp_path / "r.json", {"a": [1, 2.5, None]})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "bad.json", {"a": float("nan")})
    assert not (tmp_path / "bad.json").exists()


def test_folder_bytes_counts_every_level(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "sub" / "b").write_bytes(b"123")
    assert folder_bytes(tmp_path) == 8
