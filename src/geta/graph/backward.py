"""What a training graph can't take over from the user's model: hand-written backward functions, and checkpointing."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction

from geta.graph.places import first_line, is_user_file

CHECKPOINTS = "the training graph keeps all activations: torch.utils.checkpoint is no part of it (gradients are the same)"


@contextlib.contextmanager
def checkpoints_inlined() -> Iterator[list[str]]:
    """Let reentrant checkpoints call their function directly; yields a list that gets a note when one does.

    Its own implementation runs the function without gradients, which a trace would take at its word.
    """
    used: list[str] = []

    def direct(function: Callable[..., Any], _preserve_rng_state: bool, *args: Any) -> Any:
        used[:] = [CHECKPOINTS]
        return function(*args)

    CheckpointFunction.apply = staticmethod(direct)  # type: ignore[method-assign]
    try:
        yield used
    finally:
        del CheckpointFunction.apply  # what it inherits comes back


def backward_notes(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Run the model once on fake tensors, and say which `torch.autograd.Function`s its results went through."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        eager = torch.compiler.set_stance("force_eager")
        with mode, warnings.catch_warnings(), torch.enable_grad(), eager, checkpoints_inlined() as used:
            warnings.simplefilter("ignore")  # the capture has shown them already
            state: dict[str, torch.Tensor] = {
                name: mode.from_tensor(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            }
            fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, dict(kwargs)))
            results = torch.func.functional_call(model, state, fake_args, fake_kwargs)
    except Exception as error:  # noqa: BLE001 - the user's forward may refuse fake tensors in any way
        return [f"whether forward uses torch.autograd.Function could not be found out: {type(error).__name__}: {first_line(error)}"]
    return [*used, *notes_of(results)]


def notes_of(results: Any) -> list[str]:
    """The same for results that have been computed already."""
    notes = []
    for function in _functions(results):
        code = function.forward.__code__
        if is_user_file(code.co_filename):  # what torch makes for operators with a registered gradient is kept in the graph
            notes.append(
                f"the hand-written backward of {function.__name__} ({code.co_filename}:{code.co_firstlineno}) is no part of the training "
                "graph, which has the gradients of its forward; make it a custom operator with register_autograd to keep it"
            )
    return notes


def _functions(results: Any) -> list[Any]:
    waiting: list[Any] = [leaf.grad_fn for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]
    seen: set[Any] = set()
    found: dict[Any, None] = {}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            found[getattr(node, "_forward_cls")] = None  # noqa: B009 - torch's annotations lack it
        waiting += [following for following, _ in node.next_functions]
    return sorted(found, key=lambda function: (function.__module__, function.__qualname__))
