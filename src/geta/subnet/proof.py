"""Prove that a smaller model computes what the zeroed one computes, in both modes, and find numbers to set where it doesn't yet."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from geta.graph.dependency import DependencyGraph
from geta.graph.names import canonical_name
from geta.graph.preserve import mode_of
from geta.quant.fixed import FixedQuantizer
from geta.quant.quantizer import Quantizer
from geta.subnet.attributes import Change, Sizes, applied
from geta.subnet.comparison import max_difference
from geta.subnet.removal import TOLERANCE
from geta.subnet.trials import Bench, type_and_line

TRAINING_TOLERANCE = 1e-3
"""Relative difference allowed in training mode, where BatchNorm divides by the deviation of a small batch."""


def bench_of(
    model: nn.Module,
    small: nn.Module,
    graph: DependencyGraph,
    sizes_near: Callable[[str], Sizes],
    renamed: Callable[[str], str | None] = str,
) -> Bench:
    """The zeroed model and the smaller one on the example inputs.

    Where one flipped rounding step may show (quantizers, half precision) the comparison is made in float64, on copies.
    sizes_near, renamed: as `Bench` has them.
    """
    example = graph.example
    inputs: tuple[Any, Any] = (example.args, dict(example.kwargs))
    narrow = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in [*model.parameters(), *model.buffers()])
    if narrow or any(isinstance(module, Quantizer | FixedQuantizer) for module in model.modules()):
        model, small = copy.deepcopy(model).double(), copy.deepcopy(small).double()
        inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    return Bench(model, small, inputs, sizes_near, TOLERANCE[torch.float32], renamed)


def trained_alike(model: nn.Module, small: nn.Module, graph: DependencyGraph) -> tuple[list[str], str]:
    """Run both in training mode: (notes, "") or ([], why not). Where dropout draws, only that it runs can be checked."""
    try:
        first, second = (_train_run(model, graph, seed) for seed in (0, 1))
    except Exception as error:  # noqa: BLE001 - a model that can't train on its example inputs is not compared there
        return [f"not compared in training mode, because the model itself fails there: {type_and_line(error)}"], ""
    try:
        found = _train_run(small, graph, 0)
    except Exception as error:  # noqa: BLE001 - whatever it raises is the reason
        return [], f"it fails in training mode: {type_and_line(error)}"
    if max_difference(first, second)[1] > 0:
        return [], ""
    gap = max_difference(first, found)[1]
    return [], "" if gap <= TRAINING_TOLERANCE else f"in training mode the output differs by {gap:.2g} of the largest value"


def shapes_without_quantizers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict as they would be without quantizers, which no configuration describes."""
    modules = model.named_modules(remove_duplicate=False)  # tied weights share a quantizer
    quantizers = tuple(f"{path}." for path, module in modules if isinstance(module, Quantizer | FixedQuantizer))
    stored = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(quantizers)}
    return {canonical_name(name): tuple(tensor.shape) for name, tensor in stored.items()}


def fitted(bench: Bench) -> tuple[list[Change], float, str]:
    """Attribute changes that make the outputs agree, if any are needed, and the difference that is left."""
    gap = _difference(bench)
    if gap <= bench.tolerance:
        return [], gap, ""
    found, problem = bench.search()
    if problem:
        return [], gap, problem
    with applied(bench.small, found):
        return found, bench.difference(), ""


def _difference(bench: Bench) -> float:
    try:
        return bench.difference()
    except Exception:  # noqa: BLE001 - the search that follows meets the same error and reports its place
        return torch.inf


@contextlib.contextmanager
def _buffers_as_before(model: nn.Module) -> Iterator[None]:
    owned = [(module, dict(module._buffers)) for module in model.modules()]  # a forward may put another tensor in a buffer's place
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, buffers in owned:
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _train_run(model: nn.Module, graph: DependencyGraph, seed: int) -> list[Any]:
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (graph.example.args, dict(graph.example.kwargs)))
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices), _buffers_as_before(model), mode_of(model, True), torch.no_grad():
        torch.manual_seed(seed)
        return pytree.tree_leaves(model(*args, **kwargs))
