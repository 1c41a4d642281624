"""Capture the user's model as one graph of un-decomposed ATen operators.

`torch.export` is run with `strict=False`; parameters keep the user's names, nodes keep the user's module paths. The
batch dimension is left symbolic when the model allows it, so that whatever is built from the graph runs on any batch size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim, ShapesCollection
from torch.export.graph_signature import InputKind

from geta.errors import BadModelError
from geta.graph.names import canonical_name

# Whole folders, not parts of paths: a user's own project may well lie in a folder called "torch" or "geta".
_NOT_THE_USERS = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parents[1]) + os.sep, "<")
_CHECK_OPS = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size")


@dataclass(frozen=True)
class Capture:
    """A captured model.

    graph:        un-decomposed ATen graph; `node.meta["val"]` holds a FakeTensor or SymInt.
    tensor_names: placeholder node name -> canonical name of the parameter, buffer or constant it stands for.
    constants:    values of tensors that are not parameters or buffers of the model (lifted constants).
    in_spec, out_spec: pytree structures of (args, kwargs) and of the model's result.
    training:     whether the model was captured in training mode.
    notes:        what the caller should be told, in words.
    """

    graph: fx.Graph
    tensor_names: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    training: bool
    notes: tuple[str, ...] = field(default=())

    def module_path(self, node: fx.Node) -> str:
        """The user's module path that called this operator; "" for the model itself."""
        stack = node.meta.get("nn_module_stack") or {}
        paths = [entry[0] for key, entry in stack.items() if isinstance(entry, tuple) and not key.startswith("_empty")]
        # Quantizers live in containers of their own; the user knows only the module that owns them.
        return canonical_module(paths[-1]) if paths else ""


def canonical_module(path: str) -> str:
    """Strip what attaching quantizers adds to a module path, e.g. `conv.parametrizations.weight.0` -> `conv`."""
    head, marker, _ = path.partition("parametrizations.")
    return head.rstrip(".") if marker else path


@contextlib.contextmanager
def mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model into train or eval mode and give every submodule its own mode back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in before:
            module.training = mode


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    train: bool = False,
) -> Capture:
    """Export `model` on example inputs without changing it: its mode, parameters and buffers stay as they were.

    dynamic_shapes: as for `torch.export.export`; None = dimension 0 of every tensor input is symbolic if the model
    allows it, which a note says when it does not.
    Raises BadModelError when the model can't be exported, quoting the exporter's own reason and the user's line.
    """
    args, kwargs = check_inputs(model, args, kwargs)
    notes: list[str] = []
    with mode_of(model, train):
        exported = _export(model, args, kwargs, dynamic_shapes, notes)
    names = {}
    constants = {}
    inputs = iter(exported.graph_signature.input_specs)
    for node, spec in zip(exported.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            names[node.name] = canonical_name(spec.target)
        if spec.kind == InputKind.CONSTANT_TENSOR:
            constants[canonical_name(spec.target)] = exported.constants[spec.target]
    graph = _clean(exported.graph_module, notes)
    return Capture(graph, names, constants, exported.call_spec.in_spec, exported.call_spec.out_spec, train, tuple(notes))


def check_inputs(
    model: nn.Module, args: tuple[Any, ...] | torch.Tensor, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Normalise example inputs; raise BadModelError for what can't be a model and its inputs."""
    if not isinstance(model, nn.Module):
        raise BadModelError(f"expected a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    if isinstance(args, torch.Tensor):
        raise BadModelError("args is a tensor; pass the example inputs as a tuple: args=(x,)")
    kwargs = dict(kwargs or {})
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise BadModelError("the example inputs hold no tensor: pass args=(x,) or kwargs={'name': x} as you would call the model")
    return tuple(args), kwargs


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, notes: list[str]
) -> torch.export.ExportedProgram:
    if dynamic_shapes is not None:
        return _export_once(model, args, kwargs, dynamic_shapes)
    wide_args, wide_kwargs = _at_least_two(args), _at_least_two(kwargs)
    shapes = ShapesCollection()
    for leaf in pytree.tree_leaves((wide_args, wide_kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            shapes[leaf] = {0: Dim.AUTO}
    try:
        return _export_once(model, wide_args, wide_kwargs, shapes)
    except BadModelError as error:
        exported = _export_once(model, args, kwargs, None)
        notes.append(f"captured with a fixed batch size, because a symbolic one failed: {_first_line(error)}")
        return exported


def _at_least_two(inputs: Any) -> Any:
    """Batch size 1 would be specialised by the exporter, so example batches of one are doubled for the capture."""
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
    double = bool(leaves) and all(leaf.shape[0] == 1 for leaf in leaves)

    def widen(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0:
            return leaf
        return torch.cat([leaf, leaf]) if double else leaf.view_as(leaf)  # a view of its own: shapes are kept per object

    return pytree.tree_map(widen, inputs)


def _export_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    with _buffers_kept(model):
        try:
            if isinstance(dynamic_shapes, ShapesCollection):
                dynamic_shapes = dynamic_shapes.dynamic_shapes(model, args, kwargs)
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:  # the exporter raises whatever the user's own forward raises
            raise BadModelError(
                f"{type(model).__name__} can't be captured by torch.export: {type(error).__name__}: {_first_line(error)}"
                f"{_user_line(error)}. Check that model(*args, **kwargs) runs on the example inputs, and that no Python "
                "control flow depends on tensor values"
            ) from error


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Tracing in train mode may replace buffers by traced ones when it fails; hand the user's own back."""
    before = [(module, dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, buffers in before:
            module._buffers.update(buffers)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _user_line(error: BaseException) -> str:
    """Where in the user's code it failed: the innermost frame outside torch."""
    found = ""
    frame = error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        if not code.co_filename.startswith(_NOT_THE_USERS):
            found = f" (at {code.co_filename}:{frame.tb_lineno} in {code.co_name})"
        frame = frame.tb_next
    return found


def _clean(module: fx.GraphModule, notes: list[str]) -> fx.Graph:
    """Inline grad-mode and autocast regions, drop assertions; what is left computes and nothing else."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            _inline_region(module, node, notes)
    for node in reversed(list(graph.nodes)):
        name = getattr(node.target, "__name__", "").split(".")[0]
        if (node.op == "call_function" and name in _CHECK_OPS and not node.users) or (node.op == "get_attr" and not node.users):
            graph.erase_node(node)
    graph.eliminate_dead_code()  # code that only looks at `weight.dtype` leaves a whole computation without a use
    return graph


def _inline_region(module: fx.GraphModule, node: fx.Node, notes: list[str]) -> None:
    name = str(node.target)
    if name == "wrap_with_set_grad_enabled":
        body, inputs = node.args[1], node.args[2:]
    elif name == "wrap_with_autocast":
        body, inputs = node.args[4], node.args[5:]
        if node.args[2]:
            notes.append("an enabled autocast region was inlined without its casts: results are in the parameters' own dtype")
    else:
        return
    assert isinstance(body, fx.Node)
    inner = module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    _clean(inner, notes)
    mapping: dict[fx.Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with module.graph.inserting_before(node):
        result = None
        for inner_node in inner.graph.nodes:
            if inner_node.op == "output":
                result = pytree.tree_map_only(fx.Node, lambda n: mapping[n], inner_node.args[0])
            elif inner_node.op != "placeholder":
                mapping[inner_node] = module.graph.node_copy(inner_node, lambda n: mapping[n])
    for user in list(node.users):
        assert isinstance(result, (tuple, list)) and isinstance(user.args[1], int)
        user.replace_all_uses_with(result[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(node)
