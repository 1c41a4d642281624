"""The smallest model of every family of timm, with the image size of its own configuration."""

from __future__ import annotations

import functools
from pathlib import Path

from .entry import Built, Entry, image

_FAMILIES = Path(__file__).with_name("timm_families.tsv")
_HEAVY = 150_000_000


def _build(name: str) -> Built:
    import timm

    model = timm.create_model(name, pretrained=False)
    channels, height, width = model.default_cfg["input_size"]
    return model, (image(channels, height, width),), {}


def entries() -> list[Entry]:
    rows = [line.split("\t") for line in _FAMILIES.read_text().splitlines() if not line.startswith("#")]
    return [Entry(f"timm/{name}", functools.partial(_build, name), heavy=int(size) > _HEAVY) for _, name, size in rows]
