"""The second way to capture a model: follow the path that the example inputs take through Python control flow.

The model runs on copies of its real tensors and every operator is written down. What Python asks of a tensor (`if`, `.item()`,
`.tolist()`, `.numpy()`) is answered with its value, and the line that asked is remembered for the note.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from geta.errors import BadModelError
from geta.graph.backward import checkpoints_inlined, notes_of
from geta.graph.measure import described, fake_like
from geta.graph.names import canonical_name
from geta.graph.places import line_now
from geta.graph.regions import clean, resolve_modes

_METHODS = "__bool__ __int__ __float__ __index__ __complex__ __contains__ __array__ item tolist numpy is_nonzero".split()
_INDEXED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_REFUSAL = "trying to get value out of a tracing tensor"
_ASKS = (*(getattr(torch.Tensor, name) for name in _METHODS), torch.equal, torch.allclose, torch.is_nonzero)


@dataclass(frozen=True)
class Followed:
    """graph: as in Capture, with fixed sizes. asked: lines of the user's code that looked at values.

    notes: about the graph. lost: what training with it would not do as the model does, see backward.notes_of.
    """

    graph: fx.Graph
    tensor_names: dict[str, str]
    constants: dict[str, torch.Tensor]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    asked: list[str]
    notes: list[str]
    lost: list[str]


class _Answers(TorchFunctionMode):
    """Lets Python look at values without the tracer noticing."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _INDEXED:  # an index that is a tensor of one number is read by PyTorch itself
            args = (args[0], self._numbers(args[1]), *args[2:])
        if func not in _ASKS:
            try:
                return func(*args, **(kwargs or {}))
            except RuntimeError as error:
                if _REFUSAL not in str(error):
                    raise
            return func(*self._numbers(args), **self._numbers(kwargs or {}))  # a size that is a tensor of one number
        self.asked[line_now()] = None
        with _disable_current_modes():
            return func(*args, **(kwargs or {}))

    def _numbers(self, index: Any) -> Any:
        """The same index or size with its 0-dimensional integer tensors as Python numbers."""
        if isinstance(index, (tuple, list)):
            return type(index)(self._numbers(item) for item in index)
        if isinstance(index, dict):
            return {name: self._numbers(item) for name, item in index.items()}
        whole = isinstance(index, torch.Tensor) and index.dim() == 0 and not (index.is_floating_point() or index.dtype == torch.bool)
        if not whole:
            return index
        self.asked[line_now()] = None
        with _disable_current_modes():
            return int(index)


def follow(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Followed:
    """Trace the model on real values. It runs on copies of its tensors, so that they stay as they are.

    Raises whatever the model's forward raises on these inputs, BadModelError when there are no values (meta device).
    """
    own = [*model.named_parameters(), *model.named_buffers()]
    state = {name: tensor.detach().clone().requires_grad_(tensor.requires_grad) for name, tensor in own}
    leaves, in_spec = pytree.tree_flatten((args, dict(kwargs)))
    inputs = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(tensor.is_meta for tensor in (*state.values(), *inputs)):
        raise BadModelError("there are no values to follow: the model or its inputs are on the meta device")
    answers = _Answers()
    results: list[Any] = []

    def run(values: list[torch.Tensor], given: list[torch.Tensor]) -> list[torch.Tensor]:
        rest = iter(given)
        filled = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        own_args, own_kwargs = pytree.tree_unflatten(filled, in_spec)
        with answers, _paths_noted(model):
            results.append(torch.func.functional_call(model, dict(zip(state, values, strict=True)), own_args, own_kwargs))
        return [leaf for leaf in pytree.tree_leaves(results[0]) if isinstance(leaf, torch.Tensor)]

    eager = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng(), eager, torch.enable_grad(), warnings.catch_warnings(), checkpoints_inlined() as used:
        warnings.simplefilter("ignore")  # about tracing; those of the model itself come when the user runs it
        traced = make_fx(run, tracing_mode="real", pre_dispatch=True)(list(state.values()), inputs)
    notes: list[str] = []
    clean(traced, notes)
    resolve_modes(traced.graph, notes)
    out_leaves, out_spec = pytree.tree_flatten(results[0])
    graph, names, constants = _assembled(traced, list(state), leaves, out_leaves)
    return Followed(graph, names, constants, in_spec, out_spec, list(answers.asked), notes, [*used, *notes_of(results[0])])


@contextlib.contextmanager
def _paths_noted(model: nn.Module) -> Iterator[None]:
    """Write the user's module path into every traced operator."""
    stack: list[tuple[str, type]] = []

    def mark() -> None:
        mode = get_proxy_mode()
        assert mode is not None
        entries = {str(depth): entry for depth, entry in enumerate(stack)}
        for node in reversed(mode.tracer.graph.nodes):
            if node.meta.get("nn_module_stack") is not None:
                break
            node.meta["nn_module_stack"] = entries

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: Any) -> None:
            mark()
            stack.append((path, type(module)))

        return hook

    def leave(_module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        mark()
        stack.pop()

    hooks: list[Any] = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(path), prepend=True))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _assembled(
    traced: fx.GraphModule, state: list[str], leaves: list[Any], out_leaves: list[Any]
) -> tuple[fx.Graph, dict[str, str], dict[str, torch.Tensor]]:
    """The traced operators between placeholders for tensors, constants and all inputs, as torch.export arranges them."""
    graph, mode = fx.Graph(), FakeTensorMode()
    names: dict[str, str] = {}
    constants: dict[str, torch.Tensor] = {}
    mapping: dict[fx.Node, fx.Node] = {}
    given = iter(traced.graph.find_nodes(op="placeholder"))
    for place, name in enumerate(state):
        new = mapping[next(given)] = graph.placeholder(f"tensor_{place}")
        names[new.name] = canonical_name(name)
    for place, old in enumerate(traced.graph.find_nodes(op="get_attr")):
        new = mapping[old] = graph.placeholder(f"constant_{place}")
        names[new.name] = str(old.target)
        old.meta["val"] = constants[str(old.target)] = getattr(traced, str(old.target)).detach()
    for place, leaf in enumerate(leaves):
        new = graph.placeholder(f"input_{place}")
        if isinstance(leaf, torch.Tensor):
            mapping[next(given)] = new
        else:
            new.meta["val"] = leaf
    results: list[Any] = []
    for old in traced.graph.nodes:
        if old.op == "call_function":
            mapping[old] = graph.node_copy(old, lambda n: mapping[n])
            # where(mask) and its like return lists and carry no tag
            if torch.Tag.dynamic_output_shape in getattr(old.target, "tags", ()) or isinstance(old.meta["val"], (tuple, list)):
                mapping[old].meta["example"] = described(old.meta["val"])
        elif old.op == "output":
            found = iter(old.args[0])
            results = [mapping[next(found)] if isinstance(leaf, torch.Tensor) else leaf for leaf in out_leaves]
    for old, new in mapping.items():
        new.meta["val"] = fake_like(mode, old.meta["val"])
    graph.output(tuple(results))
    return graph, names, constants
