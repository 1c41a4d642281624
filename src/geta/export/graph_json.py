"""An fx graph as plain JSON data and back, without pickle and without running anything.

A node is a list, one of

    ["placeholder", name, example]     ["get_attr", tensor name]     ["output", value]
    ["call", operator, args, kwargs, module path]     or, where the result's size depends on values, with an example of it as a sixth entry

and a value that JSON has no form for is a one-key object:

    {"n": 12}            the result of node 12 (only earlier nodes)      {"dtype": "float32"}
    {"f": "inf"}         a float that is not finite                     {"layout": "strided"}
    {"t": [...]}         a tuple (a bare list is a list)                {"memory_format": "contiguous_format"}
    {"s": [0, null, 2]}  a slice                                        {"device": "cpu"}

Finite floats are written as the shortest decimal that reads back as the same number. Every device is written as "cpu":
tensors are loaded there, and a loaded model can be moved. Only operators that are listed or that pass `resolve_target`
are read; so a file can't make the loader call anything but tensor operators and integer arithmetic. Operators of other libraries
are written by name, and read only if the caller names them: a file can't choose what of the user's own code is called.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

import geta.quant.ops  # noqa: F401  registers the operators of the namespace `geta`
from geta.errors import CheckpointError

NAMESPACES = ("aten", "geta")
_INTERNAL = ("prim", "prims", "rngprims", "debugprims", "profiler", "inductor", "c10d", "_c10d_functional", "rpc", "static_runtime")
"""Namespaces of torch's machinery: neither what a captured model holds nor somebody's own operators."""
_PLAIN = {
    "operator": (
        *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos", "abs", "getitem"),
        *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_", "lshift", "rshift"),
    ),
    "math": ("ceil", "floor", "trunc", "sqrt"),
    "torch": ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum", "_sym_sqrt"),
}
_HOMES = {"operator": operator, "math": math, "torch": torch}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{home}.{name}": getattr(_HOMES[home], name) for home, names in _PLAIN.items() for name in names if hasattr(_HOMES[home], name)
}
"""Python functions that a graph may call on numbers (and `operator.getitem` on tuples of tensors), by their saved name."""
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}

# Operators that reach outside the tensors they are given, or change what a tensor's memory is.
_REFUSED = ("from_file", "record_stream", "resize", "resize_", "resize_as_", "set", "set_", "set_data")
_RESULTS = ("Tensor", "List[Tensor]", "int", "float", "bool", "number", "SymInt")
_ARGUMENTS_REFUSED = re.compile(r"Storage|Stream|Future|Dict|Any|__torch__|Quantizer")
# Operators with a leading underscore check less; these are the ones that a captured model may hold.
_PRIVATE = re.compile(
    r"__(and|or|xor|lshift|rshift|iand|ior|ixor|ilshift|irshift)__"
    r"|_(softmax|log_softmax|safe_softmax|convolution|convolution_mode|to_copy|unsafe_view|local_scalar_dense|conj|prelu_kernel|trilinear"
    r"|adaptive_avg_pool[23]d|fused_rms_norm|weight_norm|weight_norm_interface|euclidean_dist|cdist_forward|is_all_true|is_any_true"
    r"|native_multi_head_attention|transformer_encoder_layer_fwd|transform_bias_rescale_qkv|embedding_bag|grouped_mm|int_mm"
    r"|native_batch_norm_legit\w*|batch_norm_\w+|scaled_dot_product_\w*attention\w*|upsample_\w+|fft_\w+|unsafe_index)"
)

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_\-+ :/@]+(\.[A-Za-z0-9_\-+ :/@]+)*")
_INT64 = 1 << 63
_CONSTANTS: dict[str, tuple[type, tuple[str, ...]]] = {
    "dtype": (
        torch.dtype,
        (
            *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool"),
            *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        ),
    ),
    "layout": (torch.layout, ("strided",)),
    "memory_format": (torch.memory_format, ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")),
}


def graph_to_json(graph: fx.Graph) -> dict[str, Any]:
    """Return the graph as JSON data; equal graphs give equal data.

    A node's module path is taken from `node.meta["module_path"]`, what an input was captured with from `node.meta["example"]`
    (a tensor's "shape" and "dtype") or `node.meta["val"]` (a plain value).
    Raises CheckpointError for an operator or value that could not be loaded again.
    """
    index: dict[fx.Node, int] = {}
    nodes: list[list[Any]] = []
    for node in graph.nodes:
        nodes.append(_encode_node(node, index))
        index[node] = len(index)
    return {"nodes": nodes}


def graph_from_json(data: Any, custom_ops: Sequence[str] = ()) -> fx.Graph:
    """Build the graph that `graph_to_json` described.

    custom_ops: names of operators of other libraries that the graph may call, such as "mylib::op".
    Raises CheckpointError, before anything is run, for whatever `graph_to_json` doesn't write: unknown operators, values,
    node kinds, names that aren't plain, references to later nodes.
    """
    if not isinstance(data, dict) or list(data) != ["nodes"] or not isinstance(data["nodes"], list):
        raise CheckpointError("the saved graph is not a list of nodes: the file is damaged or not one of geta's")
    graph = fx.Graph()
    built: list[fx.Node] = []
    for entry in data["nodes"]:
        if built and built[-1].op == "output":
            raise CheckpointError("the saved graph goes on after its output: the file is damaged")
        built.append(_decode_node(entry, graph, built, custom_ops))
    if not built or built[-1].op != "output":
        raise CheckpointError("the saved graph has no output: the file is damaged")
    return graph


def target_name(target: Any) -> str:
    """Return the saved name of an operator, e.g. `aten.conv2d.default` or `operator.mul`.

    Raises CheckpointError when `resolve_target` would not accept it.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
        _check_operator(name, target)
        return name
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise CheckpointError(f"the graph calls '{target}', which can't be saved: only registered operators and arithmetic on sizes can")


def resolve_target(name: Any, custom_ops: Sequence[str] = ()) -> Callable[..., Any]:
    """Return the operator of a saved name; raise CheckpointError for anything but a known, harmless one or one of `custom_ops`."""
    if not isinstance(name, str):
        raise CheckpointError(f"the saved graph names an operator by {type(name).__name__}: the file is damaged")
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = name.split(".")
    if len(parts) != 3 or not all(_IDENTIFIER.fullmatch(part) for part in parts):
        raise CheckpointError(f"the saved graph calls '{name}', which is not an operator that geta saves: don't trust this file")
    custom = f"{parts[0]}::{parts[1]}"
    if parts[0] not in NAMESPACES and custom not in custom_ops:
        raise CheckpointError(
            f"the saved graph calls '{name}', an operator of another library. If you trust this file and know that operator, import what "
            f"registers it and load with custom_ops=['{custom}']"
        )
    try:
        target = getattr(getattr(getattr(torch.ops, parts[0]), parts[1]), parts[2])
    except AttributeError:
        missing = f"which torch {torch.__version__} doesn't have"
        unknown = f"which is not registered: import the library that defines '{custom}' first"
        raise CheckpointError(f"the saved graph calls '{name}', {missing if parts[0] in NAMESPACES else unknown}") from None
    if not isinstance(target, torch._ops.OpOverload):
        raise CheckpointError(f"the saved graph calls '{name}', which is not an operator: don't trust this file")
    _check_operator(name, target)
    return target


def _check_operator(name: str, target: torch._ops.OpOverload) -> None:
    namespace, base, overload = name.split(".")
    schema = target._schema
    own = namespace in NAMESPACES
    harmless = (
        namespace not in _INTERNAL
        and not (own and base in _REFUSED)
        and not (own and base.startswith("_") and _PRIVATE.fullmatch(base) is None)
        and torch._C._dispatch_has_kernel(target._schema.name + ("." + overload if overload != "default" else ""))
        and len(schema.returns) > 0
        and all(str(result.type) in _RESULTS for result in schema.returns)
        and not any(_ARGUMENTS_REFUSED.search(str(argument.type)) for argument in schema.arguments)
    )
    if not harmless:
        raise CheckpointError(f"the operator '{name}' can't be part of a saved graph: it does more than compute tensors from tensors")


def _encode_node(node: fx.Node, index: Mapping[fx.Node, int]) -> list[Any]:
    if node.op == "placeholder":
        return ["placeholder", _plain_name(node.target), _encode_example(node)]
    if node.op == "get_attr":
        return ["get_attr", check_tensor_name(node.target)]
    if node.op == "output":
        return ["output", _encode(node.args[0], index)]
    if node.op != "call_function":
        raise CheckpointError(f"the graph has a {node.op} node '{node.name}', which can't be saved")
    path = node.meta.get("module_path", "")
    arguments = [_encode(list(node.args), index), {key: _encode(value, index) for key, value in node.kwargs.items()}]
    example = [] if node.meta.get("example") is None else [_encode_example(node)]
    return ["call", target_name(node.target), *arguments, str(path), *example]


def _decode_node(entry: Any, graph: fx.Graph, built: Sequence[fx.Node], custom_ops: Sequence[str]) -> fx.Node:
    sizes = {"placeholder": (3,), "get_attr": (2,), "output": (2,), "call": (5, 6)}
    if not isinstance(entry, list) or not entry or not isinstance(entry[0], str) or len(entry) not in sizes.get(entry[0], ()):
        raise CheckpointError(f"the saved graph has a node that is not one: {_short(entry)}")
    kind = entry[0]
    if kind == "placeholder":
        node = graph.create_node("placeholder", _plain_name(entry[1]))
        node.meta.update(_decode_example(entry[2]))
        return node
    if kind == "get_attr":
        return graph.create_node("get_attr", check_tensor_name(entry[1]))
    if kind == "output":
        return graph.create_node("output", "output", (_decode(entry[1], built),))
    return _decode_call(entry, graph, built, custom_ops)


def _decode_call(entry: list[Any], graph: fx.Graph, built: Sequence[fx.Node], custom_ops: Sequence[str]) -> fx.Node:
    _, saved_target, saved_args, saved_kwargs, path, *example = entry
    target = resolve_target(saved_target, custom_ops)
    args = _decode(saved_args, built)
    if not isinstance(saved_args, list) or not isinstance(saved_kwargs, dict) or not isinstance(path, str):
        raise CheckpointError(f"the saved call of '{saved_target}' has no proper arguments: the file is damaged")
    kwargs = {_plain_name(key): _decode(value, built) for key, value in saved_kwargs.items()}
    if isinstance(target, torch._ops.OpOverload):
        known = [argument.name for argument in target._schema.arguments]
        if len(args) > len(known) or any(key not in known[len(args) :] for key in kwargs):
            raise CheckpointError(f"the saved call of '{saved_target}' has arguments that the operator doesn't take: the file is damaged")
    node = graph.create_node("call_function", target, tuple(args), kwargs)
    if path:
        node.meta["module_path"] = path
    if example:
        decoded = _decode_example(example[0])
        node.meta["example"] = decoded.get("example", {"value": decoded.get("val")})
    return node


def _encode(value: Any, index: Mapping[fx.Node, int]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, fx.Node):
        return {"n": index[value]}
    if isinstance(value, int) and -_INT64 <= value < _INT64:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"f": value.hex()}
    if isinstance(value, list):
        return [_encode(item, index) for item in value]
    if isinstance(value, tuple):
        return {"t": [_encode(item, index) for item in value]}
    if isinstance(value, slice):
        return {"s": [_encode(item, index) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    for key, (kind, names) in _CONSTANTS.items():
        if isinstance(value, kind) and str(value).removeprefix("torch.") in names:
            return {key: str(value).removeprefix("torch.")}
    raise CheckpointError(f"the graph holds {_short(value)} ({type(value).__name__}), which can't be saved")


def _decode(value: Any, built: Sequence[fx.Node]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int) and -_INT64 <= value < _INT64:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list):
        return [_decode(item, built) for item in value]
    if isinstance(value, dict) and len(value) == 1:
        return _decode_tagged(*next(iter(value.items())), built)
    raise CheckpointError(f"the saved graph holds {_short(value)}, which is no value that geta saves: the file is damaged")


def _decode_tagged(key: Any, inner: Any, built: Sequence[fx.Node]) -> Any:
    if key == "n" and isinstance(inner, int) and not isinstance(inner, bool) and 0 <= inner < len(built):
        return built[inner]
    if key == "f" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if key == "t" and isinstance(inner, list):
        return tuple(_decode(item, built) for item in inner)
    if key == "s" and isinstance(inner, list) and len(inner) == 3:
        return slice(*(_decode(item, built) for item in inner))
    if key == "device" and inner == "cpu":
        return torch.device("cpu")
    if key in _CONSTANTS and inner in _CONSTANTS[key][1]:
        return getattr(torch, inner)
    raise CheckpointError(f"the saved graph holds {_short({key: inner})}, which is no value that geta saves: the file is damaged")


def _encode_example(node: fx.Node) -> dict[str, Any] | None:
    """What an input was captured with, so that costs can be counted: {"shape": [2, 3], "dtype": "float32"}, or {"value": True}."""
    example: dict[str, Any] | None = node.meta.get("example")
    if example is None and _is_plain(node.meta.get("val", ...)):
        example = {"value": node.meta["val"]}
    _decode_example(example)
    return example


def _decode_example(value: Any) -> dict[str, Any]:
    """The entries of `node.meta` that `_encode_example` described; raise CheckpointError for anything else."""
    if value is None:
        return {}
    if isinstance(value, dict) and list(value) == ["value"] and _is_plain(value["value"]):
        return {"val": value["value"]}
    if isinstance(value, dict) and list(value) == ["items"] and isinstance(value["items"], list):
        decoded = [_decode_example(item) for item in value["items"]]
        return {"example": {"items": [item.get("example", {"value": item.get("val")}) for item in decoded]}}
    known = isinstance(value, dict) and list(value) == ["shape", "dtype"] and value["dtype"] in _CONSTANTS["dtype"][1]
    if not known or not isinstance(value["shape"], list) or not all(isinstance(n, int) and 0 <= n < _INT64 for n in value["shape"]):
        raise CheckpointError(f"the graph describes an input by {_short(value)} instead of a shape and a dtype")
    return {"example": {"shape": list(value["shape"]), "dtype": value["dtype"]}}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, str)) or (isinstance(value, (int, float)) and math.isfinite(value))


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name):
        raise CheckpointError(f"the graph uses {_short(name)} as a name; names are letters, digits and '_'")
    return name


def check_tensor_name(name: Any) -> str:
    if not isinstance(name, str) or not _TENSOR_NAME.fullmatch(name):
        raise CheckpointError(f"the graph reads the tensor {_short(name)}; tensor names are made of letters, digits, '_-+ :/@' and dots")
    return name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
