"""What removing a selection means for a model's tensors, before anybody decides how the smaller network is written down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from geta.errors import BadModelError, ConfigError
from geta.graph.dependency import Analysis, DependencyGraph
from geta.graph.families import Selection, layer_sets
from geta.graph.names import find_tensor, unwrap
from geta.graph.propagate import UNUSED
from geta.subnet.rewrite import Kept, KeptIndices

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference between zeroed and compact model above which `compact` refuses: far above rounding, far below a wrong cut."""
CAPTURE_TOLERANCE = 2e-2
"""The same between a quantized or half-precision model and its captured graph, where one flipped rounding step may show."""


def checked_selection(model: nn.Module, graph: DependencyGraph, selection: Selection | None) -> Selection:
    """The selection, or the groups that are zero in the model; ConfigError if it doesn't fit or the graph is another model's."""
    model = unwrap(model)
    if model is not graph.model and type(model) is not type(graph.model):
        raise ConfigError(f"the graph was made from a {type(graph.model).__name__}, the model is a {type(model).__name__}")
    if selection is None:
        selection = never_empty(graph, graph.zero_groups(model))
    graph.check_selection(selection)
    return selection


def never_empty(graph: DependencyGraph, selection: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A family that is zero altogether keeps its first group: a layer without channels is not a layer.

    A set of whole residual branches (`layer_sets`) that is zero keeps its first branch: so many models start.
    """
    layers = {family.name for family in graph.families if family.is_layer}
    for name, remove in selection.items():
        if bool(remove.all()) and name not in layers:
            remove[0] = False
    for branches in layer_sets(graph.families):
        if all(bool(selection[family.name].all()) for family in branches if family.name in selection):
            selection[branches[0].name][0] = False
    return selection


@contextlib.contextmanager
def zeroed(model: nn.Module, graph: DependencyGraph, selection: Selection) -> Iterator[None]:
    """Zero the selected groups for the time of the block, and give the user's values back."""
    names = {m.param for family in graph.families if family.name in selection for m in family.zeroed}
    before = [(find_tensor(model, name), find_tensor(model, name).detach().clone()) for name in sorted(names)]
    try:
        graph.zero_(model, selection)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)


def removed_roots(analysis: Analysis, graph: DependencyGraph, selection: Selection) -> np.ndarray:
    """Classes of this capture that hold the removed indices; they must not hold anything else."""
    starts = {(owner.tensor, owner.dim): owner for owner in analysis.propagation.space.owners if owner.tensor}
    root = analysis.partition.root
    chosen = np.zeros(len(root), dtype=bool)
    for family in graph.families:
        remove = selection.get(family.name)
        if remove is None or not bool(remove.any()) or family.is_layer:
            continue
        for member in family.members:
            owner = starts.get((member.param, member.dim))
            if owner is None:
                continue  # this capture doesn't read it (running statistics in training mode, say)
            chosen[owner.start + member.index[remove].reshape(-1).numpy()] = True
    roots = np.unique(root[chosen])
    gone = np.zeros(len(root), dtype=bool)  # a table: asking which of many labels are among many roots, by sorting, takes seconds
    gone[roots] = True
    analysed_then = {member.param for family in graph.families if family.reason != UNUSED for member in family.members}
    for owner in starts.values():
        if owner.tensor in analysis.capture.constants:
            continue  # its name means something in this capture alone; it follows
        if owner.tensor not in analysed_then:
            continue  # attached since (step sizes per channel), or only training reads it (an auxiliary head): it follows
        labels = slice(owner.start, owner.start + owner.size)
        if (gone[root[labels]] & ~chosen[labels]).any():
            raise BadModelError(
                f"'{owner.tensor}' is coupled differently than when the graph was made; analyze the model again and select again"
            )
    frozen = [analysis.partition.frozen[int(one)] for one in roots if int(one) in analysis.partition.frozen]
    if frozen:
        raise BadModelError(f"a selected group can't be removed from the model as it is now: it {frozen[0]}; analyze it again")
    return roots


def kept_by_name(model: nn.Module, analysis: Analysis, graph: DependencyGraph, selection: Selection) -> dict[str, Kept]:
    """Tensor name -> what it keeps, for every parameter, buffer and constant that shrinks."""
    kept = KeptIndices(analysis, removed_roots(analysis, graph, selection))
    names = tensor_names(model, analysis)
    values = analysis.propagation.values
    found = {
        names[node.name]: kept.of_value(values[node]) for node in analysis.capture.graph.find_nodes(op="placeholder") if node.name in names
    }
    return {name: cut for name, cut in found.items() if cut}


def tensor_names(model: nn.Module, analysis: Analysis) -> dict[str, str]:
    """Placeholder -> tensor name; tied tensors share the first of their names."""
    first: dict[int, str] = {}
    names = {}
    for placeholder, name in analysis.capture.tensor_names.items():
        constant = analysis.capture.constants.get(name)
        names[placeholder] = first.setdefault(id(find_tensor(model, name) if constant is None else constant), name)
    return names


def sliced(tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    """A copy that keeps only these indices; parameters stay parameters."""
    data = tensor.detach()
    for dim, indices in kept.items():
        data = data.index_select(dim, indices.to(data.device))
    data = data.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
