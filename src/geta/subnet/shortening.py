"""Which elements of which lists of modules go, and what the names of the others become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Shortening:
    """Lists that get shorter. tables: {path of a list: {name of each element: its new name, None = it goes}}, all as in the whole model."""

    tables: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, blocks: Sequence[str]) -> Shortening:
        """The lists without these elements; elements that have numbers for names are numbered anew, as `del layers[i]` does it."""
        tables: dict[str, dict[str, str | None]] = {}
        for path in dict.fromkeys(block.rpartition(".")[0] for block in blocks):
            names = [*model.get_submodule(path)._modules]  # all: named_children leaves out modules that stand there twice
            prefix = f"{path}." if path else ""
            kept = [name for name in names if f"{prefix}{name}" not in blocks]
            numbered = names == [str(place) for place in range(len(names))]
            new = {name: str(place) if numbered else name for place, name in enumerate(kept)}
            tables[path] = {name: new.get(name) for name in names}
        return cls(tables)

    def __bool__(self) -> bool:
        return bool(self.tables)

    def name(self, old: str) -> str | None:
        """The new name of a tensor or module; None if it goes."""
        parts = old.split(".")
        found = []
        for place, part in enumerate(parts):
            table = self.tables.get(".".join(parts[:place]), {})
            new = table.get(part, part)
            if new is None:
                return None
            found.append(new)
        return ".".join(found)

    def kept(self, path: str) -> list[int]:
        """Places in a list that stay."""
        return [place for place, new in enumerate(self.tables[path].values()) if new is not None]

    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(before, after) of every list, each pair once."""
        return tuple(dict.fromkeys((len(table), len(self.kept(path))) for path, table in self.tables.items()))

    def apply(self, model: nn.Module) -> None:
        """Take the elements out, in place."""
        lists = [(model.get_submodule(path), table) for path, table in self.tables.items()]
        for module, table in lists:
            module._modules = {new: module._modules[old] for old, new in table.items() if new is not None}

    def lines(self) -> list[str]:
        """ "model.layers: 4 -> 3 (without 1)" for every list."""
        found = []
        for path, table in self.tables.items():
            gone = ", ".join(name for name, new in table.items() if new is None)
            found.append(f"{path or 'the model itself'}: {len(table)} -> {len(self.kept(path))} (without {gone})")
        return found
