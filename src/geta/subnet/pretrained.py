"""Hugging Face models: find the configuration that builds a model of the cut shapes, so that `from_pretrained` works again.

Which number of a configuration stands for which size is not known by model name: numbers are changed and the model is built from them on
the meta device (no memory, no weights) until every tensor has the wanted shape.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from geta.graph.configured import Number, build_empty, config_numbers, is_config
from geta.subnet.attributes import HEAD_COUNTS, Change, Sizes, apply
from geta.subnet.shortening import Shortening
from geta.subnet.trials import type_and_line

MOST_BUILDS = 200
_Shapes = Mapping[str, tuple[int, ...]]
_Way = Callable[[Any], list[str]]


@dataclass(frozen=True)
class Fit:
    """A configuration that describes the cut model: its changed numbers, and what these change in the modules."""

    config: Any
    numbers: list[str]
    changes: list[Change]
    records: list[tuple[str, str, Any]]

    def adopt(self, model: nn.Module) -> None:
        """Give a sliced model the configuration and the attributes that go with it."""
        for path, name, record in self.records:
            setattr(model.get_submodule(path), name, record)
        for change in self.changes:
            apply(model, change)


@dataclass(frozen=True)
class _Step:
    """A configuration with one more number changed. wrong: what is still wrong. is_count: whether the number counts heads."""

    wrong: int
    config: Any
    lines: list[str]
    is_count: bool


class UnfitError(Exception):
    """No configuration was found; the message says why."""


def fitting_configs(model: nn.Module, wanted: _Shapes, sizes: Sizes) -> Iterator[Fit]:
    """Configurations from which `type(model)` builds tensors of the `wanted` shapes, likeliest first; UnfitError when there is none.

    wanted: names and shapes of the sliced model's state dict. sizes: all that the cut changed, tensors and numbers of groups.
    Shapes alone can't tell half the heads from heads of half the width: fewer heads come first, the caller tries them out.
    """
    search = _Search(type(model), wanted, sizes)
    before = search.built_from(model.config)
    seen: list[list[str]] = []
    for heads_first in (True, False):
        found, numbers = search.run(model.config, before, heads_first=heads_first)
        if numbers not in seen:
            seen.append(numbers)
            yield Fit(found, numbers, *_differences(before, search.build(found)))


def fitting_lengths(model: nn.Module, wanted: _Shapes, shortening: Shortening) -> Iterator[Fit]:
    """The same for a model that has lost elements of lists (`shortening`) and nothing else: numbers of layers are what changes.

    With a number of layers go the lists beside it that have one entry per layer, and entries whose keys are names of modules and tensors.
    """
    search = _LengthSearch(type(model), wanted, shortening)
    before = search.built_from(model.config)
    found, numbers = search.run(model.config, before, heads_first=False)
    changes, records = _differences(before, search.build(found), shortening)
    present = [(change, vars(model.get_submodule(change.module)).get(change.path[0])) for change in changes]
    yield Fit(found, numbers, [change for change, value in present if value != change.after], records)


class _Search:
    hopeless = "no number in model.config gives every layer its new size"

    def __init__(self, kind: type[nn.Module], wanted: _Shapes, sizes: Sizes) -> None:
        self._kind, self._wanted, self._sizes = kind, wanted, sizes
        self._builds = 0

    def built_from(self, config: Any) -> nn.Module:
        """The model that the class builds from its own configuration; UnfitError where it doesn't."""
        try:
            return self.build(config)
        except Exception as error:  # the constructor is the user's code
            raise UnfitError(f"{self._kind.__name__}(config) can't be built on the meta device: {type_and_line(error)}") from error

    def build(self, config: Any) -> nn.Module:
        self._builds += 1
        return build_empty(self._kind, config)

    def wrong(self, model: nn.Module) -> int:
        """How many tensors are missing, left over, or of another shape, and by how many dimensions."""
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        names = dict.fromkeys([*self._wanted, *shapes])
        return sum(_distance(self._wanted.get(name), shapes.get(name)) for name in names)

    def run(self, config: Any, built: nn.Module, *, heads_first: bool) -> tuple[Any, list[str]]:
        """Change one number at a time, always the one that leaves the fewest tensors wrong (numbers of heads before others)."""
        left, numbers = self.wrong(built), []
        while left:
            best = min(self._better(config, left), key=lambda one: (not (heads_first and one.is_count), one.wrong), default=None)
            if best is None:
                raise UnfitError(self.hopeless)
            left, config = best.wrong, best.config
            numbers += best.lines
        return config, numbers

    def _better(self, config: Any, left: int) -> Iterator[_Step]:
        for number, value in self._proposals(config):
            tried: list[Any] = []
            for change in self.ways(number, value):
                if self._builds >= MOST_BUILDS:
                    return
                trial = copy.deepcopy(config)
                try:
                    more = change(trial)
                    if any(vars(trial) == vars(other) for other in tried):
                        continue
                    tried.append(trial)
                    wrong = self.wrong(self.build(trial))
                except Exception:  # noqa: BLE001, S112 - a configuration that its own class refuses is no candidate
                    continue
                if wrong < left:
                    lines = [f"config.{number}: {number.value} -> {value}", *more]
                    yield _Step(wrong, trial, lines, number.path[-1] in HEAD_COUNTS)

    def ways(self, number: Number, value: int) -> Iterator[_Way]:
        """Ways to give a number another value; each changes a configuration and says what else changed with it, one line each."""

        def alone(config: Any) -> list[str]:
            number.set(config, value)
            return []

        yield alone

    def _proposals(self, config: Any) -> Iterator[tuple[Number, int]]:
        for number in config_numbers(config):
            value = number.value
            pairs = [*self._sizes.counts, *self._sizes.tensors]
            if value is None:
                follow = [after for _, after in self._sizes.tensors] if number.path[-1] in _OPTIONAL else []
            else:
                follow = [after for before, after in pairs if before == value]
                follow += [value * after // before for before, after in pairs if before % value == 0 and value * after % before == 0]
            for after in dict.fromkeys(follow):
                if after not in (0, value):
                    yield number, after


class _LengthSearch(_Search):
    hopeless = "no number in model.config says how many layers there are"

    def __init__(self, kind: type[nn.Module], wanted: _Shapes, shortening: Shortening) -> None:
        super().__init__(kind, wanted, Sizes((), shortening.lengths()))
        self._shortening = shortening

    def ways(self, number: Number, value: int) -> Iterator[_Way]:
        for path, table in self._shortening.tables.items():
            kept = self._shortening.kept(path)
            if (len(table), len(kept)) == (number.value, value):
                follow = functools.partial(_thinned, number, kept, Shortening({path: table}))
                yield lambda config, follow=follow: [*follow(config), *_derived(number, value, config)]  # type: ignore[misc]
                yield follow
        yield from super().ways(number, value)


def _derived(number: Number, value: int, config: Any) -> list[str]:
    """Change what follows from a number, in place: settings that a configuration has which is made with the number alone."""
    if number.place is not None:
        return []
    owner = number.owner(config)
    before, after = (vars(type(owner)(**{number.path[-1]: one})) for one in (number.value, value))
    lines = []
    for name, now in list(vars(owner).items()):
        if name != number.path[-1] and name in before and name in after and now == before[name] != after[name]:
            vars(owner)[name] = after[name]
            lines.append(f"config.{'.'.join((*number.path[:-1], name))}: {now} -> {after[name]}")
    return lines


def _thinned(number: Number, kept: Sequence[int], shortening: Shortening, config: Any) -> list[str]:
    """Change a number of layers and what has an entry per layer beside it, in place; says what the entries were."""
    owner = number.owner(config)
    lines = []
    for name, value in list(vars(owner).items()) if number.place is None else ():
        if isinstance(value, list | tuple) and len(value) == number.value:
            left = type(value)(value[place] for place in kept)
            vars(owner)[name] = left  # both at once: some classes compare the two whenever one is set
            lines.append(f"config.{'.'.join((*number.path[:-1], name))}: {value} -> {left}")
        elif isinstance(value, dict):
            vars(owner)[name] = _renamed(value, shortening)
    number.set(config, len(kept))
    return lines


def _renamed(value: Any, shortening: Shortening) -> Any:
    """A dictionary whose keys are names follows these; other values stay."""
    if not isinstance(value, dict):
        return value
    names = {key: shortening.name(key) if isinstance(key, str) else key for key in value}
    return {names[key]: _renamed(item, shortening) for key, item in value.items() if names[key] is not None}


_OPTIONAL = frozenset({"n_inner", "head_dim", "intermediate_size", "ffn_dim", "d_kv", "d_inner"})
"""Numbers that a configuration may leave out, for a default that follows from another number."""


def _distance(wanted: tuple[int, ...] | None, found: tuple[int, ...] | None) -> int:
    if wanted is None or found is None or len(wanted) != len(found):
        return 4
    return sum(a != b for a, b in zip(wanted, found, strict=True))


def _differences(
    before: nn.Module, after: nn.Module, shortening: Shortening | None = None
) -> tuple[list[Change], list[tuple[str, str, Any]]]:
    """Attributes of modules that the configuration decides, and the configurations that modules hold.

    shortening: what of the modules `before` is no longer there `after`, and how the others are called then.
    """
    changes: list[Change] = []
    records: list[tuple[str, str, Any]] = []
    modules = dict(after.named_modules())
    for old, module in before.named_modules():
        path = shortening.name(old) if shortening and old else old
        for name, value in vars(module).items() if path is not None else ():
            assert path is not None
            now: Any = vars(modules[path]).get(name)
            if name.startswith("_") or type(now) is not type(value):
                continue
            if is_config(value):
                if is_config(now) and value.to_dict() != now.to_dict():
                    records.append((path, name, now))
            elif _plain(value) and now != value:
                changes.append(Change(path, (name,), value, now))
    return changes, records


def _plain(value: object) -> bool:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(_plain(item) for item in value)
    return isinstance(value, (int, float, str))
