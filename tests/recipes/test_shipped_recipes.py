"""Every shipped recipe is read, trains a few steps on tiny files in the real format of its data, measures, and is analysed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from torch import nn

import geta
import recipe_files
from geta.recipes.augment import AugmentSettings
from geta.recipes.data import DataSettings
from geta.recipes.tasks import TaskSettings

SHIPPED = {
    file.name.removesuffix(".yaml"): file
    for file in resources.files("geta.recipes").joinpath("shipped").iterdir()
    if file.name.endswith(".yaml")
}
OWN = {"digits", "digits-captions", "pictures-super-resolution", "stdlib-language"}
VGG = {"model.source": "geta.recipes.nets.vgg:VGG7", "model.options": {"width": 4}}


def imagenet(folder: Path) -> dict[str, Any]:
    """A small net stands in for timm's, which the zoo checks (`bench/zoo/from_timm.py`)."""
    return {"data.path": str(recipe_files.image_folder(folder)), "data.size": 16, **VGG}


def squad(folder: Path) -> dict[str, Any]:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
    return {
        "data.path": str(recipe_files.squad(folder)),
        "data.tokenizer": str(recipe_files.tokenizer(folder / "tokenizer.json")),
        "data.length": 24,
        "data.stride": 8,
        "model.source": "hf:bert",
        "model.options": {"class": "BertForQuestionAnswering", **sizes},
    }


def phi2(folder: Path) -> dict[str, Any]:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    known = str(recipe_files.tokenizer(folder / "tokenizer.json"))
    return {
        "data.path": str(recipe_files.choices(folder)),
        "data.tokenizer": known,
        "model.source": "hf:phi",
        "model.options": {"class": "PhiForCausalLM", "vocab_size": 40, **sizes},
    }


TINY: dict[str, Callable[[Path], dict[str, Any]]] = {
    "cifar10-resnet20": lambda f: {"data.path": str(recipe_files.cifar10(f))},
    "cifar10-resnet56": lambda f: {"data.path": str(recipe_files.cifar10(f))},
    "cifar10-vgg7": lambda f: {"data.path": str(recipe_files.cifar10(f)), "model.options": {"width": 8, "pooled": True}},
    "cifar10-simplevit": lambda f: {
        "data.path": str(recipe_files.cifar10(f)),
        "model.options": {"patch": 8, "width": 32, "depth": 1, "heads": 2, "hidden": 32},
    },
    "commonsense-phi2": phi2,
    "digits": lambda f: {},
    "digits-captions": lambda f: {"task.evaluation_batch": 4},
    "div2k-carn": lambda f: {"data.path": str(recipe_files.image_pairs(f)), "data.crop": 16, "model.options": {"width": 8}},
    "imagenet-deit-tiny": imagenet,
    "imagenet-pvtv2": imagenet,
    "imagenet-resnet50": imagenet,
    "imagenet-swin-tiny": imagenet,
    "imagenet-vit-small": imagenet,
    "pictures-super-resolution": lambda f: {"data.crop": 16, "data.per_picture": 1, "model.options": {"width": 8}},
    "squad-bert": squad,
    "stdlib-language": lambda f: {
        "data.context": 16,
        "data.most_bytes": 2000,
        "data.most_test_bytes": 500,
        "model.options": {"width": 16, "depth": 1, "heads": 2, "hidden": 24},
    },
}


def read(name: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    recipe = yaml.safe_load(SHIPPED[name].read_text())
    for key, value in (overrides or {}).items():
        section, _, last = key.partition(".")
        recipe[section][last] = value
    return recipe


def build(model: dict[str, Any], facts: dict[str, Any]) -> nn.Module:
    kind, _, rest = model["source"].partition(":")
    options = dict(model.get("options", {}))
    if kind == "hf":
        import transformers

        cls = getattr(transformers, options.pop("class"))
        return cls(transformers.AutoConfig.for_model(rest, use_cache=False, **options))
    factory = getattr(importlib.import_module(kind), rest)
    known = inspect.signature(factory).parameters
    return factory(**{key: value for key, value in facts.items() if key in known} | options)


def test_every_recipe_that_ships_is_tested():
    assert sorted(TINY) == sorted(SHIPPED)
    assert len(SHIPPED) <= 30


@pytest.mark.parametrize("name", list(TINY))
def test_a_recipe_says_where_it_comes_from(name):
    recipe = read(name)
    assert (recipe["version"], recipe["name"] in {name, "digits-resnet20"}) == (1, True)
    assert set(recipe) == {"version", "name", "provenance", "model", "data", "task", "train", "compress", "baseline", "output"}
    provenance = recipe["provenance"]
    assert provenance["source"]
    assert provenance["setting"]
    if name not in OWN:
        assert "arXiv" in provenance["source"]
        unknown = [key for key, value in provenance["published"].items() if value is None]
        assert not unknown or "could not be checked" in provenance["note"]  # a number is quoted, or its absence explained


@pytest.mark.parametrize("name", list(TINY))
def test_a_recipe_trains_measures_and_is_analysed(name, tmp_path):
    recipe = read(name, TINY[name](tmp_path))
    data = TypeAdapter(DataSettings).validate_python(recipe["data"]).load()
    task: Any = TypeAdapter(TaskSettings).validate_python(recipe["task"])
    augment: list[Any] = TypeAdapter(list[AugmentSettings]).validate_python(recipe["train"].get("augment", []))
    geta.seed_everything(0)
    model = build(recipe["model"], dict(data.facts))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        batch = data.train.batch(range(min(4, len(data.train))))
        for change in augment:
            batch = change.apply(batch, generator)
        args, kwargs = task.call(batch)
        loss = task.loss(model.train()(*args, **kwargs), batch)
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        totals = []
        for rows in (range(2), range(2, 4)):
            test = data.test.batch([row % len(data.test) for row in rows])
            args, kwargs = task.call(test)
            totals.append(task.tally(model.eval()(*args, **kwargs), test))
    score = task.score(torch.stack(totals).sum(dim=0))
    assert 0.0 <= score < float("inf")
    args, kwargs = task.call(data.train.batch([0, 1]))
    assert geta.analyze(model, args, kwargs).num_groups > 0
