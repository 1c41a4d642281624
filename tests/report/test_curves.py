"""Curves: the figure has the numbers that were given, and the file is a PNG."""

from __future__ import annotations

import pytest
from PIL import Image

from geta.errors import GetaError
from geta.report.curves import Epoch, save_curves

DENSE = [Epoch(1, 2.0, 50.0), Epoch(2, 1.0, 90.0)]
STAGED = [
    Epoch(1, 2.0, 40.0, "warm-up", 0.0, 16.0, 16.0),
    Epoch(2, 1.5, 60.0, "projection", 0.0, 9.0, 8.0),
    Epoch(3, 1.2, 80.0, "joint", 50.0, 6.0, 8.0),
    Epoch(4, 1.1, 88.0, "cool-down", 50.0, 6.0, 8.0),
]


def test_curves_are_a_png(tmp_path):
    save_curves(tmp_path / "curves.png", {"dense": DENSE, "compact": STAGED})
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert image.size == (960, 1080)


def test_what_is_drawn_depends_on_the_numbers(tmp_path):
    save_curves(tmp_path / "a.png", {"dense": DENSE, "compact": STAGED})
    save_curves(tmp_path / "b.png", {"dense": DENSE, "compact": [*STAGED[:-1], Epoch(4, 1.1, 12.0, "cool-down", 50.0, 6.0, 8.0)]})
    save_curves(tmp_path / "c.png", {"dense": DENSE, "compact": STAGED})
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_a_run_without_quantizers_or_stages_can_be_drawn(tmp_path):
    save_curves(
        tmp_path / "curves.png", {"dense": DENSE, "pruned": [Epoch(1, 1.0, 50.0, "joint", 20.0), Epoch(2, 0.5, 60.0, "cool-down", 50.0)]}
    )
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_missing_matplotlib_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(GetaError, match=r"pip install 'geta\[demo\]'"):
        save_curves(tmp_path / "curves.png", {"dense": DENSE})
    assert list(tmp_path.iterdir()) == []
