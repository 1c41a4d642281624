"""Several processes train one network: the same decisions as one process with the whole batch, one writer."""

from __future__ import annotations

import json

import pytest
import torch

import geta
from geta.errors import ConfigError
from geta.recipes.evaluation import evaluate
from geta.recipes.processes import Place
from geta.recipes.read import read_recipe
from geta.recipes.run import run_recipe
from recipe_nets import RECIPE
from recipe_ranks import run_on_ranks
from two_ranks import on_two_ranks


def test_two_processes_train_what_one_would(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(tmp_path / "two")))
    overrides = [
        "model.options={dropout: 0.0, norm: false}",
        "train.augment=[]",
        "steps=16",
        "baseline=false",
        "accumulate=2",
        "clip_norm=1.0",
    ]
    first, second = on_two_ranks(run_on_ranks, tmp_path / "meet", tmp_path / "meet", recipe, overrides)
    assert second == {}
    read = read_recipe(recipe, overrides)
    data, small = read.data.load(), geta.load(tmp_path / "two" / "compact")
    assert first["compact"] == evaluate(small, read.task, data.test, 50, Place(torch.device("cpu")))  # over all examples, not a share
    alone = run_recipe(read_recipe(recipe, [*overrides, f"output.folder={tmp_path / 'one'}"]))
    assert alone is not None
    assert first["pruned"] == alone["groups"]["pruned_groups"]
    rows = [[json.loads(line) for line in (tmp_path / name / "history.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], rel=1e-3)
    kept = [json.loads((tmp_path / name / "result.json").read_text())["kept"] for name in ("one", "two")]
    assert kept[0] == kept[1]
    environment = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert environment["processes"] == 2


def test_a_batch_that_cannot_be_dealt_out_is_refused(tmp_path):
    from geta.recipes.order import Batches

    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("FOLDER", str(tmp_path)))
    recipe = read_recipe(tmp_path / "tiny.yaml", ["batch_size=127"])
    with pytest.raises(ConfigError, match="a multiple of 2"):
        Batches(recipe.data.load().train, recipe.train, 0, 2)
