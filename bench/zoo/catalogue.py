"""All models of the zoo by name; `python -m bench.zoo.catalogue [GLOB]` lists them."""

from __future__ import annotations

import fnmatch
import functools
import sys

from . import from_diffusers, from_timm, from_torchvision, from_transformers, own_nets
from .entry import Entry

_SOURCES = (from_timm, from_torchvision, from_transformers, from_diffusers, own_nets)


@functools.cache
def catalogue() -> dict[str, Entry]:
    """{name: entry} in a fixed order. Nothing is imported or built before an entry is."""
    found: dict[str, Entry] = {}
    for source in _SOURCES:
        for entry in source.entries():
            assert entry.name not in found, entry.name
            found[entry.name] = entry
    return found


def find(name: str) -> Entry:
    """The entry of this name; raises KeyError with near names."""
    if name in catalogue():
        return catalogue()[name]
    near = [known for known in catalogue() if fnmatch.fnmatch(known, f"*{name.rpartition('/')[2]}*")]
    raise KeyError(f"the zoo has no model '{name}'" + (f"; did you mean {', '.join(near[:5])}?" if near else ""))


def main() -> None:
    pattern = sys.argv[1] if len(sys.argv) > 1 else "*"
    for name in fnmatch.filter(catalogue(), pattern):
        print(name)


if __name__ == "__main__":
    main()
