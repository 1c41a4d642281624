"""Hugging Face models: find the configuration that builds a model of the cut shapes, so that `from_pretrained` works again.

Which number of a configuration stands for which size is not known by model name: numbers are changed and the model is built from them on
the meta device (no memory, no weights) until every tensor has the wanted shape.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from geta.graph.configured import Number, build_empty, config_numbers, is_config
from geta.subnet.attributes import HEAD_COUNTS, Change, Sizes, apply
from geta.subnet.trials import type_and_line

MOST_BUILDS = 200
_Shapes = Mapping[str, tuple[int, ...]]


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
    line: str
    is_count: bool


class UnfitError(Exception):
    """No configuration was found; the message says why."""


def fitting_configs(model: nn.Module, wanted: _Shapes, sizes: Sizes) -> Iterator[Fit]:
    """Configurations from which `type(model)` builds tensors of the `wanted` shapes, likeliest first; UnfitError when there is none.

    wanted: names and shapes of the sliced model's state dict. sizes: all that the cut changed, tensors and numbers of groups.
    Shapes alone can't tell half the heads from heads of half the width: fewer heads come first, the caller tries them out.
    """
    search = _Search(type(model), wanted, sizes)
    config: Any = model.config
    try:
        before = search.build(config)
    except Exception as error:  # the constructor is the user's code
        raise UnfitError(f"{type(model).__name__}(config) can't be built on the meta device: {type_and_line(error)}") from error
    seen: list[list[str]] = []
    for heads_first in (True, False):
        found, numbers = search.run(config, before, heads_first=heads_first)
        if numbers not in seen:
            seen.append(numbers)
            yield Fit(found, numbers, *_differences(before, search.build(found)))


class _Search:
    def __init__(self, kind: type[nn.Module], wanted: _Shapes, sizes: Sizes) -> None:
        self._kind, self._wanted, self._sizes = kind, wanted, sizes
        self._builds = 0

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
                raise UnfitError("no number in model.config gives every layer its new size")
            left, config = best.wrong, best.config
            numbers.append(best.line)
        return config, numbers

    def _better(self, config: Any, left: int) -> Iterator[_Step]:
        for number, value in self._proposals(config):
            if self._builds >= MOST_BUILDS:
                return
            trial = copy.deepcopy(config)
            try:
                number.set(trial, value)
                wrong = self.wrong(self.build(trial))
            except Exception:  # noqa: BLE001, S112 - a configuration that its own class refuses is no candidate
                continue
            if wrong < left:
                yield _Step(wrong, trial, f"config.{number}: {number.value} -> {value}", number.path[-1] in HEAD_COUNTS)

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


_OPTIONAL = frozenset({"n_inner", "head_dim", "intermediate_size", "ffn_dim", "d_kv", "d_inner"})
"""Numbers that a configuration may leave out, for a default that follows from another number."""


def _distance(wanted: tuple[int, ...] | None, found: tuple[int, ...] | None) -> int:
    if wanted is None or found is None or len(wanted) != len(found):
        return 4
    return sum(a != b for a, b in zip(wanted, found, strict=True))


def _differences(before: nn.Module, after: nn.Module) -> tuple[list[Change], list[tuple[str, str, Any]]]:
    """Attributes of modules that the configuration decides, and the configurations that modules hold."""
    changes: list[Change] = []
    records: list[tuple[str, str, Any]] = []
    modules = dict(after.named_modules())
    for path, module in before.named_modules():
        for name, value in vars(module).items():
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
