"""Compare what two networks compute, in a precision in which the comparison means something."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from geta.graph.rules.registry import operator_name

if TYPE_CHECKING:
    from geta.subnet.model import CompactModel

_SINGLE_ONLY = (
    "aten::fake_quantize_",
    "aten::_fake_quantize_learnable_",
    "quantized_decomposed::",
    "aten::fused_moving_avg_obs_fake_quant",
)
_ROUNDING = (*_SINGLE_ONLY, "geta::fake_quantize", "geta::lsq_quantize", "aten::round", "torchao::quantize_affine")


def max_difference(expected: list[Any], found: list[Any]) -> tuple[float, float]:
    """(max |a - b|, max over tensors of max |a - b| / max |a|) over matching outputs.

    The scale of a tensor is taken as at least a thousandth of the largest output's, so that an output that is nothing but
    rounding noise doesn't decide. Infinite when shapes differ or only one side is finite; equal infinities and NaNs agree.
    Integer and boolean outputs must be equal: their difference counts in full.
    """
    pairs = [(a.detach(), b.detach()) for a, b in zip(expected, found, strict=True) if isinstance(a, torch.Tensor)]
    if any(a.shape != b.shape for a, b in pairs):
        return math.inf, math.inf
    pairs = [(a, b) for a, b in pairs if a.numel()]
    scales = [float(a[a.isfinite()].abs().double().max()) if bool(a.isfinite().any()) else 0.0 for a, _ in pairs]
    largest = max(scales, default=0.0)
    worst, relative = 0.0, 0.0
    for (a, b), scale in zip(pairs, scales, strict=True):
        gap = _gap(a, b)
        worst = max(worst, gap)
        size = max(scale, 1e-3 * largest)
        relative = max(relative, (gap / size if size else math.inf) if gap else 0.0)
    return worst, relative


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a.double() - b.double()).abs())
    return float(gap.max()) if bool(gap.isfinite().all()) else math.inf


def needs_float64(model: CompactModel) -> bool:
    """A fake-quantized network in float32 may differ from its equal by a whole rounding step, a half-precision one by more."""
    narrow = (torch.float16, torch.bfloat16)
    nodes = model.programs["eval"].graph.nodes
    rounds = any(_name(node).startswith(_ROUNDING) or any(dtype in narrow for dtype in _dtypes(node)) for node in nodes)
    return rounds or bool(model.info.bits) or any(tensor.dtype in narrow for tensor in model.tensors().values())


def _dtypes(node: fx.Node) -> list[torch.dtype]:
    """The dtypes that a call writes down."""
    return [leaf for leaf in pytree.tree_leaves((node.args, dict(node.kwargs))) if isinstance(leaf, torch.dtype)]


def outputs(model: CompactModel, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, double: bool) -> list[Any]:
    """A compact model's evaluation outputs as a flat list; double: with everything that is floating point widened to float64."""
    if double:
        model = widened(model)
        args, kwargs = pytree.tree_map_only(torch.Tensor, _wide, (args, dict(kwargs)))
    with torch.no_grad(), _default_dtype(torch.float64 if double else torch.get_default_dtype()):
        return pytree.tree_leaves(model.evaluate(*args, **kwargs))


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Whatever comes of integers alone (a byte divided by 255) has the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def widened(model: CompactModel) -> CompactModel:
    """The evaluation half of a compact model in float64; dtypes that its graph writes down included."""
    return model.rebuilt({"eval": _widened_graph(model.programs["eval"].graph)}, {n: _wide(t) for n, t in model.tensors().items()})


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.detach().to(torch.complex128)
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


def _widened_graph(graph: fx.Graph) -> fx.Graph:
    wide = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if _name(node).startswith(_SINGLE_ONLY):
            args, kwargs = pytree.tree_map_only(fx.Node, lambda n: mapping[n], (node.args, dict(node.kwargs)))
            mapping[node] = wide.call_function(_in_single, (node.target, *args), kwargs)
            continue
        mapping[node] = wide.node_copy(node, lambda n: mapping[n])
        mapping[node].args = pytree.tree_map_only(torch.dtype, _wide_dtype, mapping[node].args)
        mapping[node].kwargs = pytree.tree_map_only(torch.dtype, _wide_dtype, mapping[node].kwargs)
    return wide


def _in_single(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a quantizer that takes nothing but float32 between two casts: of equal numbers it makes equal numbers."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs))
    return pytree.tree_map_only(torch.Tensor, _wide, operator(*args, **kwargs))


def _name(node: fx.Node) -> str:
    return operator_name(node.target) if node.op == "call_function" else ""


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype in (torch.float32, torch.float16, torch.bfloat16) else dtype
