"""Build the compact model: capture, cut, integers, verify. The user's model is handed back as it was."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from geta.cost import Cost, cost_of_graph
from geta.errors import BadModelError, ConfigError
from geta.graph.dependency import Analysis, DependencyGraph, analysed
from geta.graph.families import Selection
from geta.graph.names import canonical_name, find_tensor, unwrap
from geta.graph.preserve import mode_of, without_caches
from geta.optim.shards import is_sharded
from geta.quant.fixed import FixedQuantizer
from geta.quant.quantizer import Quantizer
from geta.subnet.blocks import cut_blocks
from geta.subnet.branches import drop_branches, selected_branches
from geta.subnet.comparison import max_difference, needs_float64, outputs
from geta.subnet.eager import compact_eager
from geta.subnet.integers import Quantized, drop_unused, store_integers
from geta.subnet.model import CompactInfo, CompactModel
from geta.subnet.program import Program, from_capture
from geta.subnet.removal import CAPTURE_TOLERANCE, TOLERANCE, checked_selection, removed_roots, sliced, tensor_names, zeroed
from geta.subnet.rewrite import KeptIndices, rewrite

Product = Literal["graph", "eager", "auto"]


@dataclass(frozen=True)
class _Cut:
    """One capture after the cut: the program, the tensors it reads (sliced), what is quantized in it, the model's own tensors read."""

    program: Program
    tensors: dict[str, torch.Tensor]
    read: list[str]
    quantized: Quantized
    out_spec: pytree.TreeSpec


@overload
def compact(
    model: nn.Module,
    graph: DependencyGraph,
    selection: Selection | None = None,
    *,
    integers: bool = True,
    verify: bool = True,
    product: Literal["graph"] = "graph",
) -> CompactModel: ...


@overload
def compact(
    model: nn.Module,
    graph: DependencyGraph,
    selection: Selection | None = None,
    *,
    integers: bool = True,
    verify: bool = True,
    product: Literal["eager", "auto"],
) -> nn.Module: ...


def compact(
    model: nn.Module,
    graph: DependencyGraph,
    selection: Selection | None = None,
    *,
    integers: bool = True,
    verify: bool = True,
    product: Product = "graph",
) -> nn.Module:
    """Return the smaller network that computes exactly what `model` computes with the selected groups zeroed.

    selection: {family: BoolTensor, True = remove}; None = the groups that are zero in `model` (after training with QASSO).
    integers:  store quantized weights as integer codes and a scale, bitwise the values that the fake quantizer computes;
               False keeps the float weights behind their quantizers, for training on. (The eager product always keeps them.)
    verify:    compare with the zeroed model on the example inputs of `analyze`; a difference beyond rounding raises.
    product:   "graph" = a CompactModel, which exists for every model; it has a training graph too, if the model can be captured in
               training mode. "eager" = a smaller instance of the model's own class, see `compact_eager`, or a BadModelError that
               says why there is none. "auto" = the eager product, else the graph product with that reason among its `info.notes`.
    `model` is not changed.
    Raises ConfigError for a selection that doesn't fit, BadModelError if the model changed since it was analysed.
    """
    model = unwrap(model)
    _refuse_sharded(model)
    selection = checked_selection(model, graph, selection)
    if product not in ("graph", "eager", "auto"):
        raise ConfigError(f"product is {product!r}; it must be 'graph', 'eager' or 'auto'")
    if product == "graph":
        return _graph_product(model, graph, selection, integers=integers, verify=verify)
    if not verify:
        raise ConfigError(f"product='{product}' needs verify=True: only the comparison tells whether there is an eager product")
    try:
        eager = compact_eager(model, graph, selection)
    except BadModelError as error:
        if product == "eager":
            raise
        small = _graph_product(model, graph, selection, integers=integers, verify=verify)
        small.info = replace(small.info, notes=[*small.info.notes, str(error)])
        return small
    for note in eager.notes:
        warnings.warn(note, stacklevel=2)
    return eager.model


def _refuse_sharded(model: nn.Module) -> None:
    sharded = [canonical_name(name) for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if sharded:
        raise ConfigError(
            f"{len(sharded)} parameters are spread over several ranks (first: '{sharded[0]}'), but a compact model is cut from whole ones: "
            "load the full state dict into an unsharded copy of the model and compact that, as docs/distributed.md shows"
        )


def _graph_product(model: nn.Module, graph: DependencyGraph, selection: Selection, *, integers: bool, verify: bool) -> CompactModel:
    notes = list(graph.notes)
    with zeroed(model, graph, selection):
        evaluated = analysed(model, graph, train=False)
        whole = _cut(model, evaluated, graph, {}, integers=integers)
        small = _cut(model, evaluated, graph, selection, integers=integers)
        programs, tensors, specs = {"eval": small.program}, dict(small.tensors), {"eval": small.out_spec}
        try:
            training = analysed(model, graph, train=True)
            trained = _cut(model, training, graph, selection, integers=integers)
        except BadModelError as error:
            notes.append(f"no training graph: {error}")
        else:
            programs["train"], specs["train"] = trained.program, trained.out_spec
            notes += [note for note in training.capture.notes if note not in notes]
            tensors.update({name: tensor for name, tensor in trained.tensors.items() if name not in tensors})
        info = _info(graph, selection, small.quantized, _dense_cost(model, whole, _example_leaves(graph, evaluated)), notes)
        uncut = CompactModel({"eval": whole.program}, whole.tensors, info, out_specs={"eval": whole.out_spec}) if verify else None
        result = CompactModel(programs, tensors, info, out_specs=specs, uncut=uncut)
        if uncut is not None:
            result.info = _verified(model, graph, result, uncut)
    result.train(model.training and "train" in programs)
    return result


def _cut(model: nn.Module, analysis: Analysis, graph: DependencyGraph, selection: Selection, *, integers: bool) -> _Cut:
    tied = {node.name: analysis.propagation.values[node] for node in analysis.capture.graph.find_nodes(op="placeholder")}
    kept = KeptIndices(analysis, removed_roots(analysis, graph, selection))
    canonical = tensor_names(model, analysis)
    program, mapping = from_capture(analysis.capture, canonical)
    rewrite(analysis, mapping, kept)
    drop_branches(analysis, mapping, selected_branches(analysis, graph, selection))
    _record_examples(program.graph, _example_leaves(graph, analysis))
    cut = {name: kept.of_value(tied[placeholder]) for placeholder, name in canonical.items()}

    def read(name: str) -> torch.Tensor:
        return analysis.capture.constants[name] if name in analysis.capture.constants else find_tensor(model, name)

    tensors = {name: sliced(read(name), stays) for name, stays in cut.items()}
    quantized, made = Quantized(), dict[str, torch.Tensor]()
    if integers:
        quantized, stored = store_integers(program.graph, lambda name: read(name).detach(), _quantizer_names(model))
        for item in stored:
            made |= {item.codes_name: item.codes, item.scale_name: item.scale}
            cut |= {item.codes_name: cut[item.weight], item.scale_name: cut[item.step]}
        tensors |= {name: sliced(tensor, cut[name]) for name, tensor in made.items()}
    cut_blocks(program.graph, tensors, lambda name: made[name] if name in made else read(name), cut)
    drop_unused(program.graph)
    used = set(program.tensor_names())
    mine = [name for name in canonical.values() if name not in analysis.capture.constants]
    return _Cut(program, {name: t for name, t in tensors.items() if name in used}, mine, quantized, analysis.capture.out_spec)


def _quantizer_names(model: nn.Module) -> dict[str, str]:
    """The tensor that holds a quantizer's step size or scale -> the quantizer's name."""
    learned = {canonical_name(f"{path}.d"): module.name for path, module in model.named_modules() if isinstance(module, Quantizer)}
    fixed = {canonical_name(f"{path}.scale"): module.name for path, module in model.named_modules() if isinstance(module, FixedQuantizer)}
    return {**learned, **fixed}


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
    steps = {f"{name.rpartition('.')[0]}." for name in _quantizer_names(model)}
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
    with torch.no_grad(), mode_of(model, False), without_caches(model):
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
