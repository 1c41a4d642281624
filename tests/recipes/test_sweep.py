"""One recipe with several values: folders of their own, nothing run twice."""

from __future__ import annotations

import json

import pytest

from geta.cli.main import main
from geta.errors import ConfigError, GetaError
from geta.recipes import sweep
from geta.recipes.read import read_recipe
from geta.recipes.run import run_recipe
from geta.recipes.sweep import folder_name, parse_sweep, plan_sweep, run_sweep
from recipe_nets import RECIPE


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(tmp_path / "out")).replace("steps: 40", "steps: 16"))
    return path


def test_a_sweep_runs_each_value_once(recipe_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = ["compress", str(recipe_file), "baseline=false", "--sweep", "sparsity=0.25,0.5", "--json", "-"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "sweep.json").read_text())
    assert found["key"] == "compress.sparsity"
    assert [run["value"] for run in found["runs"]] == [0.25, 0.5]
    assert [run["folder"] for run in found["runs"]] == ["compress.sparsity=0.25", "compress.sparsity=0.5"]
    assert [run["result"]["groups"]["pruned_groups"] for run in found["runs"]] == [5, 10]
    assert all((out / run["folder"] / "compact").is_dir() for run in found["runs"])

    monkeypatch.setattr(sweep, "run_recipe", lambda *_, **__: pytest.fail("a complete run was repeated"))
    assert main(arguments[:-2]) == 0
    assert "Sweep over compress.sparsity" in capsys.readouterr().out
    assert main([*arguments, "seed=9"]) == 1
    assert "with other settings than this sweep's" in capsys.readouterr().err


def test_an_interrupted_sweep_goes_on_where_it_was(recipe_file, tmp_path, monkeypatch):
    key, values = parse_sweep("train.seed=1,2")
    folder, recipes = plan_sweep(recipe_file, [], key, values)
    calls = []
    monkeypatch.setattr(sweep, "run_recipe", lambda recipe, **_: calls.append(("run", recipe.train.seed)))
    monkeypatch.setattr(sweep, "resume", lambda place, **_: calls.append(("resume", place.name)))
    (folder / "train.seed=1").mkdir(parents=True)
    (folder / "train.seed=1" / "recipe.yaml").write_text(sweep_recipe(recipes[0]))
    run_sweep(folder, recipes, key, values)
    assert calls == [("resume", "train.seed=1"), ("run", 2)]


def test_the_dense_network_is_trained_once(recipe_file, tmp_path):
    """Every run's files say the same as if it had run alone."""
    key, values = parse_sweep("compress.sparsity=0.25,0.5")
    folder, recipes = plan_sweep(recipe_file, [], key, values)
    found = [run["result"] for run in run_sweep(folder, recipes, key, values)["runs"]]
    assert not (folder / sweep.BASELINE).exists()
    logs = [(folder / folder_name(key, value) / "log.txt").read_text() for value in values]
    assert ["taken over from another run" in log for log in logs] == [False, True]
    alone = run_recipe(read_recipe(recipe_file, ["sparsity=0.5", f"output.folder={tmp_path / 'alone'}"]))
    for same in ("metric", "bits", "kept", "max_rel_difference"):
        assert alone[same] == found[1][same]
    rows = [history(place) for place in (tmp_path / "alone", folder / folder_name(key, 0.5))]
    assert rows[0] == rows[1]
    assert {row["run"] for row in rows[1]} == {"dense", "compact"}


def history(folder):
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_a_dense_network_trained_otherwise_is_not_taken(recipe_file, tmp_path):
    key, values = parse_sweep("train.seed=1,2")
    folder, recipes = plan_sweep(recipe_file, [], key, values)
    run_sweep(folder, recipes, key, values)
    assert not any("taken over" in (folder / folder_name(key, value) / "log.txt").read_text() for value in values)


def test_a_damaged_dense_network_is_trained_again(recipe_file, tmp_path):
    key, values = parse_sweep("compress.sparsity=0.25,0.5")
    folder, recipes = plan_sweep(recipe_file, [], key, values)
    run_recipe(recipes[0], baseline=folder / sweep.BASELINE)
    state = next((folder / sweep.BASELINE).rglob("state.pt"))
    state.write_bytes(state.read_bytes()[:-7])
    run_sweep(folder, recipes, key, values)
    log = (folder / folder_name(key, 0.5) / "log.txt").read_text()
    assert "is damaged" in log
    assert "trained again" in log


def sweep_recipe(recipe: object) -> str:
    from geta.recipes.read import write_recipe

    return write_recipe(recipe)


def test_values_are_yaml_and_their_folders_are_harmless():
    assert parse_sweep("weight_bits=[4, 8],8") == ("compress.weight_bits", [[4, 8], 8])
    assert folder_name("data.path", "/a b/c") == "data.path=_a_b_c"
    assert folder_name("compress.sparsity", 0.5) == "compress.sparsity=0.5"
    for bad in ("sparsity", "sparsity=0.5", "=1,2", "sparsity=[1"):
        with pytest.raises(ConfigError):
            parse_sweep(bad)


def test_all_values_are_checked_before_the_first_is_run(recipe_file, tmp_path):
    with pytest.raises(ConfigError, match=r"compress\.sparsity = 1\.5"):
        plan_sweep(recipe_file, [], "compress.sparsity", [0.5, 1.5])
    with pytest.raises(ConfigError, match="twice"):
        plan_sweep(recipe_file, [], "compress.sparsity", [0.5, 0.5])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(GetaError, match=r"'thesis\.txt'"):
        run_sweep(*plan_sweep(recipe_file, [], "compress.sparsity", [0.3, 0.5]), "compress.sparsity", [0.3, 0.5])
