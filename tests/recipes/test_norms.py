"""How fast running statistics follow: `train.norm_momentum`, in both networks of a recipe."""

from __future__ import annotations

import pytest
import torch

from geta.errors import ConfigError
from geta.recipes.prepare import prepare
from geta.recipes.processes import Place
from geta.recipes.read import read_recipe
from recipe_nets import RECIPE


def prepared(tmp_path, *overrides):
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE.replace("FOLDER", str(tmp_path / "run")))
    return prepare(read_recipe(file, ["baseline=true", *overrides]), Place(torch.device("cpu")))


def test_both_networks_keep_running_statistics_as_the_recipe_says(tmp_path):
    job = prepared(tmp_path, "norm_momentum=0.5")
    for network in (job.dense, job.model):
        norm = network.norm
        x = torch.randn(4, 8, 3, 3)
        before = norm.running_mean.clone()
        norm.train()(x)
        torch.testing.assert_close(norm.running_mean, 0.5 * before + 0.5 * x.mean(dim=(0, 2, 3)))


def test_without_the_key_the_network_decides(tmp_path):
    job = prepared(tmp_path)
    assert (job.dense.norm.momentum, job.model.norm.momentum) == (0.1, 0.1)


def test_without_batch_normalization_the_key_would_do_nothing(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.norm_momentum has no effect: the network has no batch normalization"):
        prepared(tmp_path, "norm_momentum=0.5", "model.options={norm: false}")
