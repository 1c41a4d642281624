"""Calls of operators on fake tensors with a symbolic batch, with and without the shortcuts of `geta.graph.shortcuts`."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from geta.graph.shortcuts import shortcuts


def described(found) -> list[tuple]:
    tensors = found if isinstance(found, (tuple, list)) else (found,)
    return [(str(t.shape), str(t.stride()), t.dtype, t.device, t.requires_grad, t.storage_offset()) for t in tensors]


def outcome(operator, x: Tensor, *args):
    """What a fake call on a symbolic batch gives, or the type of its error."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (x.dim() - 1)])
    fake = mode.from_tensor(x, symbolic_context=context)
    others = [mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args]
    with mode:
        try:
            return described(operator(fake, *others))
        except Exception as error:  # noqa: BLE001 - whatever PyTorch raises has to be raised with the shortcuts too
            return type(error)


def both(operator, x: Tensor, *args):
    slow = outcome(operator, x, *args)
    with shortcuts():
        return outcome(operator, x, *args), slow
