"""The demo end to end, short: its files, the promises that hold at any length, and its errors."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from geta.cli.demo_data import load_digits
from PIL import Image

import geta
from geta.cli import demo_run
from geta.cli.main import main

EPOCHS = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run of the whole command."""
    folder = tmp_path_factory.mktemp("demo") / "deep" / "out"
    assert main(["demo", "--out", str(folder), "--epochs", str(EPOCHS), "--seed", "3"]) == 0
    return folder, json.loads((folder / "result.json").read_text())


def test_all_files_are_there(finished):
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == ["compact", "curves.png", "log.txt", "result.json"]
    with Image.open(folder / "curves.png") as image:
        assert image.format == "PNG"


def test_exactly_k_groups_are_removed(finished):
    _, record = finished
    groups = record["groups"]
    assert groups["target_groups"] == math.floor(0.5 * groups["groups"])
    assert groups["pruned_groups"] == groups["target_groups"] > 0
    assert sum(record["kept"].values()) == groups["groups"] - groups["pruned_groups"]


def test_every_bit_width_is_an_integer_in_its_range(finished):
    _, record = finished
    weights = {name: bits for name, bits in record["bits"].items() if ":" not in name}
    activations = {name: bits for name, bits in record["bits"].items() if ":" in name}
    assert len(weights) == 22
    assert all(isinstance(bits, int) and 4 <= bits <= 8 for bits in weights.values())
    assert {name.partition(":")[2] for name in activations} == {"input", "output"}
    assert set(activations.values()) == {8}


def test_the_compact_network_is_the_trained_one(finished):
    folder, record = finished
    assert record["max_rel_difference"] <= 1e-5
    assert record["max_rel_difference_float32"] <= 0.1
    assert record["reloaded_equal"] is True
    small = geta.load(folder / "compact").eval()
    digits = load_digits()
    with torch.no_grad():
        right = (small(digits.test_images).argmax(1) == digits.test_labels).float().mean()
    assert 100 * float(right) == pytest.approx(record["accuracy"]["compact"])


def test_the_sizes_are_those_on_disk_and_small(finished):
    folder, record = finished
    assert record["bytes"]["compact_folder"] == sum(path.stat().st_size for path in (folder / "compact").rglob("*") if path.is_file())
    assert record["relative"]["bops"] <= record["relative"]["macs"] * 8 * 8 / (32 * 32)
    assert record["relative"]["weights_to_dense_state_dict"] <= 0.06
    assert record["relative"]["folder_to_dense_state_dict"] <= 0.12
    assert record["params"]["compact"] < record["params"]["dense"]


def test_the_log_has_every_epoch_and_the_table(finished):
    folder, _ = finished
    log = (folder / "log.txt").read_text()
    assert all(log.count(f"epoch {number}/{EPOCHS}") == 2 for number in range(1, EPOCHS + 1))
    for words in ("cool-down", "test accuracy", "on disk, bytes", "max |zeroed - compact|", "in floats"):
        assert words in log


def test_the_same_seed_gives_the_same_network_in_another_process(finished, tmp_path):
    folder, record = finished
    arguments = ["demo", "--out", str(tmp_path), "--epochs", str(EPOCHS), "--seed", "3"]
    code = f"from geta.cli.main import main; raise SystemExit(main({arguments}))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "17"}, stdout=subprocess.DEVNULL)
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["accuracy"] == record["accuracy"]
    files = sorted(path.relative_to(folder) for path in (folder / "compact").rglob("*") if path.is_file())
    assert files
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_an_unwritable_folder_stops_the_run_before_it_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_run, "train_both", lambda *_: pytest.fail("training was started"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["demo", "--out", str(blocked)]) == 1
    assert "can't be written" in capsys.readouterr().err


def test_a_folder_that_is_no_saved_model_stops_the_run_before_it_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_run, "train_both", lambda *_: pytest.fail("training was started"))
    (tmp_path / "compact").mkdir()
    (tmp_path / "compact" / "thesis.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "Nothing was started" in capsys.readouterr().err
    assert (tmp_path / "compact" / "thesis.txt").read_text() == "mine"


def test_a_loss_that_is_not_finite_is_explained_and_the_log_stays(tmp_path, capsys, monkeypatch):
    calls = iter([torch.tensor(1.0, requires_grad=True)] * 5 + [torch.tensor(float("nan"), requires_grad=True)])
    monkeypatch.setattr(demo_run.F, "cross_entropy", lambda *_: next(calls))
    monkeypatch.setattr(demo_run, "resnet20", TinyNet)
    assert main(["demo", "--out", str(tmp_path), "--epochs", "2"]) == 1
    message = capsys.readouterr().err
    assert "the training loss became nan at step 5 of the dense network" in message
    assert "log.txt" in message
    assert "Lower the learning rate" in message
    assert "became nan" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "result.json").exists()


class TinyNet(torch.nn.Module):
    """Small enough that a test of the messages takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 3)
        self.fc = torch.nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(x)).mean(dim=(2, 3)))
