"""Checks that turn QASSO's arguments into what it works with; every contradiction is found before anything is changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from geta.errors import ConfigError
from geta.graph.configured import tied
from geta.graph.families import Family
from geta.optim.groups import Graph, GroupIndex
from geta.optim.schedule import Schedule
from geta.quant import Bits, BitsLike, Quantizer, fixed_quantizers, quantizers


def check_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """Raise ConfigError unless 0 <= sparsity < 1."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0.0 <= sparsity < 1.0:
        raise ConfigError(f"{name} is {sparsity!r}: it must be in [0, 1), the share of groups to remove")


def check_quant_lr(quant_lr: float) -> None:
    """Raise ConfigError unless the learning rate is finite and not negative."""
    if not 0.0 <= quant_lr < float("inf"):
        raise ConfigError(f"quant_lr is {quant_lr!r}: it must be finite and not negative")


def check_uniform(uniform: bool) -> bool:
    """The setting itself; ConfigError for what is neither True nor False."""
    if not isinstance(uniform, bool):
        raise ConfigError(f"uniform is {uniform!r}: it must be True (families that repeat across layers lose equal numbers) or False")
    return uniform


def layer_share(graph: Graph, index: GroupIndex, shares: tuple[float | None, float], *, budget: bool, uniform: bool) -> float:
    """The share of whole residual branches that goes. Raises ConfigError for settings that contradict each other.

    shares: `layer_sparsity` as it is given, and `sparsity`, which counts where it isn't.
    """
    given, sparsity = shares
    if given is not None:
        check_sparsity(given, "layer_sparsity")
        if budget:
            raise ConfigError(f"both layer_sparsity = {given} and a budget are given: the budget decides which branches go; drop one")
        without = branches_without_block(graph) if uniform and given > 0.0 and not index.layers else []
        if without:
            raise ConfigError(
                f"layer_sparsity is {given}, but with uniform=True whole blocks go, and '{without[0].name}' is part of none (nor is any "
                f"other branch): {without[0].no_block}: use uniform=False and the graph product"
            )
        if given > 0.0 and not index.layers:
            raise ConfigError(
                f"layer_sparsity is {given}, but the graph has no residual branch that can go: use geta.analyze(..., depth=True)"
            )
    return sparsity if given is None else given


def ties_of(graph: Graph, index: GroupIndex) -> list[list[int]]:
    """Places of the families that repeat across layers, and of the residual branches of each block, for `Selector`."""
    place = {family.name: number for number, family in enumerate(index.families)}
    ordinary = [family for family in index.families if not family.is_layer]
    units = [unit for together in index.units for unit in together]
    return [*([place[family.name] for family in tie] for tie in tied(graph.model, ordinary)), *units]


def branches_without_block(graph: Graph) -> list[Family]:
    """Whole residual branches that could go, but are part of no block that could."""
    return [family for family in graph.families if family.is_layer and family.prunable and not family.block]


def unevenly_prunable(graph: Graph) -> list[str]:
    """In words, which families stay whole although others that are the same part of other layers don't."""
    notes = []
    without = branches_without_block(graph)
    if without:
        count = sum(family.is_layer and family.prunable for family in graph.families)
        notes.append(
            f"uniform: {len(without)} of {count} residual branches stay, because whole blocks go and they are part of none (first: "
            f"'{without[0].name}': {without[0].no_block})"
        )
    for tie in tied(graph.model, [family for family in graph.families if not family.is_layer]):
        whole = [family.name for family in tie if not family.prunable]
        if 0 < len(whole) < len(tie):
            notes.append(
                f"uniform: {len(whole)} of {len(tie)} families that repeat can't be pruned (first: '{whole[0]}'), so that the others lose "
                f"equal numbers, but layers come to differ all the same"
            )
    return notes


def as_schedule(schedule: Schedule | int) -> Schedule:
    """A Schedule from a Schedule or from the planned number of steps."""
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, int):
        return Schedule(total_steps=schedule)
    raise ConfigError(f"schedule is {schedule!r}: give a Schedule, or the planned number of steps")


def refuse_unprunable(graph: Graph, sparsity: float) -> None:
    """Raise ConfigError that quotes the most common reasons why nothing can be removed."""
    reasons = Counter(family.reason for family in graph.families if not family.prunable)
    common = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:3]
    words = "; ".join(f"{reason} ({count} families)" for reason, count in common) or "the graph has no families"
    raise ConfigError(f"sparsity is {sparsity}, but the model has no prunable group: {words}; use sparsity=0")


def replaced_bits(setting: str, value: BitsLike | None, kind: str, found: Sequence[Quantizer]) -> Bits | None:
    """The bounds that replace those of the quantizers of `kind`; None keeps them."""
    if value is None:
        return None
    if not any(quantizer.kind == kind for quantizer in found):
        raise ConfigError(
            f"{setting} is {value!r}, but the model has no {kind} quantizers: call geta.quantize(model, ...) first, or leave {setting} out"
        )
    return Bits.of(value)


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all quantizers of a model, each once: those that `fully_shard` is to leave alone (`ignored_params`)."""
    found = [*quantizers(model).values(), *fixed_quantizers(model).values()]
    return list({id(p): p for quantizer in found for p in quantizer.parameters()}.values())


def trained_parameters(graph: Graph, found: Sequence[Quantizer]) -> list[tuple[str, nn.Parameter]]:
    """The quantizers' parameters that are trained, with their names in the model."""
    mine = {id(p) for quantizer in found for p in quantizer.parameters()}
    return [(name, p) for name, p in graph.model.named_parameters() if id(p) in mine and p.requires_grad]
