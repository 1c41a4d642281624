"""Records that torch.export keeps and nobody reads: they are left out while a model is captured.

A fifth of the time of a capture went into them: a description of every result's memory layout ("tensor_meta", found with symbolic
arithmetic) beside the result itself, and the Python code of the graph after each pass over it, though none of it is run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule
from torch.fx.experimental import proxy_tensor
from torch.fx.graph import CodeGen


def _nothing(_: Any) -> None:
    """In place of a description."""


@contextlib.contextmanager
def without_bookkeeping() -> Iterator[None]:
    """Graph modules that are made meanwhile get their code when they are first run."""
    compiled = GraphModule.recompile

    def later(module: GraphModule) -> Any:
        if type(module.graph._codegen) is not CodeGen:  # it sets more than code
            return compiled(module)

        def forward(self: GraphModule, *args: Any, **kwargs: Any) -> Any:
            compiled(self)
            return self.forward(*args, **kwargs)

        type(module).forward = forward  # every graph module has a class of its own
        return None

    replaced = [(GraphModule, "recompile", later), (proxy_tensor, "_extract_tensor_metadata", _nothing)]
    # another version of PyTorch perhaps lacks one of them
    before = [(owner, name, getattr(owner, name), ours) for owner, name, ours in replaced if hasattr(owner, name)]
    for owner, name, _, ours in before:
        setattr(owner, name, ours)
    try:
        yield
    finally:
        for owner, name, theirs, _ in before:
            setattr(owner, name, theirs)
