"""Ways to train that a recipe can ask for: each ends with what was promised, each resumes."""

from __future__ import annotations

import json
import os
import signal
import sys

import pytest
import torch

from geta.errors import ConfigError
from geta.recipes.processes import joined
from geta.recipes.read import read_recipe
from geta.recipes.run import resume, run_recipe
from geta.recipes.stopping import Interrupted
from geta.recipes.training import Training
from recipe_nets import RECIPE

NO_BITS = ["weight_bits=null", "activation_bits=null"]
FISHER = ["compress.saliency={fisher: 1.0}", "saliency_window=3", "compress.surrogate=dsq", "granularity=channel", "activation_bits=null"]
KINDS = {
    "cycles": ["method=hesso-cric", *NO_BITS, "probe_weight=0.1", "max_cycles=1", "compress.schedule={joint: 14}"],
    "float16": ["precision=float16", "clip_norm=1.0", *FISHER],
    "bfloat16 from a teacher to a budget": [
        *["precision=bfloat16", "accumulate=2", "sparsity=null", "compress.target={bops: 0.05}"],
        *["baseline=true", "train.distill={teacher_weight: 0.5}"],
    ],
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_kind_of_run_keeps_its_promises_when_it_is_resumed(kind, tmp_path, monkeypatch):
    recipe_file = tmp_path / "tiny.yaml"
    recipe_file.write_text(RECIPE.replace("FOLDER", str(tmp_path / "whole")).replace("steps: 40", "steps: 20"))
    overrides = ["baseline=false", *KINDS[kind]]
    recipe = read_recipe(recipe_file, overrides)
    whole = run_recipe(recipe)
    assert whole is not None
    groups = whole["groups"]
    assert groups["pruned_groups"] == groups["target_groups"]
    assert whole["max_rel_difference"] < 1e-5
    if recipe.compress.target is None:
        assert groups["pruned_groups"] == 10
    else:
        assert whole["relative"]["bops"] <= 0.05

    def loss(self, batch):
        if self.leg.name == "compact" and self.leg.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    real = Training._loss
    monkeypatch.setattr(Training, "_loss", loss)
    with pytest.raises(Interrupted):
        run_recipe(read_recipe(recipe_file, [*overrides, f"output.folder={tmp_path / 'cut'}"]))
    monkeypatch.undo()
    again = resume(tmp_path / "cut")
    assert again is not None
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}


def test_tensorboard_gets_the_numbers_or_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("FOLDER", str(tmp_path / "out")).replace("steps: 40", "steps: 12"))
    overrides = ["baseline=false", "output.tensorboard=true", "method=hesso", *NO_BITS]
    run_recipe(read_recipe(tmp_path / "tiny.yaml", overrides))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    assert [event.step for event in events.Scalars("compact/score")] == [row["step"] for row in rows]
    assert [event.value for event in events.Scalars("compact/loss")] == pytest.approx([row["loss"] for row in rows])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'geta\[tensorboard\]'"):
        run_recipe(read_recipe(tmp_path / "tiny.yaml", [*overrides, f"output.folder={tmp_path / 'other'}"]))


def test_a_gpu_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no GPU here"), joined("cuda", None):
        pass
