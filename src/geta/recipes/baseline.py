"""The dense network that the runs of a sweep compare themselves with: trained once where all of them would train the same one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from geta.recipes.checkpoints import Checkpoints
from geta.recipes.measure import versions
from geta.recipes.recipe import Recipe

_OF_COMPRESSION = {"name", "provenance", "compress", "output"}
"""Settings that the dense network's training doesn't see."""


def shared_baseline(folder: Path | None, recipe: Recipe) -> Checkpoints | None:
    """Where the dense network of such a recipe lies once it is trained: below `folder`, in a place for these settings and versions.

    None without a folder, or when the recipe trains no dense network.
    """
    if folder is None or not recipe.baseline:
        return None
    settings = {key: value for key, value in recipe.to_dict().items() if key not in _OF_COMPRESSION}
    settings["train"] = {key: value for key, value in settings["train"].items() if key != "distill"}
    digest = hashlib.sha256(json.dumps([settings, versions()], sort_keys=True).encode()).hexdigest()
    return Checkpoints(folder / digest[:16], go_on="start the sweep again with the same command")
