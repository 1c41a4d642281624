"""Recipes are read whole or not at all: every problem with its key, the value, the rule, and what was probably meant."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import nn

from geta.errors import ConfigError
from geta.quant import Bits, FixedBits, Fourier
from geta.recipes.compress_settings import SurrogateSettings, read_bits
from geta.recipes.read import check_recipe, full_key, parse_yaml, read_recipe, shipped_recipes, write_recipe
from geta.recipes.recipe import Recipe
from geta.recipes.train_settings import OptimizerSettings, ScheduleSettings
from recipe_nets import RECIPE


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("FOLDER", "out"))
    return path


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_shipped_recipes_are_whole_and_say_where_they_come_from(name):
    recipe = read_recipe(name)
    assert recipe.provenance is not None
    assert check_recipe(parse_yaml(write_recipe(recipe), "again"), "again") == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch_sise=3"], r"train\.batch_sise = 3: there is no such key; did you mean 'batch_size'\?"),
        (["train.optimizer.name=sdg"], r"train\.optimizer\.name = 'sdg': .*; did you mean 'sgd'\?"),
        (["train.optimizer.momentun=1"], r"train\.optimizer: torch\.optim\.SGD has no argument 'momentun'; did you mean 'momentum'\?"),
        (["train.optimizer.momentum=-1"], r"train\.optimizer: Invalid momentum value"),
        (["sparsity=1.5", "steps=0"], r"tiny\.yaml has 2 problems:\n  train\.steps = 0: .*\n  compress\.sparsity = 1\.5: .*less than 1"),
        (["sparsity=null"], r"compress: give exactly one of sparsity .* and target"),
        (["epochs=3"], r"train: give exactly one of epochs and steps"),
        (["train={}"], r"train\.batch_size: is missing"),
        (["train=3"], r"train = 3: .*"),
        (["train.augment=[{name: shift, mots: 2}]"], r"train\.augment\.0\.mots = 2: there is no such key; did you mean 'most'\?"),
        (["task.label_smoothing=2"], r"task\.(classification\.)?label_smoothing = 2: .*less than 1"),
        (["weight_bits=[8, 4]"], r"compress\.weight_bits = \[8, 4\]: .* impossible"),
        (["weight_bits={alowed: [4, 8]}"], r"compress\.weight_bits: write a range"),
        (["compress.saliency={magnitud: 1}"], r"compress\.saliency: .*no criterion named 'magnitud'"),
        (["compress.surrogate=fourrier"], r"compress\.surrogate = 'fourrier': .*; did you mean 'fourier'\?"),
        (["compress.surrogate={name: dsq, k: 3}"], r"compress\.surrogate: 'k' is no number of 'dsq', which has alpha"),
        (["method=hesso"], r"compress: 'hesso' only prunes: leave weight_bits"),
        (["method=hesso", "weight_bits=null", "activation_bits=null", "quant_lr=0.1"], r"compress: quant_lr have no effect without"),
        (["max_cycles=2"], r"compress: max_cycles have no effect on 'qasso'"),
        (["sparsity=null", "compress.target={bops: 3.0}"], r"compress\.target: Budget\(bops=3\.0\)"),
        (["train.lr_schedule={name: cosine, milestones: [0.5]}"], r"train\.lr_schedule: milestones and factor have no effect on 'cosine'"),
        (["train.lr_schedule={name: steps}"], r"train\.lr_schedule: 'steps' needs milestones"),
        (["train.distill={}", "baseline=false"], r"the recipe: train\.distill learns from the dense baseline"),
        (["model.source=resnet20"], r"model\.source = 'resnet20': .*"),
        (["version=2"], r"version = 2: .*"),
        (["name=a/b"], r"name = 'a/b': .*"),
    ],
)
def test_every_problem_is_named_by_its_key(recipe_file, overrides, message):
    with pytest.raises(ConfigError) as error:
        read_recipe(recipe_file, overrides)
    assert re.search(message, str(error.value)), str(error.value)
    assert "Value error" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 1\nname: [", r"bad\.yaml, line 2, column 8: this is no YAML"),
        ("- 1", "holds a list where a recipe is a mapping"),
        ("", "holds nothing where"),
        ("name: x", "has no version"),
        ("version: 7", "has version 7, and this geta reads version 1"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("x", "is no override: write key=value"),
        ("steps=[1", "this is no YAML"),
        ("sparcity=1", "did you mean 'compress.sparsity'"),
        ("train.steps.more=1", "'train.steps' is a int, which has no keys"),
        ("train.augment.3.most=1", "'train.augment.3' is|is a list of 1"),
        ("train.augment.3=1", "is a list of 1, numbered from 0"),
    ],
)
def test_overrides_that_say_nothing(recipe_file, override, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(recipe_file, [override])


def test_overrides_are_yaml_and_short_keys_are_those_of_one_section(recipe_file):
    recipe = read_recipe(
        recipe_file, ["sparsity=0.25", "train.augment.0.most=2", "train.optimizer.lr=1e-3", "weight_bits={allowed: [4, 8]}"]
    )
    assert recipe.compress.sparsity == 0.25
    assert recipe.train.augment[0].most == 2
    assert recipe.train.optimizer.lr == 1e-3
    assert read_bits(recipe.compress.weight_bits) == Bits.of({4, 8})
    assert [full_key(key) for key in ("folder", "seed", "lr", "data.path", "baseline")] == [
        "output.folder",
        "train.seed",
        "train.optimizer.lr",
        "data.path",
        "baseline",
    ]
    with pytest.raises(ConfigError, match=r"ambiguous: write train\.granularity|no key of a recipe"):
        full_key("granularityy!")


def test_unknown_recipes_and_a_missing_library(monkeypatch, recipe_file):
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        read_recipe("digit")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError, match=r"pip install 'geta\[recipes\]'"):
        read_recipe(recipe_file)


def test_a_recipe_does_not_change(recipe_file):
    recipe = read_recipe(recipe_file)
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.batch_size = 3


def test_learning_rates_follow_torchs_own_schedules():
    def of(**settings):
        return [ScheduleSettings(**settings).at(step, 20) for step in range(20)]

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    expected, scheduler = [], torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert of(name="cosine") == pytest.approx(expected)
    assert of(name="constant", warmup=0.25) == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 16])
    assert of(name="linear", end=0.5)[:2] == pytest.approx([1.0, 0.975])
    assert of(name="steps", milestones=[0.5, 0.75], factor=0.1) == pytest.approx([1.0] * 10 + [0.1] * 5 + [0.01] * 5)


def test_settings_become_the_librarys_objects():
    assert SurrogateSettings(name="fourier", a=(0.1,)).build() == Fourier((0.1,))
    assert read_bits({"fixed": 2}) == FixedBits(2)
    made = OptimizerSettings.model_validate({"name": "adamw", "lr": "1e-3", "betas": [0.9, 0.95], "weight_decay": "5e-4"})
    optimizer = made.build([nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["weight_decay"] == 5e-4
