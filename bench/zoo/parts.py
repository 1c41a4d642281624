"""The single checks on one model; each returns figures for the record and raises `WrongError` when the claim does not hold."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import geta
from geta.graph import DependencyGraph
from geta.graph.names import find_tensor
from geta.graph.render import covered_fraction
from geta.subnet import CompactModel
from geta.subnet.comparison import max_difference

from .perturb import fresh_inputs
from .quantized import same_families

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Figures = dict[str, Any]
Selection = dict[str, Tensor]

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_FRESH_SEED = 11
_REACHED = 0.9


class WrongError(Exception):
    """A claim does not hold; the figures that show it go into the record."""

    def __init__(self, message: str, **figures: Any) -> None:
        super().__init__(message)
        self.figures = figures


def outputs(model: nn.Module, inputs: Inputs, *, grad: bool = False) -> list[Tensor]:
    """All tensors that the model returns, under a fixed seed for whatever it draws."""
    args, kwargs = copy.deepcopy(inputs)
    torch.manual_seed(5)
    with torch.set_grad_enabled(grad):
        return [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _followed(graph: DependencyGraph) -> bool:
    """Whether the model has control flow that depends on values, so that torch.export has refused it."""
    return any("followed the path that the example inputs take" in note for note in graph.notes)


def describe(graph: DependencyGraph) -> Figures:
    """Size and reach of the analysis, and why the rest of the parameters can't be pruned."""
    fixed = [note for note in graph.notes if note.startswith("captured")]
    return {
        "captured": "example's path, fixed sizes" if _followed(graph) else fixed[0] if fixed else "open batch",
        "notes": list(graph.notes),
        "parameters": sum(p.numel() for p in graph.model.parameters()),
        "families": len(graph.families),
        "prunable_families": len(graph.prunable_families),
        "groups": graph.num_groups,
        "covered": covered_fraction(graph),
        "reasons": _reasons(graph),
    }


def _reasons(graph: DependencyGraph, most: int = 3) -> list[list[Any]]:
    """[[reason, share of all parameters], ...] over parameters that no prunable family touches, largest share first.

    Module paths are left out of the wording, so that the same reason in many layers counts as one.
    """
    prunable = [member for family in graph.prunable_families for member in family.members if member.role != "buffer"]
    covered = {id(find_tensor(graph.model, member.param)) for member in prunable}
    total = sum(p.numel() for p in graph.model.parameters())
    weights: Counter[str] = Counter()
    counted: set[tuple[int, str]] = set()
    named = {name for name, _ in graph.model.named_modules()}
    for family in graph.families:
        for member in family.members:
            if member.role == "buffer":
                continue
            tensor = find_tensor(graph.model, member.param)
            reason = " ".join("..." if word.strip("'\",;:()") in named else word for word in family.reason.split())
            if family.prunable or id(tensor) in covered or not isinstance(tensor, nn.Parameter) or (id(tensor), reason) in counted:
                continue
            counted.add((id(tensor), reason))
            weights[reason] += tensor.numel()
    return [[reason, round(weight / total, 4)] for reason, weight in weights.most_common(most)]


def compacted(model: nn.Module, graph: DependencyGraph, selection: Selection) -> tuple[CompactModel, Figures]:
    """The compact model, with what `compact` itself measured on the example inputs."""
    small = geta.compact(model, graph, selection)
    figures: Figures = {
        "removed": sum(int(remove.sum()) for remove in selection.values()),
        "parameters": sum(p.numel() for p in small.parameters()),
        "nodes": len(small.programs["eval"].graph.nodes),
        "own_difference": small.info.max_difference,
        "train_graph": "train" in small.programs,
    }
    if not figures["train_graph"]:
        figures["note"] = next((note for note in small.info.notes if note.startswith("no training graph")), "no training graph")
    return small, figures


def compare(model: nn.Module, graph: DependencyGraph, selection: Selection, small: CompactModel, *, train: bool) -> Figures:
    """Zeroed model against compact model on inputs that neither has seen, in one mode; `effect` = what zeroing changes at all."""
    example = graph.example
    inputs = fresh_inputs(example.args, dict(example.kwargs), _FRESH_SEED)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    before = outputs(copy.deepcopy(model).train(train), inputs)
    zeroed = copy.deepcopy(model).train(train)
    graph.zero_(zeroed, selection)
    expected = outputs(zeroed, inputs)
    # training mode updates running statistics: the model under test must stay as it was for the checks that follow
    del zeroed
    found = outputs(copy.deepcopy(small).train() if train else small.eval(), inputs)
    if not all(bool(t.isfinite().all()) for t in expected if t.is_floating_point()):
        raise WrongError("the zeroed model's own output is not finite: nothing was compared")
    difference = max_difference(expected, found)[1] if len(expected) == len(found) else float("inf")
    figures = {"difference": difference, "effect": max_difference(before, expected)[1]}
    if not difference <= TOLERANCE.get(dtype, 1e-4):
        if dtype == torch.float32:
            figures["rounding"] = _rounding(model, graph, selection, inputs, expected, train=train)
        raise WrongError(f"compact differs from zeroed by {difference:.3g} of the largest output", **figures)
    return figures


def _rounding(model: nn.Module, graph: DependencyGraph, selection: Selection, inputs: Inputs, found: list[Tensor], *, train: bool) -> float:
    """How far the zeroed model's own float32 output `found` is from what it is in float64, relative to the largest output.

    0 where it has no float64 output: a compact model that casts to float32 inside can't be run in another type.
    """
    zeroed = copy.deepcopy(model).train(train)
    graph.zero_(zeroed, selection)
    wide = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    try:
        return max_difference(outputs(zeroed.double(), wide), found)[1]
    except RuntimeError:
        return 0.0


def gradients(model: nn.Module, graph: DependencyGraph, small: CompactModel) -> Figures:
    """Backward through the compact model in training mode: finite everywhere, and it reaches what it reached before."""
    example = graph.example
    inputs = (example.args, dict(example.kwargs))
    original = _reached(copy.deepcopy(model).train(), inputs)
    copied = copy.deepcopy(small).train()
    reached = _reached(copied, inputs)
    expected = [name for name in original if name in dict(copied.net.named_parameters())]
    missing = [name for name in expected if f"net.{name}" not in reached]
    bad = [name for name, finite in reached.items() if not finite]
    share = 1 - len(missing) / max(1, len(expected))
    figures = {"reached": len(reached), "share": share}
    if bad and all(original.values()):
        raise WrongError(f"gradient of '{bad[0]}' is not finite", **figures)
    if share < _REACHED or not reached:
        raise WrongError(f"{len(missing)} parameters lost their gradient, e.g. '{(missing or ['all'])[0]}'", **figures)
    return figures


def _reached(model: nn.Module, inputs: Inputs) -> dict[str, bool]:
    """{parameter that got a gradient: whether it is finite} for a fixed random weighting of all outputs."""
    found = [leaf for leaf in outputs(model, inputs, grad=True) if leaf.requires_grad]
    if not found:
        raise WrongError("no output needs a gradient")
    generator = torch.Generator().manual_seed(3)
    total = sum((leaf.abs() if leaf.is_complex() else leaf).mul(torch.randn(leaf.shape, generator=generator)).sum() for leaf in found)
    assert isinstance(total, Tensor)
    total.backward()
    return {name: bool(p.grad.isfinite().all()) for name, p in model.named_parameters() if p.grad is not None}


def exported(graph: DependencyGraph, small: CompactModel) -> Figures:
    """The compact model can be captured again by torch itself, and the capture computes the same."""
    inputs = (graph.example.args, dict(graph.example.kwargs))
    try:
        program = torch.export.export(small.eval(), *inputs, strict=False)
    except Exception as error:
        if not _followed(graph):
            raise
        return {"note": f"torch.export refuses the model itself as well ({type(error).__name__})"}
    difference = max_difference(outputs(small, inputs), outputs(program.module(), inputs))[1]
    if not difference <= TOLERANCE[torch.float32]:
        raise WrongError(f"the exported compact model differs by {difference:.3g}", difference=difference)
    return {"difference": difference}


def quantized(model: nn.Module, graph: DependencyGraph) -> Figures:
    """The families are those of the float model when weights and activations have quantizers."""
    args, kwargs = graph.example.args, dict(graph.example.kwargs)
    found = same_families(model, args, kwargs, plain=graph)
    if found:  # a model may keep tensors that its first call made, and calibration has called the quantized one
        called = copy.deepcopy(model)
        outputs(called, (args, kwargs))
        found = same_families(called, args, kwargs)
    if found:
        raise WrongError(f"quantized, {len(found)} differences: {found[0]}", differences=found[:10])
    return {}


def pruned_again(graph: DependencyGraph, small: CompactModel) -> Figures:
    """A second prune of the compact model is as exact as the first."""
    again = geta.analyze(small.eval(), graph.example.args, graph.example.kwargs)
    if again.num_groups == 0 and graph.num_groups > 2 * len(graph.prunable_families):
        raise WrongError("the compact model has no prunable group left", groups=0)
    selection = again.random_selection(0.5, seed=2)
    smaller = geta.compact(small, again, selection)
    return {"groups": again.num_groups, **compare(small, again, selection, smaller, train=False)}
