"""Integer weights of linear layers and the quantizers of their inputs, as found in a graph by the user's own module paths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from geta.export.between import ACTIVATIONS, arguments
from geta.export.cleanup import Network
from geta.export.onnx_quant import BYTE, Activation, Weight, activation_of, weight_of
from geta.quant.targets import INPUT_QUANTIZER, OUTPUT_QUANTIZER

_aten = torch.ops.aten
_PRODUCTS = (_aten.linear.default, _aten.addmm.default, _aten.mm.default, _aten.matmul.default)
_CASTS = (_aten.to.dtype, _aten._to_copy.default)
_READ_AS: dict[object, str] = {_aten.embedding.default: "an embedding"}


@dataclass(frozen=True)
class Linear:
    """A linear layer with integer weights.

    weight: codes [O, I], scale [], [O, 1] or [O, B] for B blocks of columns. width: the fewest bits, at least the weight's, in which
    signed integers hold all codes. dtype: of the weight's values as the layer reads them. calls: the layer's `aten.linear` nodes.
    """

    path: str
    weight: Weight
    width: int
    dtype: torch.dtype
    calls: tuple[fx.Node, ...]

    @property
    def row_scale(self) -> Tensor:
        """One scale per output channel, [O, 1]; of a layer without blocks."""
        assert not self.weight.blocks
        return self.weight.scale.reshape(-1, 1).expand(self.weight.codes.shape[0], 1).contiguous()


@dataclass(frozen=True)
class Input:
    """The quantizer of a layer's input. name: as in `info.bits`, `path:input`."""

    name: str
    node: fx.Node
    quantizer: Activation | None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors that it reads."""
        return tuple(str(read.target) for read in self.node.all_input_nodes if read.op == "get_attr")


@dataclass(frozen=True)
class Product:
    """x W^T + b, however a graph writes it. weight: [O, I], None where an `aten.linear` reads another kind of weight."""

    input: fx.Node
    weight: Weight | None
    bias: fx.Node | None


def product_of(network: Network, node: fx.Node) -> Product | None:
    """A node as a product with a weight: `linear`; or `addmm`, `mm` or `matmul` with an integer weight, transposed or not."""
    bound = arguments(node) if node.target in _PRODUCTS else {}
    if node.target is _aten.linear.default:
        return Product(bound["input"], weight_of(network, bound["weight"]), bound["bias"])
    if not bound or bound.get("alpha", 1) != 1 or bound.get("beta", 1) != 1:
        return None
    second, turned = bound.get("mat2", bound.get("other")), False
    while isinstance(second, fx.Node) and _turns(second):
        second, turned = second.args[0], not turned
    weight = weight_of(network, second)
    if weight is None or weight.codes.dim() != 2:
        return None
    if not turned:
        weight = weight.turned
    addmm = node.target is _aten.addmm.default
    return Product(bound["mat1"] if addmm else bound["self"], weight, bound["self"] if addmm else None)


def _turns(node: fx.Node) -> bool:
    """Whether a node exchanges the two dimensions of a matrix."""
    if node.target in (_aten.t.default, _aten.numpy_T.default):
        return True
    if node.target is _aten.transpose.int:
        bound = arguments(node)
        return {bound["dim0"] % 2, bound["dim1"] % 2} == {0, 1}
    return node.target is _aten.permute.default and [dim % 2 for dim in arguments(node)["dims"]] == [1, 0]


def integer_linears(network: Network) -> tuple[dict[str, Linear], dict[str, str]]:
    """The linear layers with integer weights by module path; and for every other integer weight, by tensor name, why it is none."""
    readers: dict[str, list[tuple[fx.Node, fx.Node]]] = {}
    weights: dict[str, Weight] = {}
    for node in network.graph.nodes:
        weight = weight_of(network, node)
        if weight is not None:
            name = weight.name.removesuffix("_codes")
            weights[name] = weight
            readers.setdefault(name, []).extend(_readers(node))
    linears, others = {}, {}
    for name, weight in weights.items():
        found = _linear(name, weight, readers[name])
        if isinstance(found, Linear):
            linears[found.path] = found
        else:
            others[name] = found
    return linears, others


def _linear(name: str, weight: Weight, readers: list[tuple[fx.Node, fx.Node]]) -> Linear | str:
    path, _, leaf = name.rpartition(".")
    for reader, value in readers:
        if reader.target is not _aten.linear.default or arguments(reader)["weight"] is not value:
            return f"it is read by {_READ_AS.get(reader.target, reader.target)} in '{_path(reader)}', not by linear layers only"
        if leaf != "weight" or _path(reader) != path:
            return f"it is read by a linear product in '{_path(reader)}', so it is not the weight of a linear layer of its own"
    if weight.blocks and weight.cutting.axis != 1:
        return "its scales are one per block of output channels"
    if not weight.blocks and weight.scale.numel() != 1 and tuple(weight.scale.shape) != (weight.codes.shape[0], 1):
        return f"its scale has the shape {list(weight.scale.shape)}: neither one per tensor nor one per output channel"
    width = max(weight.bits, _width(weight.codes))
    if width > BYTE:
        return f"its codes need {width} bits with a sign, more than {BYTE}"
    casts = [value for _, value in readers if value.target in _CASTS]
    dtype = arguments(casts[0])["dtype"] if casts else weight.scale.dtype
    return Linear(path, weight, width, dtype, tuple(reader for reader, _ in readers))


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(who reads a weight, the node that it reads), looking through conversions to another floating-point type."""
    for user in node.users:
        if user.target in _CASTS:
            yield from _readers(user)
        else:
            yield user, node


def _width(codes: Tensor) -> int:
    """The fewest bits, at least 2, in which two's complement holds every code."""
    if not codes.numel():
        return 2
    lowest, highest = int(codes.min()), int(codes.max())
    return max(2, 1 + max(highest, -lowest - 1, 0).bit_length())


def _path(node: fx.Node) -> str:
    return str(node.meta.get("module_path", ""))


def input_of(network: Network, call: fx.Node) -> Input | None:
    """The quantizer of the input of an `aten.linear` node, or None."""
    source = arguments(call)["input"]
    while isinstance(source, fx.Node) and source.target in _CASTS:
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.target not in ACTIVATIONS:
        return None
    return Input(quantizer_name(source), source, activation_of(network, source))


def quantizer_name(node: fx.Node) -> str:
    """`path:input` or `path:output`, as in `info.bits`."""
    path, _, attribute = _path(node).rpartition(".")
    sides = {INPUT_QUANTIZER: "input", OUTPUT_QUANTIZER: "output"}
    return f"{path}:{sides[attribute]}" if attribute in sides else f"{path}.{attribute}".strip(".")
