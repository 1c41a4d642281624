"""Cut groups out of a captured graph: which indices every tensor keeps, and the constants that must follow.

Data flow needs no change; what has to change are the sizes, bounds and counts that the capture wrote down as numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx

from geta.errors import BadModelError
from geta.graph.dependency import Analysis
from geta.graph.labels import Value, compress, squeezed, varying
from geta.graph.propagate import bind_arguments
from geta.graph.rules.registry import operator_name
from geta.graph.solver import canonical

Kept = dict[int, torch.Tensor]
"""dim -> indices that stay (int64, ascending); dimensions that keep everything are absent."""

_REWRITERS: dict[str, Callable[[Edit], None]] = {}
_aten = torch.ops.aten


def rewrites(*names: str) -> Callable[[Callable[[Edit], None]], Callable[[Edit], None]]:
    """Register how an operator's constants follow a removal: `@rewrites("view")` for `aten::view`, `@rewrites("mylib::op")` for others."""

    def register(function: Callable[[Edit], None]) -> Callable[[Edit], None]:
        for name in names:
            _REWRITERS[name if "::" in name else f"aten::{name}"] = function
        return function

    return register


class KeptIndices:
    """Which indices of every tensor of a graph stay when some classes of labels go."""

    def __init__(self, analysis: Analysis, removed_roots: np.ndarray) -> None:
        self._analysis = analysis
        self._removed = np.zeros(len(analysis.partition.root), dtype=bool)
        self._removed[removed_roots] = True

    def of(self, node: fx.Node) -> Kept:
        value = self._analysis.propagation.values.get(node)
        return self.of_value(value) if isinstance(value, Value) else {}

    def of_value(self, value: Value) -> Kept:
        stays: dict[int, np.ndarray] = {}
        for track in value.tracks:
            code = canonical(self._analysis.partition.root, track.labels)
            gone = compress(torch.from_numpy(self._removed[squeezed(code).numpy()]).expand(code.shape))
            dims = varying(gone)
            if not varying(code) or not bool(squeezed(gone).any()):
                continue  # a track that varies nowhere belongs to an axis that was bound, so it says nothing
            if len(dims) != 1:
                raise BadModelError("removal would leave a ragged or an empty tensor; please report this model")
            line = ~squeezed(gone).reshape(-1).numpy()
            stays[dims[0]] = stays.get(dims[0], np.ones_like(line)) & line
        return {dim: torch.from_numpy(np.flatnonzero(line)) for dim, line in stays.items()}


class Edit:
    """One operator of the new graph whose neighbourhood shrinks."""

    def __init__(self, node: fx.Node, new: fx.Node, kept: KeptIndices, values: Mapping[fx.Node, Any]) -> None:
        self.node, self.new, self._kept, self._values = node, new, kept, values

    def kept(self, node: fx.Node | None = None) -> Kept:
        return self._kept.of(node or self.node)

    def kept_of_outputs(self) -> list[Kept]:
        return [self._kept.of_value(value) for value in self._values[self.node]]

    def argument(self, name: str) -> Any:
        """An argument as it stands in the captured graph (a node, a number ...)."""
        return bind_arguments(self.node, lambda arg: arg)[name]

    def shape(self, node: fx.Node | None = None) -> tuple[int, ...]:
        value = self._values[node or self.node]
        assert isinstance(value, Value)
        return value.shape

    def new_size(self, dim: int, node: fx.Node | None = None) -> int:
        kept = self.kept(node)
        return len(kept[dim]) if dim in kept else self.shape(node)[dim]

    def set(self, name: str, value: Any) -> None:
        """Replace an argument of the new node, wherever it stands."""
        assert isinstance(self.new.target, torch._ops.OpOverload)
        for place, argument in enumerate(self.new.target._schema.arguments):
            if argument.name == name:
                if place < len(self.new.args) and not argument.kwarg_only:
                    self.new.update_arg(place, value)
                elif place == len(self.new.args) and not argument.kwarg_only:
                    self.new.args = (*self.new.args, value)
                else:
                    self.new.update_kwarg(name, value)
                return
        raise AssertionError(f"{self.new.target} has no argument {name}")

    def scaled(self, size: Any, dim: int) -> Any:
        """A size of the result after removal; symbolic sizes are scaled in the graph."""
        kept = self.kept()
        if dim not in kept or (isinstance(size, int) and size == -1):
            return size
        if isinstance(size, int):
            return len(kept[dim])
        graph = self.new.graph
        with graph.inserting_before(self.new):
            product = graph.call_function(operator.mul, (size, len(kept[dim])))
            return graph.call_function(operator.floordiv, (product, self.shape()[dim]))

    def sizes(self, name: str, first_dim: int = 0) -> None:
        """Rewrite an argument that lists sizes of the result."""
        schema_place = [a.name for a in self.new.target._schema.arguments].index(name)  # type: ignore[union-attr]
        given = self.new.args[schema_place] if schema_place < len(self.new.args) else self.new.kwargs[name]
        assert isinstance(given, (list, tuple))
        self.set(name, [self.scaled(size, first_dim + place) for place, size in enumerate(given)])


def rewrite(analysis: Analysis, mapping: Mapping[fx.Node, fx.Node], kept: KeptIndices) -> None:
    """Make the new graph (see program.from_capture) fit tensors that keep only `kept`."""
    values = analysis.propagation.values
    for node, new in mapping.items():
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        _resize_example(new, kept.of(node))
        name = operator_name(node.target)
        rewriter = _REWRITERS.get(name) or _REWRITERS.get(name.removesuffix("_"))
        if rewriter is None:
            continue
        touched = any(kept.of(source) for source in node.all_input_nodes) or kept.of(node)
        if touched:
            rewriter(Edit(node, new, kept, values))


def _resize_example(new: fx.Node, kept: Kept) -> None:
    """Sizes that a run of the uncut graph told follow the cut."""
    example = new.meta.get("example")
    if kept and example is not None and "shape" in example:
        shape = [len(kept[dim]) if dim in kept else size for dim, size in enumerate(example["shape"])]
        new.meta["example"] = {**example, "shape": shape}


@rewrites(
    "view",
    "reshape",
    "_unsafe_view",
    "_reshape_alias",
    "expand",
    "broadcast_to",
    "zeros",
    "ones",
    "full",
    "new_zeros",
    "new_ones",
    "new_full",
)
def _sizes(edit: Edit) -> None:
    names = [argument.name for argument in edit.node.target._schema.arguments]  # type: ignore[union-attr]
    edit.sizes("size" if "size" in names else "shape")
    if operator_name(edit.node.target) == "aten::_reshape_alias":  # its strides were those of the whole tensor
        edit.new.target = _aten.reshape.default
        edit.new.args = edit.new.args[:2]


@rewrites("repeat_interleave")
def _repeat_interleave(edit: Edit) -> None:
    size, dim = edit.argument("output_size"), edit.argument("dim")
    if size is not None and dim is not None:
        edit.set("output_size", edit.scaled(size, dim % len(edit.shape())))


@rewrites("unflatten")
def _unflatten(edit: Edit) -> None:
    source = edit.argument("self")
    edit.sizes("sizes", edit.argument("dim") % len(edit.shape(source)))


@rewrites("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk")
def _split(edit: Edit) -> None:
    """Pieces need not stay equal, so all become split_with_sizes."""
    source = edit.argument("self")
    dim = edit.argument("dim") % len(edit.shape(source))
    if dim not in edit.kept(source):
        return
    outputs = edit._values[edit.node]
    sizes = [len(kept[dim]) if dim in kept else value.shape[dim] for kept, value in zip(edit.kept_of_outputs(), outputs, strict=True)]
    edit.new.target = _aten.split_with_sizes.default
    edit.new.args = (edit.new.args[0], sizes, dim)
    edit.new.kwargs = {}


def _rank(kept: torch.Tensor, bound: int, size: int) -> int:
    """How many kept indices lie before `bound` (negative counts from the end)."""
    bound = max(0, bound + size) if bound < 0 else min(bound, size)
    return int((kept < bound).sum())


@rewrites("slice", "narrow", "select")
def _slice(edit: Edit) -> None:
    source = edit.argument("self")
    size = edit.shape(source)
    dim = edit.argument("dim") % len(size)
    kept = edit.kept(source).get(dim)
    if kept is None:
        return
    if edit.node.target == _aten.select.int:
        edit.set("index", _rank(kept, edit.argument("index"), size[dim]))
        return
    if bind_arguments(edit.node, lambda arg: arg).get("step", 1) != 1:
        edit.set("end", len(kept))  # whole runs of `step` entries have gone, so it starts where it did
        return
    start = edit.argument("start") or 0
    end = start + edit.argument("length") if operator_name(edit.node.target) == "aten::narrow" else edit.argument("end")
    first, last = _rank(kept, start, size[dim]), len(kept) if end is None else _rank(kept, end, size[dim])
    edit.set("start", first)
    if operator_name(edit.node.target) == "aten::narrow":
        edit.set("length", last - first)
    else:
        edit.set("end", last)


@rewrites("roll")
def _roll(edit: Edit) -> None:
    """What wraps around is the kept part of the last `shift` entries."""
    source = edit.argument("self")
    shifts, shape = list(edit.argument("shifts")), edit.shape(source)
    dims = [dim % len(shape) for dim in edit.argument("dims")] or [0]
    for place, dim in enumerate(dims):
        if dim in edit.kept(source):
            edge = shape[dim] - shifts[place] % shape[dim]
            shifts[place] = int((edit.kept(source)[dim] >= edge).sum())
    edit.set("shifts", shifts)


@rewrites("constant_pad_nd", "pad")
def _pad(edit: Edit) -> None:
    """Added (or cropped) entries follow the labels that they were given."""
    source, amounts = edit.argument("self"), list(edit.argument("pad"))
    before_shape, after_shape = edit.shape(source), edit.shape()
    for place in range(len(amounts) // 2):
        dim = len(before_shape) - 1 - place
        for side in (0, 1):
            amount = amounts[2 * place + side]
            where = edit.kept().get(dim) if amount > 0 else edit.kept(source).get(dim)
            if where is None:
                continue
            total = after_shape[dim] if amount > 0 else before_shape[dim]
            count = int((where < abs(amount)).sum()) if side == 0 else int((where >= total - abs(amount)).sum())
            amounts[2 * place + side] = count if amount > 0 else -count
    edit.set("pad", amounts)


@rewrites("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv(edit: Edit) -> None:
    """groups = channels in / channels per group (transposed: channels out / channels out per group)."""
    weight, source = edit.argument("weight"), edit.argument("input")
    transposed = "transpose" in operator_name(edit.node.target) or bool(bind_arguments(edit.node, lambda arg: arg).get("transposed"))
    rank = len(edit.shape(weight))
    channel = len(edit.shape(source)) - rank + 1
    total = edit.new_size(channel) if transposed else edit.new_size(channel, source)
    edit.set("groups", total // edit.new_size(1, weight))


@rewrites("group_norm", "native_group_norm")
def _group_norm(edit: Edit) -> None:
    source = edit.argument("input")
    native = operator_name(edit.node.target) == "aten::native_group_norm"
    name = "group" if native else "num_groups"
    edit.set(name, edit.argument(name) * edit.new_size(1, source) // edit.shape(source)[1])
    if native:
        edit.set("C", edit.new_size(1, source))


@rewrites("layer_norm", "rms_norm", "native_layer_norm")
def _layer_norm(edit: Edit) -> None:
    source, count = edit.argument("input"), len(edit.argument("normalized_shape"))
    rank = len(edit.shape(source))
    edit.set("normalized_shape", [edit.new_size(dim, source) for dim in range(rank - count, rank)])


@rewrites("scaled_dot_product_attention")
def _attention(edit: Edit) -> None:
    """The default scale is 1 / sqrt(width of a head): keep the one the network was trained with."""
    query = edit.argument("query")
    width = len(edit.shape(query)) - 1
    if edit.argument("scale") is None and width in edit.kept(query):
        edit.set("scale", edit.shape(query)[-1] ** -0.5)


@rewrites("squeeze")
def _squeeze(edit: Edit) -> None:
    """Only dimensions that had size 1 before: a dimension cut down to one entry is still a dimension."""
    source = edit.argument("self")
    shape = edit.shape(source)
    given = bind_arguments(edit.node, lambda arg: arg).get("dim")
    dims = range(len(shape)) if given is None else [given] if isinstance(given, int) else given
    single = [dim % len(shape) for dim in dims if shape[dim] == 1]
    edit.new.target = _aten.squeeze.dims
    edit.new.args, edit.new.kwargs = (edit.new.args[0], single), {}


@rewrites("torchao::choose_qparams_affine", "torchao::quantize_affine", "torchao::dequantize_affine")
def _blocks(edit: Edit) -> None:
    """A block that spans a whole dimension goes on doing so; smaller blocks go or stay as they are."""
    source = edit.argument("input")
    sizes = zip(edit.argument("block_size"), edit.shape(source), strict=True)
    edit.set("block_size", [edit.new_size(dim, source) if block == size else block for dim, (block, size) in enumerate(sizes)])


@rewrites("quantized_decomposed::quantize_per_channel_group", "quantized_decomposed::dequantize_per_channel_group")
def _groups(edit: Edit) -> None:
    """The same for groups along the last dimension."""
    source = edit.argument("input")
    last = len(edit.shape(source)) - 1
    if edit.argument("group_size") == edit.shape(source)[last]:
        edit.set("group_size", edit.new_size(last, source))
