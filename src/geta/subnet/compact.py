"""Build the compact model: capture, cut, integers, verify. The user's model is handed back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from geta.cost import Cost, cost_of_graph
from geta.errors import BadModelError, ConfigError
from geta.graph.capture import capture, mode_of
from geta.graph.dependency import Analysis, DependencyGraph, analyse_capture
from geta.graph.families import Selection
from geta.graph.names import canonical_name, find_tensor
from geta.quant.quantizer import Quantizer
from geta.subnet.comparison import max_difference, needs_float64, outputs
from geta.subnet.integers import Quantized, drop_unused, store_integers
from geta.subnet.model import CompactInfo, CompactModel
from geta.subnet.program import Program, from_capture
from geta.subnet.rewrite import Kept, KeptIndices, rewrite

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference between zeroed and compact model above which `compact` refuses: far above rounding, far below a wrong cut."""
CAPTURE_TOLERANCE = 1e-2
"""The same between a quantized or half-precision model and its captured graph, where one flipped rounding step may show."""


@dataclass(frozen=True)
class _Cut:
    """One capture after the cut: the program, the tensors it reads (sliced), what is quantized in it, the model's own tensors read."""

    program: Program
    tensors: dict[str, torch.Tensor]
    read: list[str]
    quantized: Quantized
    out_spec: pytree.TreeSpec


def compact(
    model: nn.Module,
    graph: DependencyGraph,
    selection: Selection | None = None,
    *,
    integers: bool = True,
    verify: bool = True,
) -> CompactModel:
    """Return the smaller network that computes exactly what `model` computes with the selected groups zeroed.

    selection: {family: BoolTensor, True = remove}; None = the groups that are zero in `model` (after training with QASSO).
    integers:  store quantized weights as integer codes and a scale, bitwise the values that the fake quantizer computes;
               False keeps the float weights behind their quantizers, for training on.
    verify:    compare with the zeroed model on the example inputs of `analyze`; a difference beyond rounding raises.
    `model` is not changed. The result has a training graph too, if the model can be captured in training mode.
    Raises ConfigError for a selection that doesn't fit, BadModelError if the model changed since it was analysed.
    """
    if model is not graph.model and type(model) is not type(graph.model):
        raise ConfigError(f"the graph was made from a {type(graph.model).__name__}, the model is a {type(model).__name__}")
    if selection is None:
        selection = _never_empty(graph.zero_groups(model))
    graph.check_selection(selection)
    notes = list(graph.notes)
    with _zeroed(model, graph, selection):
        evaluated = _analysed(model, graph, train=False)
        whole = _cut(model, evaluated, graph, {}, integers=integers)
        small = _cut(model, evaluated, graph, selection, integers=integers)
        programs, tensors = {"eval": small.program}, dict(small.tensors)
        try:
            trained = _cut(model, _analysed(model, graph, train=True), graph, selection, integers=integers)
        except BadModelError as error:
            notes.append(f"no training graph: {error}")
        else:
            programs["train"] = trained.program
            tensors.update({name: tensor for name, tensor in trained.tensors.items() if name not in tensors})
        info = _info(graph, selection, small.quantized, _dense_cost(model, whole, _example_leaves(graph, evaluated)), notes)
        uncut = CompactModel({"eval": whole.program}, whole.tensors, info, out_spec=whole.out_spec) if verify else None
        result = CompactModel(programs, tensors, info, out_spec=small.out_spec, uncut=uncut)
        if uncut is not None:
            result.info = _verified(model, graph, result, uncut)
    result.train(model.training and "train" in programs)
    return result


def _never_empty(selection: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A family that is zero altogether keeps its first group: a layer without channels is not a layer."""
    for remove in selection.values():
        if bool(remove.all()):
            remove[0] = False
    return selection


@contextlib.contextmanager
def _zeroed(model: nn.Module, graph: DependencyGraph, selection: Selection) -> Iterator[None]:
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


def _analysed(model: nn.Module, graph: DependencyGraph, *, train: bool) -> Analysis:
    example = graph.example
    captured = capture(model, example.args, example.kwargs, dynamic_shapes=example.dynamic_shapes, train=train)
    return analyse_capture(model, captured, exact=example.exact)


def _cut(model: nn.Module, analysis: Analysis, graph: DependencyGraph, selection: Selection, *, integers: bool) -> _Cut:
    tied = {node.name: analysis.propagation.values[node] for node in analysis.capture.graph.find_nodes(op="placeholder")}
    kept = KeptIndices(analysis, _removed_roots(analysis, graph, selection))
    canonical = _tensor_names(model, analysis)
    program, mapping = from_capture(analysis.capture, canonical)
    rewrite(analysis, mapping, kept)
    _record_examples(program.graph, _example_leaves(graph, analysis))
    cut = {name: kept.of_value(tied[placeholder]) for placeholder, name in canonical.items()}

    def read(name: str) -> torch.Tensor:
        return analysis.capture.constants[name] if name in analysis.capture.constants else find_tensor(model, name)

    tensors = {name: _sliced(read(name), stays) for name, stays in cut.items()}
    quantized = Quantized()
    if integers:
        quantized, stored = store_integers(program.graph, lambda name: read(name).detach(), _quantizer_names(model))
        for item in stored:
            tensors[item.codes_name] = _sliced(item.codes, cut[item.weight])
            tensors[item.scale_name] = _sliced(read(item.step).detach(), cut[item.step])
    drop_unused(program.graph)
    used = set(program.tensor_names())
    mine = [name for name in cut if name not in analysis.capture.constants]
    return _Cut(program, {name: t for name, t in tensors.items() if name in used}, mine, quantized, analysis.capture.out_spec)


def _removed_roots(analysis: Analysis, graph: DependencyGraph, selection: Selection) -> np.ndarray:
    """Classes of this capture that hold the removed indices; they must not hold anything else."""
    starts = {(owner.tensor, owner.dim): owner for owner in analysis.propagation.space.owners if owner.tensor}
    root = analysis.partition.root
    chosen = np.zeros(len(root), dtype=bool)
    for family in graph.families:
        remove = selection.get(family.name)
        if remove is None or not bool(remove.any()):
            continue
        for member in family.members:
            owner = starts.get((member.param, member.dim))
            if owner is None:
                continue  # this capture doesn't read it (running statistics in training mode, say)
            chosen[owner.start + member.index[remove].reshape(-1).numpy()] = True
    roots = np.unique(root[chosen])
    for owner in starts.values():
        labels = np.arange(owner.start, owner.start + owner.size)
        if (np.isin(root[labels], roots) & ~chosen[labels]).any():
            raise BadModelError(
                f"'{owner.tensor}' is coupled differently than when the graph was made; analyze the model again and select again"
            )
    frozen = [analysis.partition.frozen[int(one)] for one in roots if int(one) in analysis.partition.frozen]
    if frozen:
        raise BadModelError(f"a selected group can't be removed from the model as it is now: it {frozen[0]}; analyze it again")
    return roots


def _tensor_names(model: nn.Module, analysis: Analysis) -> dict[str, str]:
    """Placeholder -> tensor name; tied tensors share the first of their names."""
    first: dict[int, str] = {}
    names = {}
    for placeholder, name in analysis.capture.tensor_names.items():
        constant = analysis.capture.constants.get(name)
        names[placeholder] = first.setdefault(id(find_tensor(model, name) if constant is None else constant), name)
    return names


def _quantizer_names(model: nn.Module) -> dict[str, str]:
    return {canonical_name(f"{path}.d"): module.name for path, module in model.named_modules() if isinstance(module, Quantizer)}


def _sliced(tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    """A copy that keeps only these indices; parameters stay parameters."""
    data = tensor.detach()
    for dim, indices in kept.items():
        data = data.index_select(dim, indices.to(data.device))
    data = data.clone(memory_format=torch.contiguous_format)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _example_leaves(graph: DependencyGraph, analysis: Analysis) -> list[Any]:
    """The example inputs in the order of the program's inputs."""
    _, order = analysis.capture.in_spec.children()
    ordered = {name: graph.example.kwargs[name] for name in order.context}
    return pytree.tree_leaves((graph.example.args, ordered))


def _record_examples(graph: fx.Graph, leaves: list[Any]) -> None:
    """Shapes of the example inputs, for costs and messages."""
    for node, leaf in zip(graph.find_nodes(op="placeholder"), leaves, strict=True):
        if isinstance(leaf, torch.Tensor):
            node.meta["example"] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
        else:
            node.meta["val"] = leaf


def _dense_cost(model: nn.Module, whole: _Cut, leaves: list[Any]) -> Cost:
    """The uncut model as a float network: 32 bits on both sides of every product, tensors in their own dtype."""
    counted = cost_of_graph(whole.program.graph, whole.tensors, leaves)
    steps = {f"{name.removesuffix('.d')}." for name in _quantizer_names(model)}
    own = [find_tensor(model, name) for name in whole.read if not any(name.startswith(prefix) for prefix in steps)]
    rows = tuple(replace(row, bops=row.macs * 1024.0, weight_bits=32.0, activation_bits=32.0) for row in counted.per_op)
    size = sum(tensor.numel() * tensor.element_size() for tensor in own)
    return replace(counted, bops=counted.macs * 1024.0, weight_bytes=size, per_op=rows)


def _info(graph: DependencyGraph, selection: Selection, quantized: Quantized, dense: Cost, notes: list[str]) -> CompactInfo:
    kept = {name: (~remove).nonzero().reshape(-1).tolist() for name, remove in selection.items()}
    return CompactInfo(
        bits=quantized.bits,
        signed=quantized.signed,
        kept=kept,
        family_sizes={family.name: family.size for family in graph.families if family.name in kept},
        dense_cost=dense.to_json(),
        notes=notes,
    )


def _verified(model: nn.Module, graph: DependencyGraph, small: CompactModel, uncut: CompactModel) -> CompactInfo:
    """Compare the cut program with the uncut one, and the uncut one with the user's own model (zeroed at this time)."""
    info = small.info
    args, kwargs = graph.example.args, dict(graph.example.kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if any(tensor.is_meta for tensor in (*tensors, *uncut.tensors().values())):
        return replace(info, notes=[*info.notes, "not verified: the model or its inputs have no values (meta device)"])
    wide = needs_float64(small)
    dtype = torch.float64 if wide else torch.float32
    with torch.no_grad(), mode_of(model, False):
        own = pytree.tree_leaves(model(*args, **kwargs))
    _, captured_gap = max_difference(own, outputs(uncut, args, kwargs, double=False))
    _, gap = max_difference(*[outputs(one, args, kwargs, double=wide) for one in (uncut, small)])
    for difference, limit, what in (
        (gap, TOLERANCE[dtype], "compact"),
        (captured_gap, CAPTURE_TOLERANCE if wide else TOLERANCE[torch.float32], "captured"),
    ):
        if not difference <= limit:
            raise BadModelError(
                f"the {what} model differs from the zeroed one by {difference:.3g} of the largest output; nothing was changed. "
                "If the model's forward is random or depends on tensor values in Python, that is why; else please report it"
            )
    return replace(info, max_difference=gap, precision=str(dtype).removeprefix("torch."))
