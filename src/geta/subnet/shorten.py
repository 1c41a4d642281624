"""Leave whole blocks out of a copy of the user's module tree: elements of lists of which nothing but residual branches is left.

A block (`geta.graph.elements`) whose branches are all removed hands its input on, so that its list can do without it. What counts the
elements follows: numbers in modules that say at which place their element stands, the configuration of a Hugging Face model, and
numbers equal to the length of the list where the forward needs them. The shorter model is run beside the zeroed one.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from geta.errors import BadModelError
from geta.graph.configured import is_pretrained
from geta.graph.dependency import DependencyGraph
from geta.graph.families import Selection
from geta.quant.fixed import FixedQuantizer
from geta.quant.quantizer import Quantizer
from geta.subnet.attributes import Change, Sizes, apply
from geta.subnet.branches import selected_layers
from geta.subnet.pretrained import Fit, UnfitError, fitting_lengths
from geta.subnet.proof import bench_of, fitted, shapes_without_quantizers, trained_alike
from geta.subnet.shortening import Shortening
from geta.subnet.trials import type_and_line


@dataclass(frozen=True)
class Shorter:
    """A copy of the model without the blocks; nothing else in it is cut.

    lines: what changed, in words. changes: the attributes that were set, as data. undescribed: why no configuration describes it, or "".
    """

    model: nn.Module
    shortening: Shortening
    lines: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    undescribed: str = ""


def removed_blocks(model: nn.Module, graph: DependencyGraph, selection: Selection) -> list[str]:
    """Paths of the blocks that go. Raises BadModelError for a removed branch that no block goes with, naming what is still there."""
    gone = selected_layers(graph, selection)
    names = {family.name for family in gone}
    for family in gone:
        if not family.block:
            raise BadModelError(
                f"the eager product can leave out whole elements of lists of modules, and '{family.name}' is part of none that can go: "
                f"{family.no_block}. Keep this branch, or use the graph product (geta.compact)"
            )
        left = [f"'{one.name}'" for one in graph.families if one.block == family.block and one.name not in names]
        if left:
            raise BadModelError(
                f"the eager product can leave out '{family.block}' of this {type(model).__name__} only as a whole: '{family.name}' is "
                f"removed, but {', '.join(left)} {'is' if len(left) == 1 else 'are'} still there. Remove all branches of a block or none "
                f"(training with uniform=True does), or use the graph product (geta.compact)"
            )
    return list(dict.fromkeys(family.block for family in gone))


def shorter(model: nn.Module, graph: DependencyGraph, blocks: list[str]) -> Shorter:
    """The zeroed `model` without these blocks, proved to compute the same; itself where there are none.

    Raises BadModelError with the place and the reason where a model without them computes something else.
    """
    shortening = Shortening.of(model, blocks)
    if not shortening:
        return Shorter(model, shortening)
    small, numbers = _without(model, shortening)
    found: Shorter | str = ""
    undescribed = ""
    for fit in _fits(small, model, shortening):
        if isinstance(fit, str):
            undescribed = fit
            continue
        found = _proved(model, graph, small, (shortening, numbers, fit))
        if isinstance(found, Shorter):
            return found
        if fit:
            undescribed = f"with {', '.join(fit.numbers)} it doesn't run as the zeroed model does, {found}"
            small, numbers = _without(model, shortening)  # the configuration left its marks on the other one
    if undescribed:
        found = _proved(model, graph, small, (shortening, numbers, None))
    if isinstance(found, Shorter):
        return replace(found, undescribed=undescribed)
    also = f", where {numbers[0]}" + (f" and {len(numbers) - 1} more are set" if len(numbers) > 1 else " is set") if numbers else ""
    raise BadModelError(
        f"there is no eager product of this {type(model).__name__}, use the graph product: without {', '.join(blocks)}{also}, it does not "
        f"compute what it computes with their branches zero: {found}"
    )


def _without(model: nn.Module, shortening: Shortening) -> tuple[nn.Module, list[Change]]:
    """A copy of the model without the elements that go, and the numbers of places that were changed in it."""
    try:
        small = copy.deepcopy(model)
    except Exception as error:
        raise BadModelError(f"there is no eager product, because the model can't be copied: {type_and_line(error)}") from error
    numbers = _places(small, shortening)
    shortening.apply(small)
    for module in small.modules():
        if isinstance(module, Quantizer | FixedQuantizer):
            module.name = shortening.name(module.name) or module.name
    for change in numbers:
        apply(small, change)
    return small, numbers


def _fits(small: nn.Module, model: nn.Module, shortening: Shortening) -> Iterator[Fit | str | None]:
    """Configurations to try, and in words why there are none (any more); None for a model that has no configuration."""
    if not is_pretrained(model):
        yield None
        return
    try:
        yield from fitting_lengths(small, shapes_without_quantizers(small), shortening)
    except UnfitError as error:
        yield str(error)


def _proved(model: nn.Module, graph: DependencyGraph, small: nn.Module, made: tuple[Shortening, list[Change], Fit | None]) -> Shorter | str:
    """The model with a configuration, and with other numbers set where that is needed; in words why it isn't the zeroed one."""
    shortening, numbers, fit = made
    if fit:
        fit.adopt(small)
    sizes = Sizes((), shortening.lengths())
    found, _, problem = fitted(bench_of(model, small, graph, lambda _: sizes, shortening.name))
    if problem:
        return problem
    for change in found:
        apply(small, change)
    notes, reason = trained_alike(model, small, graph)
    if reason:
        return reason
    changes = [*numbers, *found]
    lines = [*shortening.lines(), *map(str, changes)]
    if fit:
        lines += [*fit.numbers, *(str(change) for change in fit.changes if str(change) not in lines)]
    return Shorter(small, shortening, lines, changes, notes)


def _places(model: nn.Module, shortening: Shortening) -> list[Change]:
    """Numbers that say at which place of a list their element stands (`layer_idx`), with what they have to become.

    That is an attribute which in all elements that have it, two at least, is the place of the element: by its name alone, or by its name
    and the module in the element that has it. `model` has all elements; the changes name modules as they are called without those that go.
    """
    changes = []
    for path, table in shortening.tables.items():
        owner, kept = model.get_submodule(path), shortening.kept(path)
        prefix = f"{path}." if path else ""
        seen: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        found: list[tuple[int, str, str]] = []
        for place, key in enumerate(table):
            for inner, module in owner.get_submodule(key).named_modules():
                for name, value in vars(module).items():
                    if type(value) is int:
                        found.append((place, inner, name))
                        seen[(name,)].append((place, value))
                        seen[name, inner].append((place, value))
        for place, inner, name in found:
            ways = [seen[(name,)], seen[name, inner]]
            if place not in kept or not any(len(dict(way)) > 1 and all(at == value for at, value in way) for way in ways):
                continue
            key = list(table)[place]
            new = shortening.name(f"{prefix}{key}.{inner}" if inner else f"{prefix}{key}")
            if new is not None and kept.index(place) != place:
                changes.append(Change(new, (name,), place, kept.index(place)))
    return changes
