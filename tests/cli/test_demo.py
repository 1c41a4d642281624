"""The demo end to end, short: its files, the promises that hold at any length, and its errors."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

import geta
from geta.cli.demo import parse_bits
from geta.cli.main import main
from geta.errors import ConfigError
from geta.recipes.data.digits import DigitsData
from geta.recipes.run_folder import OURS
from geta.recipes.training import Training

EPOCHS = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short run of the whole command."""
    folder = tmp_path_factory.mktemp("demo") / "deep" / "out"
    assert main(["demo", "--out", str(folder), "--epochs", str(EPOCHS), "--seed", "3"]) == 0
    return folder, json.loads((folder / "result.json").read_text())


def test_all_files_are_there(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "compact", "curves.png", "log.txt", "result.json", "recipe.yaml", "history.jsonl", "environment.json", "analysis.json", "costs.json"
    }  # fmt: skip
    assert names <= OURS - {"checkpoint"}
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
    test = DigitsData().load().test
    batch = test.batch(range(len(test)))
    with torch.no_grad():
        right = (small(batch["images"]).argmax(1) == batch["labels"]).float().mean()
    assert 100 * float(right) == pytest.approx(record["metric"]["compact"])


def test_the_sizes_are_those_on_disk_and_small(finished):
    folder, record = finished
    assert record["bytes"]["compact_folder"] == sum(path.stat().st_size for path in (folder / "compact").rglob("*") if path.is_file())
    assert record["relative"]["bops"] <= record["relative"]["macs"] * 8 * 8 / (32 * 32)
    assert record["relative"]["weights_to_dense_state_dict"] <= 0.06
    assert record["relative"]["folder_to_dense_state_dict"] <= 0.12
    assert record["params"]["compact"] < record["params"]["dense"]


def test_costs_by_operation_add_up(finished):
    folder, record = finished
    costs = json.loads((folder / "costs.json").read_text())
    for network in ("dense", "compact"):
        rows = costs[network]["operations"]
        for key in ("macs", "bops", "params"):
            assert sum(row[key] for row in rows) == pytest.approx(record[key][network])
    assert sum(row["bytes"] for row in costs["compact"]["operations"]) == record["bytes"]["compact_weights"]
    assert sum(row["bytes"] for row in costs["dense"]["operations"]) == record["bytes"]["dense_state_dict"]
    assert {row["name"] for row in costs["dense"]["operations"]} >= {"conv1", "bn1", "stage1.0.conv1", "fc"}


def test_the_log_has_every_epoch_and_the_table(finished):
    folder, _ = finished
    log = (folder / "log.txt").read_text()
    assert all(log.count(f"epoch {number}  ") == 2 for number in range(1, EPOCHS + 1))
    for words in ("cool-down", "test accuracy", "on disk, bytes", "max |zeroed - compact|", "emulates every quantizer"):
        assert words in log


def test_the_recipe_in_another_process_gives_the_demos_numbers(finished, tmp_path):
    folder, record = finished
    arguments = ["compress", "digits", f"epochs={EPOCHS}", "seed=3", f"output.folder={tmp_path / 'digits'}", "latency=false", "--json", "-"]
    code = f"from geta.cli.main import main; raise SystemExit(main({arguments}))"
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    again = json.loads(done.stdout)
    assert again == json.loads((tmp_path / "digits" / "result.json").read_text())
    other = ("seconds", "latency_ms")
    assert {**again, **dict.fromkeys(other)} == {**record, **dict.fromkeys(other)}
    files = sorted(path.relative_to(folder) for path in (folder / "compact").rglob("*") if path.is_file())
    assert files
    assert all((folder / name).read_bytes() == (tmp_path / "digits" / name).read_bytes() for name in files)


def test_a_complete_run_is_replaced_and_nothing_else(finished, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise RuntimeError("training began")

    monkeypatch.setattr(Training, "run", stop)
    (tmp_path / "result.json").write_text("{}")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "training began" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()
    (tmp_path / "checkpoint" / "1-000000001").mkdir(parents=True)
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert f"geta compress --resume {tmp_path}" in capsys.readouterr().err


def test_an_unwritable_folder_stops_the_run_before_it_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Training, "run", lambda *_: pytest.fail("training was started"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["demo", "--out", str(blocked)]) == 1
    assert "can't be written" in capsys.readouterr().err


def test_a_folder_that_is_no_saved_model_stops_the_run_before_it_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Training, "run", lambda *_: pytest.fail("training was started"))
    (tmp_path / "compact").mkdir()
    (tmp_path / "compact" / "thesis.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "Nothing was started" in capsys.readouterr().err
    assert (tmp_path / "compact" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs 0: "),
        (["--sparsity", "1.5", "--epochs", "0"], "--sparsity 1.5: "),
        (["--bits", "8,4"], "--bits [8, 4]: "),
        (["--bits", "1,8"], "--bits [1, 8]: "),
        (["--bits", "4,17"], "--bits [4, 17]: "),
        (["--seed", "-1"], "--seed -1: "),
    ],
)
def test_impossible_settings_are_named_by_their_options(options, message, capsys, tmp_path):
    assert main(["demo", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_bits_are_a_range_or_one_number():
    assert parse_bits("4,8") == (4, 8)
    assert parse_bits("6") == (6, 6)
    for bad in ("", "4,", "a,b", "2,4,8"):
        with pytest.raises(ConfigError, match="--bits"):
            parse_bits(bad)
