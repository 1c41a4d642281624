"""Curves: the figure has the numbers that were given, and the file is a PNG."""

from __future__ import annotations

import pytest
from PIL import Image

from geta.errors import GetaError
from geta.report.curves import save_history
from geta.report.run_records import HistoryRow

DENSE = [HistoryRow("dense", 10, 2.0, 1, 50.0), HistoryRow("dense", 20, 1.0, 2, 90.0)]
STAGED = [
    HistoryRow("compact", 10, 2.0, 1, 40.0, "warm-up", 0.0, 16.0, 16.0),
    HistoryRow("compact", 20, 1.5, 2, 60.0, "projection", 0.0, 9.0, 8.0),
    HistoryRow("compact", 30, 1.2, 3, 80.0, "joint", 0.5, 6.0, 8.0),
    HistoryRow("compact", 40, 1.1, 4, 88.0, "cool-down", 0.5, 6.0, 8.0),
]
OTHER_END = HistoryRow("compact", 40, 1.1, 4, 12.0, "cool-down", 0.5, 6.0, 8.0)
SCORE = "test accuracy (%)"


def test_curves_are_a_png(tmp_path):
    save_history(tmp_path / "curves.png", [*DENSE, *STAGED], SCORE)
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert image.size == (960, 1080)


def test_what_is_drawn_depends_on_the_numbers(tmp_path):
    save_history(tmp_path / "a.png", [*DENSE, *STAGED], SCORE)
    save_history(tmp_path / "b.png", [*DENSE, *STAGED[:-1], OTHER_END], SCORE)
    save_history(tmp_path / "c.png", [*DENSE, *STAGED], SCORE)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_a_run_without_quantizers_or_stages_can_be_drawn(tmp_path):
    pruned = [HistoryRow("compact", 10, 1.0, 1, 50.0, "joint", 0.2), HistoryRow("compact", 20, 0.5, 2, 60.0, "cool-down", 0.5)]
    save_history(tmp_path / "curves.png", [*DENSE, *pruned], SCORE)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_missing_matplotlib_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(GetaError, match=r"pip install 'geta\[demo\]'"):
        save_history(tmp_path / "curves.png", DENSE, SCORE)
    assert list(tmp_path.iterdir()) == []
