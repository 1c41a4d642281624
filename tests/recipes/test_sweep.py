"""One recipe with several values: folders of their own, nothing run twice."""

from __future__ import annotations

import json

import pytest

from geta.cli.main import main
from geta.errors import ConfigError, GetaError
from geta.recipes import sweep
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
    monkeypatch.setattr(sweep, "run_recipe", lambda recipe, console: calls.append(("run", recipe.train.seed)))
    monkeypatch.setattr(sweep, "resume", lambda place, console: calls.append(("resume", place.name)))
    (folder / "train.seed=1").mkdir(parents=True)
    (folder / "train.seed=1" / "recipe.yaml").write_text(sweep_recipe(recipes[0]))
    run_sweep(folder, recipes, key, values)
    assert calls == [("resume", "train.seed=1"), ("run", 2)]


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
