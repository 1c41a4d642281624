"""Numbers of a Hugging Face configuration, and which families get their sizes from the same one.

Nothing is known by model name: a number is changed, the model is built from it on the meta device (no memory, no weights), and the
tensors that have another shape then are what it sizes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from geta.graph.families import Family, repeated
from geta.graph.names import first_names, unwrap

_Dims = frozenset[tuple[str, int]]
"""Dimensions of tensors, as (name, dimension)."""


def is_pretrained(model: nn.Module) -> bool:
    """Whether the model is one of `transformers`; the library is not imported for that."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def is_config(value: object) -> bool:
    """Whether it is a configuration of `transformers`, which must have been imported."""
    return isinstance(value, sys.modules["transformers.configuration_utils"].PreTrainedConfig)


@dataclass(frozen=True)
class Number:
    """A number of a (nested) configuration: where it stands, and its place in a list."""

    path: tuple[str, ...]
    place: int | None
    value: int | None

    def owner(self, config: Any) -> Any:
        """The configuration that holds it: `config` or one inside."""
        for name in self.path[:-1]:
            config = getattr(config, name)
        return config

    def set(self, config: Any, value: int) -> None:
        """Change it."""
        owner, name = self.owner(config), self.path[-1]
        if self.place is None:
            setattr(owner, name, value)
        else:
            items = list(getattr(owner, name))
            items[self.place] = value
            setattr(owner, name, type(getattr(owner, name))(items))

    def __str__(self) -> str:
        return ".".join(self.path) + ("" if self.place is None else f"[{self.place}]")


def config_numbers(config: Any, path: tuple[str, ...] = ()) -> Iterator[Number]:
    """All positive integers of a configuration, and what is None and may be one."""
    for name, value in vars(config).items():
        if name.startswith("_") or name.endswith("_token_id"):
            continue
        if value is None or (type(value) is int and value > 0):
            yield Number((*path, name), None, value)
        elif isinstance(value, (list, tuple)):
            yield from (Number((*path, name), place, item) for place, item in enumerate(value) if type(item) is int and item > 0)
        elif is_config(value):
            yield from config_numbers(value, (*path, name))


def build_empty(kind: type[nn.Module], config: Any) -> nn.Module:
    """`kind(config)` without memory or weights; the random state is left as it is. Raises whatever the class raises."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return kind(copy.deepcopy(config))


def tied(model: nn.Module, families: Sequence[Family]) -> list[list[Family]]:
    """`repeated(families)`; in a model of transformers those lists are joined that one number of its configuration sizes.

    The encoder and the decoder of T5, say, have one `d_ff` and one `num_heads`. A number sizes families of equal unit and size when a
    model built with another value differs in dimensions that belong to such families, and in no other. Models are built only where
    several lists, of which some can be pruned, have equal units and sizes, and only with numbers that equal this size. Where the class
    can't be built from its configuration alone, names decide.
    """
    ties, model = repeated(families), unwrap(model)
    alike: dict[tuple[str, int], list[int]] = {}
    for place, tie in enumerate(ties):
        alike.setdefault((tie[0].unit, tie[0].size), []).append(place)
    some = {(family.unit, family.size) for family in families if family.prunable}
    several = {key: places for key, places in alike.items() if len(places) > 1 and key in some}
    if not several or not is_pretrained(model):
        return ties
    try:
        sizing = _Sizing(model)
    except Exception:  # noqa: BLE001 - the constructor is the user's code, and needs more than the configuration
        return ties
    leader = list(range(len(ties)))
    for (unit, size), places in several.items():
        own = {place: frozenset(sizing.dims(ties[place])) for place in places}
        allowed = frozenset(sizing.dims([family for family in families if (family.unit, family.size) == (unit, size)]))
        for changed in sizing.by_numbers(size):
            touched = [place for place in places if own[place] & changed]
            if touched and changed <= allowed:
                first = min(leader[place] for place in touched)
                joined = {leader[place] for place in touched}
                leader = [first if one in joined else one for one in leader]
    return [[f for place, tie in enumerate(ties) if leader[place] == one for f in tie] for one in dict.fromkeys(leader)]


class _Sizing:
    """What the numbers of a model's configuration size."""

    def __init__(self, model: nn.Module) -> None:
        self._kind, self._config = type(model), model.config
        before = build_empty(self._kind, self._config)
        self._first = first_names(before)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in before.state_dict().items()}

    def dims(self, families: Sequence[Family]) -> Iterator[tuple[str, int]]:
        """All dimensions that families own."""
        for family in families:
            yield from ((self._first.get(member.param, member.param), member.dim) for member in family.members)

    def by_numbers(self, size: int) -> Iterator[_Dims]:
        """Per number of the configuration that equals `size`, the dimensions that follow it."""
        for number in config_numbers(self._config):
            for value in (size // 2, 2 * size) if number.value == size else ():
                changed = self._changed(number, value)
                if changed:
                    yield changed
                    break

    def _changed(self, number: Number, value: int) -> _Dims | None:
        """None where the class refuses the value, or builds other tensors altogether from it."""
        trial = copy.deepcopy(self._config)
        try:
            number.set(trial, value)
            shapes = {name: tuple(tensor.shape) for name, tensor in build_empty(self._kind, trial).state_dict().items()}
        except Exception:  # noqa: BLE001 - a configuration that its own class refuses says nothing
            return None
        if shapes.keys() != self._shapes.keys() or any(len(shape) != len(self._shapes[name]) for name, shape in shapes.items()):
            return None
        return frozenset(
            (self._first.get(name, name), dim)
            for name, shape in shapes.items()
            for dim, (mine, theirs) in enumerate(zip(shape, self._shapes[name], strict=True))
            if mine != theirs
        )
