"""docs/recipes.md names every key, and the recipe it shows is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from geta.recipes.compress_settings import CompressSettings, StageSettings, TargetSettings
from geta.recipes.read import check_recipe, parse_yaml
from geta.recipes.recipe import ModelSettings, OutputSettings, Recipe
from geta.recipes.run_folder import OURS
from geta.recipes.train_settings import DistillSettings, ScheduleSettings, TrainSettings

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
SECTIONS = [
    Recipe,
    ModelSettings,
    TrainSettings,
    ScheduleSettings,
    DistillSettings,
    CompressSettings,
    TargetSettings,
    StageSettings,
    OutputSettings,
]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_documented(section):
    words = set(re.findall(r"`([\w-]+)`", PAGE))
    assert [key for key in section.model_fields if key not in words] == []


def test_the_recipe_of_the_page_is_one():
    found = re.search(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found is not None
    assert check_recipe(parse_yaml(found.group(1), "page"), "page").name == "my-job"


def test_every_file_of_a_run_is_documented():
    named = set(re.findall(r"`([\w.]+)/?`", PAGE)) | {"report.html", "report.md", "report.json", "tensorboard"}
    assert [name for name in sorted(OURS) if name not in named] == []
