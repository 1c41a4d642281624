"""`torch.ao.quantization`'s FakeQuantize modules keep their switches in tensors and ask for them in Python, which can't be traced.

For the time of a capture the switches become plain numbers with the values that they have. A module whose observer is off
becomes one fake-quantize operator; the fused module with its observer on stays the operator that it is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from geta.errors import BadModelError

_WITH_MASK = ("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "fake_quantize_per_tensor_affine_cachemask")
_PLAIN = ("_fake_quantize_learnable_per_tensor_affine", "_fake_quantize_learnable_per_channel_affine")
_SWITCHES = ("observer_enabled", "fake_quant_enabled")


@contextlib.contextmanager
def switches_as_numbers(model: nn.Module) -> Iterator[None]:
    """Replace the switches of FakeQuantize modules while the model is captured.

    Raises BadModelError for a module whose observer is on and decides in Python what to do with the values it sees.
    """
    with contextlib.ExitStack() as undo:
        undo.enter_context(_shapes_known())
        library = sys.modules.get("torch.ao.quantization.fake_quantize")
        if library is not None:
            for path, module in model.named_modules():
                if isinstance(module, library.FakeQuantize):
                    _switch(path, module, library, undo)
        yield


@contextlib.contextmanager
def _shapes_known() -> Iterator[None]:
    """For the time of a capture, say what PyTorch doesn't: the shapes that some fake quantizers give. Without them the batch size
    could not be left open.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        for name in (*_WITH_MASK, *_PLAIN, "fake_quantize_per_channel_affine_cachemask"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
                library.impl(name, _like_its_input if name in _PLAIN else _with_mask, "Meta")
        yield
    finally:
        library._destroy()


def _like_its_input(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(x)


def _with_mask(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


def _switch(path: str, module: nn.Module, library: Any, undo: contextlib.ExitStack) -> None:
    buffers = {name: module._buffers.get(name) for name in _SWITCHES}
    if any(buffer is None or buffer.is_meta for buffer in buffers.values()):
        return
    values = {name: int(buffer) for name, buffer in buffers.items() if buffer is not None}
    if values["observer_enabled"]:
        if isinstance(module, library.FusedMovingAvgObsFakeQuantize):
            return
        raise BadModelError(
            f"the range observer of '{path}' is on, and it decides in Python from the values that it sees: switch the observers off with "
            "model.apply(torch.ao.quantization.disable_observer) before the model is analysed"
        )
    undo.callback(module._buffers.update, dict(module._buffers))
    undo.callback(module._buffers.clear)  # then the update, so that they keep their order
    for name, value in values.items():
        undo.callback(module.__dict__.pop, name)
        del module._buffers[name]
        module.__dict__[name] = [value]
    if "forward" not in module.__dict__ and isinstance(module, library.FusedMovingAvgObsFakeQuantize):
        undo.callback(module.__dict__.pop, "forward")
        module.__dict__["forward"] = library.FakeQuantize.forward.__get__(module)
