"""The smallest model of every family of timm, with the image size of its own configuration; a third of it for the few large ones.

And the models of the recipes that ship: the tests of these run them with a small net, since timm has an environment of its own.
"""

from __future__ import annotations

import functools
from pathlib import Path

from geta.recipes.read import parse_yaml, shipped_recipes

from .entry import Built, Entry, image

_FAMILIES = Path(__file__).with_name("timm_families.tsv")
_HEAVY = 150_000_000


def _build(name: str, heavy: bool) -> Built:
    import timm

    model = timm.create_model(name, pretrained=False)
    channels, height, width = model.default_cfg["input_size"]
    if heavy and not model.default_cfg.get("fixed_input_size"):
        height, width = height // 3, width // 3
    return model, (image(channels, height, width),), {}


def entries() -> list[Entry]:
    rows = [line.split("\t") for line in _FAMILIES.read_text().splitlines() if not line.startswith("#")]
    heavy = {name: int(size) > _HEAVY for _, name, size in rows}
    heavy |= {name: False for name in _of_recipes() if name not in heavy}
    return [Entry(f"timm/{name}", functools.partial(_build, name, large), heavy=large) for name, large in heavy.items()]


def _of_recipes() -> list[str]:
    """timm's models in shipped recipes."""
    found = []
    for file in shipped_recipes().values():
        kind, _, name = parse_yaml(file.read_text(encoding="utf-8"), file.name)["model"]["source"].partition(":")
        found += [name] if kind == "timm" else []
    return found
