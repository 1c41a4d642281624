"""Capture the user's model as one graph of un-decomposed ATen operators.

`torch.export` is run with `strict=False`; parameters keep the user's names, nodes keep the user's module paths. The
batch dimension is left symbolic when the model allows it, so that whatever is built from the graph runs on any batch size.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim, ShapesCollection
from torch.export.graph_signature import InputKind

from geta.errors import BadModelError, UnsupportedOpError
from geta.graph.backward import backward_notes, checkpoints_inlined
from geta.graph.bookkeeping import without_bookkeeping
from geta.graph.capture_fallback import follow
from geta.graph.measure import measure
from geta.graph.names import canonical_module, canonical_name, find_tensor, unwrap
from geta.graph.observers import switches_as_numbers
from geta.graph.places import LineWantedError, first_line, line_of_error, lines_recorded
from geta.graph.preserve import garbage_kept, known_dataclasses, mode_of, preserved, without_caches
from geta.graph.regions import clean
from geta.graph.shortcuts import shortcuts

__all__ = ["Capture", "canonical_module", "capture", "check_inputs", "mode_of"]

_CHECK = "Check that model(*args, **kwargs) runs on the example inputs"
_TALKATIVE = ("torch.export._trace", "torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes")


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


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    train: bool = False,
) -> Capture:
    """Export `model` on example inputs without changing it: modes, tensors, attributes and hooks stay as they were.

    Wrappers (`DistributedDataParallel`, `torch.compile`) are looked through: names are those of the user's own module.
    dynamic_shapes: as for `torch.export.export`; None = dimension 0 of every tensor input is symbolic if the model
    allows it, which a note says when it does not. A model whose Python control flow depends on tensor values is followed along
    the path that the example inputs take, which a note says too.
    Raises BadModelError when the model can't be captured, quoting the reason and the user's line; UnsupportedOpError for an
    operator that runs a graph of its own (a loop).
    """
    model = unwrap(model)
    args, kwargs = check_inputs(model, args, kwargs)
    with (
        garbage_kept(),
        preserved(model),
        mode_of(model, train),
        switches_as_numbers(model),
        without_caches(model),
        known_dataclasses(model, (args, kwargs)),
    ):
        try:
            return _exported(model, args, kwargs, dynamic_shapes, train=train)
        except BadModelError as error:
            if dynamic_shapes or error.__cause__ is None:
                raise
            return _followed(model, args, kwargs, error, train=train)


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, *, train: bool) -> Capture:
    """Captured by torch.export; a second time with the lines of all operators if a message has to name one."""
    try:
        with lines_recorded(False):
            return _captured(model, args, kwargs, dynamic_shapes, train=train)
    except LineWantedError:
        with lines_recorded(True):
            return _captured(model, args, kwargs, dynamic_shapes, train=train)


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, *, train: bool) -> Capture:
    notes: list[str] = []
    exported, wide = _export(model, args, kwargs, dynamic_shapes, notes)
    names, constants, values = {}, {}, []
    _, order = exported.call_spec.in_spec.children()
    each = [pytree.tree_leaves((one[0], {name: one[1][name] for name in order.context})) for one in (wide, (args, kwargs))]
    leaves = iter(zip(*each, strict=True))
    for node, spec in zip(exported.graph.find_nodes(op="placeholder"), exported.graph_signature.input_specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            name = names[node.name] = _own_name(canonical_name(spec.target), train=train)
        if spec.kind == InputKind.CONSTANT_TENSOR:
            constants[name] = exported.constants[spec.target]
        known = constants.get(name) if spec.kind == InputKind.CONSTANT_TENSOR else None
        values.append(next(leaves) if node.name not in names else (find_tensor(model, name) if known is None else known,) * 2)
    graph = clean(exported.graph_module, notes)
    measure(graph, [value for value, _ in values], [value for _, value in values])
    if train:
        notes += backward_notes(model, args, kwargs)
    return Capture(graph, names, constants, exported.call_spec.in_spec, exported.call_spec.out_spec, train, tuple(notes))


def _own_name(name: str, *, train: bool) -> str:
    """Constants that the tracer numbers have other numbers in training mode, so they get other names."""
    return f"training_{name}" if train and name.startswith(("lifted_tensor_", "_tensor_constant")) else name


def _followed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], refused: BadModelError, *, train: bool) -> Capture:
    """Capture by running the model on its real values, after torch.export has refused it."""
    reason = refused.__cause__
    assert reason is not None
    try:
        with lines_recorded(True):
            found = follow(model, args, kwargs)
        names = {node: _own_name(name, train=train) for node, name in found.tensor_names.items()}
        constants = {_own_name(name, train=train): value for name, value in found.constants.items()}
    except UnsupportedOpError:
        raise
    except Exception as error:  # the user's forward may raise anything
        if type(error) is type(reason) and str(error) == str(reason):
            raise BadModelError(f"{_failure(model, reason)}. {_CHECK}") from error
        raise BadModelError(
            f"{_failure(model, reason)}. Following the path of the example inputs failed too: {type(error).__name__}: "
            f"{first_line(error)}{line_of_error(error)}. {_CHECK}"
        ) from error
    fixed = "All sizes are fixed to those of the example inputs, the batch size too"
    if found.asked:
        shown = ", ".join(found.asked[:3]) + (f" and {len(found.asked) - 3} more" if len(found.asked) > 3 else "")
        note = (
            f"Python control flow depends on tensor values at {shown}: followed the path that the example inputs take, and other inputs "
            f"will take the same one. {fixed}"
        )
    else:
        note = f"torch.export refused the model ({_reason(reason)}), so it was traced on its real values. {fixed}"
    notes = (note, *found.notes, *(found.lost if train else ()))
    return Capture(found.graph, names, constants, found.in_spec, found.out_spec, train, notes)


def check_inputs(
    model: nn.Module, args: tuple[Any, ...] | torch.Tensor, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Normalise example inputs; raise BadModelError for what can't be a model and its inputs."""
    if not isinstance(model, nn.Module):
        raise BadModelError(f"expected a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    if isinstance(args, torch.Tensor):
        raise BadModelError("args is a tensor; pass the example inputs as a tuple: args=(x,)")
    scripted = next((path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise BadModelError(f"module '{scripted or type(model).__name__}' is TorchScript: pass the Python module that it was made from")
    kwargs = dict(kwargs or {})
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise BadModelError("the example inputs hold no tensor: pass args=(x,) or kwargs={'name': x} as you would call the model")
    return tuple(args), kwargs


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, notes: list[str]
) -> tuple[torch.export.ExportedProgram, Inputs]:
    """The exported model and the inputs that it was exported with."""
    if dynamic_shapes is not None:
        return _export_once(model, args, kwargs, dynamic_shapes), (args, kwargs)
    wide_args, wide_kwargs = _at_least_two((args, kwargs))
    shapes = ShapesCollection()
    for leaf in pytree.tree_leaves((wide_args, wide_kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0:
            shapes[leaf] = {0: Dim.AUTO}
    try:
        return _export_once(model, wide_args, wide_kwargs, shapes), (wide_args, wide_kwargs)
    except BadModelError as error:
        exported = _export_once(model, args, kwargs, None)
        notes.append(f"captured with a fixed batch size, because a symbolic one failed: {first_line(error)}")
        return exported, (args, kwargs)


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
    with preserved(model), _quiet(), warnings.catch_warnings(), checkpoints_inlined(), shortcuts(), without_bookkeeping():
        warnings.simplefilter("ignore")  # about tracing; those of the model itself come when the user runs it
        try:
            with _named_inputs(model, args, kwargs):
                if isinstance(dynamic_shapes, ShapesCollection):
                    dynamic_shapes = dynamic_shapes.dynamic_shapes(model, args, kwargs)
                return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:  # the exporter raises whatever the user's own forward raises
            raise BadModelError(f"{_failure(model, error)}. {_CHECK}, and that no Python control flow depends on tensor values") from error


@contextlib.contextmanager
def _named_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """The exporter can't open sizes of what `forward` takes by `*args` and `**kwargs`: meanwhile each of these has a name."""
    signature = inspect.signature(model.forward)
    named = [one for parameter in signature.parameters.values() for one in _parameters(parameter, signature, args, kwargs)]
    if named == list(signature.parameters.values()):
        yield
        return
    forward, own = model.forward, "forward" in vars(model)

    def with_names(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    with_names.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    model.forward = with_names
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward


def _parameters(
    parameter: inspect.Parameter, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[inspect.Parameter]:
    """The parameter itself, or one for every input that it takes on this call."""
    if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return [parameter]
    given = signature.bind(*args, **kwargs).arguments.get(parameter.name)
    if not given:
        return [parameter]
    if parameter.kind is parameter.VAR_KEYWORD:
        return [inspect.Parameter(name, parameter.KEYWORD_ONLY) for name in given]
    names = [f"{parameter.name}_{place}" for place in range(len(given))]
    return [inspect.Parameter(name, parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names]


def _failure(model: nn.Module, error: BaseException) -> str:
    return f"{type(model).__name__} can't be captured by torch.export: {_reason(error)}"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}{line_of_error(error)}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A refused export prints its half-made graph and logs; what it means is said in our own error or note."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    before = [logger.disabled for logger in loggers]
    printed = io.StringIO()
    half_made = ""
    try:
        for logger in loggers:
            logger.disabled = True
        with contextlib.redirect_stderr(printed):
            yield
    except BadModelError as error:
        half_made = str(getattr(error.__cause__, "partial_fx_graph", ""))
        raise
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was
        sys.stderr.write(printed.getvalue().replace(half_made, "").lstrip() if half_made else printed.getvalue())
