"""Count the costs of a model or of a graph by running its shapes, not its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from geta.cost.bits import BitWidths
from geta.cost.macs import Product, bind, products
from geta.cost.record import Cost, OpCost
from geta.errors import BadModelError, UnsupportedOpError
from geta.graph.capture import Capture, capture, check_inputs
from geta.graph.names import canonical_name

Path = Callable[[fx.Node], str]
_SCALES = {"geta.fake_quantize.default": 4, "geta.lsq_quantize.default": 2, "geta.dequantize.default": 2}
"""Operators of quantizers -> the first argument after the tensors that their scale is computed from; the first argument is the data."""


def cost(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Cost:
    """Count what one evaluation-mode forward pass of `model` on these example inputs costs; the model stays as it is.

        MACs   per operator from shapes: linear and matrix products, convolutions (groups, transposed), both products of
               attention; embeddings 0. All for the batch as given: a batch of 8 costs 8 times a batch of 1.
        BOPs   sum over products of MACs * b_w * b_a, with the bits that the quantizers in the graph imply now; an operand
               without a quantizer counts 32.
        bytes  sum over parameters and buffers of numel * bits / 8 (unquantized: their dtype), plus the scales.

    An operator without a formula of its own is measured by `torch.utils.flop_counter` (MACs = FLOPs / 2).
    Raises BadModelError when the model can't be captured, UnsupportedOpError when its shapes can't be computed.
    Source: GETA (arXiv 2502.16638) section 4 reports relative BOPs in this sense.
    """
    args, kwargs = check_inputs(model, args, kwargs)
    # No size is left symbolic: costs are for these inputs only, and the capture is faster.
    captured = capture(model, args, kwargs, dynamic_shapes={})
    tensors, names = captured_tensors(model, captured)
    inputs = flat_inputs(captured, args, kwargs)
    return cost_of_graph(captured.graph, tensors, inputs, tensor_names=names, module_path=captured.module_path)


def cost_of_graph(
    graph: fx.Graph,
    tensors: Mapping[str, Tensor],
    inputs: Sequence[Any] | None = None,
    *,
    tensor_names: Mapping[str, str] | None = None,
    module_path: Path | None = None,
) -> Cost:
    """Count the costs of a graph of ATen operators.

    tensors: every parameter, buffer and constant of the model by name; parameters are told by their type.
    inputs: one value per remaining placeholder, in order; None = what the placeholders were captured with: tensors by
        `meta["example"]` = {"shape": [...], "dtype": "float32"}, everything else by `meta["val"]`.
    tensor_names: placeholder name -> tensor name, for graphs that take their tensors as inputs; `get_attr` nodes name theirs.
    module_path: gives a node's module path; default: `meta["module_path"]`.
    """
    names = {node: str(node.target) for node in graph.find_nodes(op="get_attr")}
    placeholders = graph.find_nodes(op="placeholder")
    lifted = tensor_names or {}
    names.update({node: lifted[node.name] for node in placeholders if node.name in lifted})
    free = [node for node in placeholders if node not in names]
    missing = next((name for name in names.values() if name not in tensors), None)
    if missing is not None:
        raise BadModelError(f"the graph reads the tensor '{missing}', which the model doesn't have: were they made from the same model?")
    values = [_example(node) for node in free] if inputs is None else list(inputs)
    if len(values) != len(free):
        raise BadModelError(f"the graph takes {len(free)} inputs, {len(values)} were given: pass what the model is called with")
    widths = BitWidths(tensors, names)
    path = module_path or _recorded_path
    given = {**{node: tensors[name] for node, name in names.items()}, **dict(zip(free, values, strict=True))}
    rows = tuple(_row(product, path(node), widths) for node, product in graph_products(graph, given, widths, path) if product.macs)
    params, weight_bytes = _storage(graph, tensors, widths)
    shapes = tuple(tuple(int(size) for size in value.shape) for value in values if isinstance(value, Tensor))
    return Cost(sum(row.macs for row in rows), math.fsum(row.bops for row in rows), params, weight_bytes, rows, shapes)


def graph_products(graph: fx.Graph, given: Mapping[fx.Node, Any], widths: BitWidths, path: Path) -> list[tuple[fx.Node, Product]]:
    """Every product that a graph computes, in graph order; `given` has the value of every placeholder and `get_attr` node."""
    return list(_ShapeRun(graph, given, _numbers(graph, widths), path).products())


def graph_results(graph: fx.Graph, given: Mapping[fx.Node, Any], widths: BitWidths, path: Path) -> dict[fx.Node, Any]:
    """What every node of a graph gives, as tensors that have shapes and no numbers; `given` as in `graph_products`."""
    run = _ShapeRun(graph, given, _numbers(graph, widths), path)
    list(run.products())
    return run.environment


def captured_tensors(model: nn.Module, captured: Capture) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name -> tensor, placeholder -> name); a tensor that the model knows by several names is counted once, by its first."""
    stored = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    by_name = {**captured.constants, **{canonical_name(name): tensor for name, tensor in stored}}
    first: dict[int, str] = {}
    names = {node: first.setdefault(id(by_name[name]), name) for node, name in captured.tensor_names.items()}
    return {name: by_name[name] for name in names.values()}, names


def flat_inputs(captured: Capture, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The leaves of the inputs in the order of the graph: keyword arguments in the order of the model's signature."""
    _, order = captured.in_spec.children()
    ordered = {key: kwargs[key] for key in order.context}
    return pytree.tree_leaves((args, ordered))


def _recorded_path(node: fx.Node) -> str:
    return str(node.meta.get("module_path", ""))


def _example(node: fx.Node) -> Any:
    """An empty tensor like the one that a placeholder was captured with."""
    recorded, value = node.meta.get("example"), node.meta.get("val")
    if isinstance(recorded, Mapping):
        return torch.empty(recorded["shape"], dtype=getattr(torch, recorded["dtype"]), device="meta")
    if isinstance(value, Tensor):
        return torch.empty([_hint(size) for size in value.shape], dtype=value.dtype, device="meta")
    if value is not None or "val" in node.meta:
        return value
    raise BadModelError(f"the graph doesn't say what its input '{node.target}' looks like: pass example inputs")


def _recorded(node: fx.Node) -> Any:
    """A result that the example inputs gave, as a fake tensor of the active mode, or a number."""
    return _from_description(node.meta["example"])


def _from_description(example: Any) -> Any:
    if "items" in example:
        return [_from_description(item) for item in example["items"]]
    if "value" in example:
        return example["value"]
    return torch.empty(example["shape"], dtype=getattr(torch, example["dtype"]))


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def _numbers(graph: fx.Graph, widths: BitWidths) -> dict[fx.Node, Any]:
    """Numbers that the graph reads from constant tensors: fake tensors could not tell them."""
    found = {}
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target) in ("aten.item.default", "aten._local_scalar_dense.default"):
            try:
                found[node] = widths.value(node)
            except KeyError:  # it depends on the model's inputs
                continue
    return found


class _ShapeRun:
    """Runs a graph on fake tensors, which have shapes and no numbers, and yields every product it computes."""

    def __init__(self, graph: fx.Graph, given: Mapping[fx.Node, Any], numbers: Mapping[fx.Node, Any], path: Path) -> None:
        self._graph = graph
        self._given = given
        self._numbers = numbers
        self._path = path
        self.environment: dict[fx.Node, Any] = {}

    def products(self) -> Iterator[tuple[fx.Node, Product]]:
        """Yield (node, product) in graph order."""
        # A list, because the modes below must not stay active while the caller works.
        found: list[tuple[fx.Node, Product]] = []
        with _fake_tensors() as (fake, counter):
            for node, value in self._given.items():
                self.environment[node] = _as_fake(fake, value)
            for node in self._graph.nodes:
                if node.op == "call_function":
                    found += [(node, product) for product in self._call(node, counter)]
        yield from found

    def _call(self, node: fx.Node, counter: FlopCounterMode) -> list[Product]:
        args = fx.map_arg(off_meta(node.args), self.environment.__getitem__)
        kwargs = fx.map_arg(off_meta(node.kwargs), self.environment.__getitem__)
        before = counter.get_total_flops()
        result = self._result(node, args, kwargs)
        self.environment[node] = result
        call = bind(node, args, kwargs, result)
        counted = None if call is None else products(call)
        if counted is not None:
            return counted
        macs = (counter.get_total_flops() - before) // 2
        left, right = (*node.all_input_nodes, None, None)[:2]
        return [Product(str(node.target).split(".")[1], macs, left, right)] if macs else []

    def _result(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node in self._numbers:
            return self._numbers[node]
        assert callable(node.target)
        try:
            return node.target(*args, **kwargs)
        except Exception as error:  # whatever an operator's shape function raises
            if node.meta.get("example") is not None:  # its size depends on values; a run on the example inputs told it
                return _recorded(node)
            path = self._path(node)
            reason = str(error).strip().splitlines()[:1]
            raise UnsupportedOpError(
                f"the costs of {node.target}{f' in {path!r}' if path else ''} can't be counted, as its shapes can't be computed: "
                f"{type(error).__name__}: {''.join(reason)}. Check the example inputs, or replace what depends on tensor values"
            ) from error


@contextmanager
def _fake_tensors() -> Iterator[tuple[FakeTensorMode, FlopCounterMode]]:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), FakeTensorMode() as fake, counter:
        yield fake, counter


def off_meta(arguments: Any) -> Any:
    """Arguments of an operator with the CPU in place of the meta device, as `_as_fake` has it: a graph captured there names it."""
    return pytree.tree_map_only(torch.device, lambda device: torch.device("cpu") if device.type == "meta" else device, arguments)


def _as_fake(fake: FakeTensorMode, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    device = "cpu" if value.device.type == "meta" else value.device
    with fake:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def _row(product: Product, path: str, widths: BitWidths) -> OpCost:
    left, right = product.left, product.right
    if widths.is_weight(left) and not widths.is_weight(right):
        left, right = right, left
    weight_bits, activation_bits = widths.of(right), widths.of(left)
    return OpCost(path, product.op, product.macs, product.macs * weight_bits * activation_bits, weight_bits, activation_bits)


def _strength(node: fx.Node) -> list[fx.Node]:
    """The surrogate's strength, a tensor of the quantizer that only training needs."""
    found = node.args[-1] if len(node.args) in (8, 9) else node.kwargs.get("strength")
    return [found] if isinstance(found, fx.Node) and str(node.target) != "geta.dequantize.default" else []


def _storage(graph: fx.Graph, tensors: Mapping[str, Tensor], widths: BitWidths) -> tuple[int, int]:
    """Count the parameters, and the bytes of all tensors with their quantizers' bit widths."""
    bits: dict[str, float] = {}
    quantizer: dict[str, bool] = {}  # tensor of a quantizer -> whether a saved model keeps it
    for node in graph.nodes:
        target = str(node.target) if node.op == "call_function" else ""
        if target not in _SCALES:
            continue
        stored = widths.stored(node.args[0])
        if stored is not None:
            bits[stored] = max(widths.of(node), bits.get(stored, 0.0))
        for position, argument in enumerate((*node.args[1 : _SCALES[target]], *_strength(node))):
            for name in widths.read_by(argument):
                # A weight's codes need only its step size; an activation's quantizer goes on quantizing.
                quantizer[name] = quantizer.get(name, False) or stored is None or position == 0
    params = weight_bytes = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if name in quantizer:
            weight_bytes += size if quantizer[name] else 0
            continue
        if isinstance(tensor, nn.Parameter) or name in bits:
            params += tensor.numel()
        weight_bytes += math.ceil(tensor.numel() * bits[name] / 8) if name in bits else size
    return params, weight_bytes
