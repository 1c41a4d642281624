"""A recipe run by two processes, as `torchrun` would start them; importable by spawned processes."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from geta.recipes.read import read_recipe
from geta.recipes.run import run_recipe


def run_on_ranks(rank: int, folder: Path, recipe: Path, overrides: list[str]) -> dict[str, Any]:
    """Join through what `torchrun` puts into the environment, but meet in a file instead of at a port; the result, if there is one."""
    dist.destroy_process_group()
    real = dist.init_process_group
    meet = {"rank": rank, "world_size": 2}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group = partial(real, init_method=f"file://{folder / 'first'}", **meet)
    try:
        found = run_recipe(read_recipe(recipe, overrides))
    finally:
        dist.init_process_group = real
    return {} if found is None else {"pruned": found["groups"]["pruned_groups"], "compact": found["metric"]["compact"]}
