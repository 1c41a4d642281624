"""When is a whole tensor of the graph exactly zero? Laws of operators, one for each rule of coupling that has one.

A *law* lists alternatives: the result is zero if all tensors of one alternative are. `x w + b` is zero if w and b are, or x and b;
`a * b` if a is or b is; `sigmoid(x)` never. Alternatives stand in the order in which a search for what to zero should try them: a
weight before what it is multiplied with, and a norm's scale before what it normalises, which no scaling changes.

Source: zero-preservation of `geta.graph.rules`, for whole tensors instead of single units. An operator that isn't here has no law.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from geta.graph.propagate import bind_arguments
from geta.graph.rules import contraction, data_movement, elementwise, factories, normalization, quantizers, reduction
from geta.graph.rules.registry import find_rule

Law = tuple[tuple[fx.Node, ...], ...]
"""Alternatives; () = never zero, ((),) = always."""
Arguments = Mapping[str, Any]
NEVER: Law = ()
Described = Callable[[Arguments], Law]
_LAWS: dict[Any, Described] = {}


def law(node: fx.Node) -> Law:
    """When the result of a call is zero; NEVER where nothing is known."""
    if not isinstance(node.target, torch._ops.OpOverload):
        first = node.args[0] if node.args else None
        return ((first,),) if isinstance(first, fx.Node) and is_tensor(first) else NEVER  # getitem
    described = _LAWS.get(find_rule(node.target))
    return NEVER if described is None else described(bind_arguments(node, lambda arg: arg))


def has_pole(node: fx.Node) -> tuple[fx.Node, ...]:
    """Operands that must not be zero: the logarithm's, a divisor."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return ()
    rule, given = find_rule(node.target), bind_arguments(node, lambda arg: arg)
    if rule is elementwise.poles:
        return _tensors(given.get("self"))
    if rule is elementwise.quotients:
        return _tensors(given["other"])
    if rule is elementwise.powers and not (isinstance(given["exponent"], int | float) and given["exponent"] >= 0):
        return _tensors(given["self"])
    return ()


def is_contraction(node: fx.Node) -> bool:
    """Whether the call sums products of two tensors: a layer, if one of them is a parameter."""
    return isinstance(node.target, torch._ops.OpOverload) and find_rule(node.target) in _CONTRACTIONS


def is_tensor(node: fx.Node) -> bool:
    """Whether a node is a tensor or several; sizes and numbers aren't."""
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def _law(*rules: Any) -> Callable[[Described], Described]:
    def register(function: Described) -> Described:
        _LAWS.update(dict.fromkeys(rules, function))
        return function

    return register


def _tensors(*values: Any) -> tuple[fx.Node, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, fx.Node) and is_tensor(leaf))


def _with(base: tuple[fx.Node, ...], *options: Any) -> Law:
    """Everything in `base` and one of the options."""
    return tuple((*base, option) for option in options if isinstance(option, fx.Node))


@_law(
    elementwise.keeps_zero,
    data_movement.moves,
    data_movement.moves_as,
    data_movement.shuffles,
    data_movement.repeat_interleave,
    data_movement.roll,
    data_movement.splits,
    data_movement.slices,
    data_movement.windows,
    data_movement.columns,
    data_movement.glu,
    factories.expands,
    reduction.statistics,
    reduction.sums,
    reduction.pooling,
    reduction.index,
    reduction.index_select,
    reduction.gather,
)
def _first(given: Arguments) -> Law:
    """f(0) = 0 in the first operand, whatever the others are."""
    return (_tensors(list(given.values()))[:1],)


@_law(data_movement.cat, data_movement.stack, elementwise.three_operands)
def _all(given: Arguments) -> Law:
    return (_tensors(list(given.values())),)


@_law(data_movement.pad)
def _pad(given: Arguments) -> Law:
    """What is added at the ends is zero too, or taken from the operand."""
    return _first(given) if not given.get("value") else NEVER


@_law(elementwise.sums)
def _sum(given: Arguments) -> Law:
    numbers = [number for number in (given["self"], given["other"]) if not isinstance(number, fx.Node)]
    return NEVER if any(number != 0 for number in numbers) else (_tensors(given["self"], given["other"]),)


@_law(elementwise.products)
def _product(given: Arguments) -> Law:
    """A scale behind a normalisation first; else what is scaled, so that layers count and not their scale."""
    pair = _tensors(given["self"], given["other"])
    return tuple((one,) for one in sorted(pair, key=lambda one: (_is_normalised(one), _is_parameter(one))))


def _is_normalised(node: fx.Node) -> bool:
    """Whether a tensor was divided by something computed from it, as a written-out RMSNorm does, so that scaling changes nothing."""
    while isinstance(node.target, torch._ops.OpOverload) and find_rule(node.target) is elementwise.keeps_zero:
        node = node.all_input_nodes[0]
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    rule = find_rule(node.target)
    if rule is elementwise.products:
        return any(find_rule(one.target) is elementwise.poles for one in node.all_input_nodes)
    return rule is elementwise.quotients and len(_tensors(node.args[1:2])) == 1


@_law(elementwise.quotients)
def _quotient(given: Arguments) -> Law:
    return _with((), given["self"])


@_law(elementwise.powers)
def _power(given: Arguments) -> Law:
    exponent = given["exponent"]
    return _with((), given["self"]) if isinstance(exponent, int | float) and exponent > 0 else NEVER


@_law(elementwise.clamps)
def _clamp(given: Arguments) -> Law:
    low = given.get("min_val", given.get("min"))
    high = given.get("max_val", given.get("max"))
    if isinstance(low, fx.Node) or isinstance(high, fx.Node):
        return NEVER
    return _with((), given["self"]) if (low is None or low <= 0) and (high is None or high >= 0) else NEVER


@_law(elementwise.threshold)
def _threshold(given: Arguments) -> Law:
    return _with((), given["self"]) if given["value"] == 0 or given["threshold"] < 0 else NEVER


@_law(elementwise.where)
def _where(given: Arguments) -> Law:
    branches = [given.get("self"), given.get("other")]
    if any(branch is None or (not isinstance(branch, fx.Node) and branch != 0) for branch in branches):
        return NEVER
    return (_tensors(*branches),)


@_law(elementwise.masked_fill)
def _masked_fill(given: Arguments) -> Law:
    return _with((), given["self"]) if not isinstance(given["value"], fx.Node) and given["value"] == 0 else NEVER


@_law(elementwise.prelu)
def _prelu(given: Arguments) -> Law:
    return _with((), given["self"])


@_law(elementwise.copy)
def _copy(given: Arguments) -> Law:
    return _with((), given["src"])


@_law(contraction.linear, contraction.convolution, contraction.conv_transpose)
def _layer(given: Arguments) -> Law:
    return _with(_tensors(given.get("bias")), given["weight"], given["input"])


@_law(contraction.matmul, contraction.einsum)
def _matmul(given: Arguments) -> Law:
    """Parameters first: of two activations (attention) the second, which is the value."""
    pair = _tensors(list(given.values()))
    return tuple((one,) for one in sorted(pair, key=lambda one: (not _is_parameter(one), -pair.index(one))))


@_law(contraction.grouped_matmul)
def _grouped(given: Arguments) -> Law:
    return tuple((one,) for one in reversed(_tensors(list(given.values()))[:2]))


def _is_parameter(node: fx.Node) -> bool:
    """A placeholder, perhaps behind operators of a single operand (a transposition, a quantizer)."""
    while node.op == "call_function" and len(_tensors(list(node.args))) >= 1 and not is_contraction(node):
        node = _tensors(list(node.args))[0]
    return node.op == "placeholder"


@_law(contraction.addmm)
def _addmm(given: Arguments) -> Law:
    added, left, right = _tensors(list(given.values()))
    return _with((added,), *sorted((right, left), key=lambda one: not _is_parameter(one)))


@_law(contraction.attention)
def _attention(given: Arguments) -> Law:
    return _with((), given["value"])


@_law(normalization.batch_norm)
def _batch_norm(given: Arguments) -> Law:
    """(0 - mean) / sigma isn't zero, so its own two numbers per channel have to be."""
    return _with(_tensors(given.get("bias")), given.get("weight"))


@_law(normalization.group_norm, normalization.layer_norm)
def _norm(given: Arguments) -> Law:
    return _with(_tensors(given.get("bias")), given.get("weight"), given["input"])


@_law(quantizers.fake_quantize, quantizers.dequantize)
def _quantizer(given: Arguments) -> Law:
    return _first(given)


@_law(quantizers.lsq_quantize)
def _lsq(given: Arguments) -> Law:
    """The binary one has no zero."""
    return NEVER if given["bits"] == 1 and given["quant_min"] < 0 else _with((), given["x"])


@_law(quantizers.fake_quantize_affine)
def _affine(given: Arguments) -> Law:
    """A zero point that is an integer maps zero to zero."""
    point = given.get("zero_point", given.get("zero_points"))
    whole = not isinstance(point, fx.Node) or not point.meta["val"].is_floating_point()
    return _first(given) if whole else NEVER


_CONTRACTIONS = (
    contraction.linear,
    contraction.convolution,
    contraction.conv_transpose,
    contraction.matmul,
    contraction.einsum,
    contraction.grouped_matmul,
    contraction.addmm,
)
