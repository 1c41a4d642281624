"""Clamps and zero padding that stand between layers and quantizers, and may as well stand elsewhere.

Runtimes take a layer in integers where it is surrounded by quantizers and nothing stands in between. Exactly, in real numbers:

    Q(min(max(x, a), b)) = min(max(Q(x), Q(a)), Q(b))      rounding is monotone: a clamp may act on codes
    Q(pad(x)) = pad(Q(x))                                  a quantizer that has a zero leaves zeros alone
    conv(pad(x)) = conv with more padding(x)               where both ends of a dimension get equally many zeros
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from geta.graph.propagate import bind_arguments
from geta.quant.fixed_ops import has_no_zero
from geta.quant.results import CLAMPS, CONVOLUTIONS, PADS, RELU6

ACTIVATIONS = (torch.ops.geta.fake_quantize.default, torch.ops.geta.lsq_quantize.default)
"""The operators of quantizers that stay in a compact model."""


def arguments(node: fx.Node) -> dict[str, Any]:
    """An operator call's arguments by name."""
    return bind_arguments(node, lambda arg: arg)


def zero_padding(node: fx.Node) -> list[int] | None:
    """The amounts of a padding with zeros, last dimension first, each before and after; None for any other node."""
    bound = arguments(node) if node.target in PADS else {}
    amounts = bound.get("pad")
    if amounts is None or bound.get("mode", "constant") != "constant" or bound.get("value") not in (None, 0, 0.0):
        return None
    return [*amounts] if all(type(amount) is int for amount in amounts) else None


def _bounds(node: fx.Node) -> tuple[float, float] | None:
    """Between which numbers a clamp keeps its values; None for any other node, and where zero isn't among them or others see it happen."""
    if node.target not in CLAMPS:
        return None
    bound = arguments(node)
    low, high = (bound.get(f"{end}_val", bound.get(end)) for end in ("min", "max"))
    if node.target in RELU6:
        low, high = 0.0, 6.0
    low, high = (-torch.inf if low is None else low), (torch.inf if high is None else high)
    in_place = node.target._schema.is_mutable and len(bound["self"].users) > 1
    fits = all(isinstance(end, (int, float)) for end in (low, high)) and low <= 0 <= high and not in_place
    return (float(low), float(high)) if fits else None


@dataclass(frozen=True)
class Path:
    """What leads from a value to a quantizer.

    source: that value. low, high: clamps on the way. pads: amounts of every padding, in order. nodes: the clamps and paddings.
    """

    source: Any
    low: float = -torch.inf
    high: float = torch.inf
    pads: tuple[list[int], ...] = ()
    nodes: tuple[fx.Node, ...] = ()


def path_to(quantizer: fx.Node, *, pads: bool) -> Path:
    """The way back from a quantizer over clamps around zero, and paddings with zeros if wanted, that nobody else reads."""
    source, low, high = quantizer.args[0], -torch.inf, torch.inf
    passed: list[list[int]] = []
    nodes: list[fx.Node] = []
    while isinstance(source, fx.Node) and len(source.users) == 1:
        amounts, ends = zero_padding(source), _bounds(source)
        if amounts is not None and pads:
            passed.insert(0, amounts)
        elif ends is not None:
            low, high = max(low, ends[0]), min(high, ends[1])
        else:
            break
        nodes.append(source)
        source = arguments(source)["self"]
    return Path(source, low, high, tuple(passed), tuple(nodes))


def fold_padding(pad: fx.Node) -> bool:
    """Leave the padding to the convolutions that read its result, if all its readers are such and can; True if it is gone."""
    amounts = zero_padding(pad)
    if amounts is None:
        return False
    wanted: dict[fx.Node, list[int]] = {}
    for layer, source in _readers(pad):
        padding = _more(layer, source, amounts)
        if padding is None:
            return False
        wanted[layer] = padding
    for layer, padding in wanted.items():
        place = [argument.name for argument in layer.target._schema.arguments].index("padding")  # type: ignore[union-attr]
        if place < len(layer.args):
            layer.update_arg(place, padding)
        else:
            layer.update_kwarg("padding", padding)
    pad.replace_all_uses_with(arguments(pad)["self"])
    pad.graph.erase_node(pad)
    return True


def _readers(pad: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(reader, what it reads), looking through quantizers that leave zeros alone."""
    found = []
    for user in pad.users:
        if user.target in ACTIVATIONS and user.args[0] is pad and _has_zero(user):
            found += [(reader, user) for reader in user.users]
        else:
            found.append((user, pad))
    return found


def _has_zero(quantizer: fx.Node) -> bool:
    bound = arguments(quantizer)
    return quantizer.target is ACTIVATIONS[0] or not has_no_zero(int(bound["bits"]), int(bound["quant_min"]))


def _more(layer: fx.Node, source: fx.Node, amounts: list[int]) -> list[int] | None:
    """A convolution's padding with these amounts added; None where it isn't one of `source`, or they aren't the same on both ends."""
    if layer.target not in CONVOLUTIONS:
        return None
    bound = arguments(layer)
    weight, given = bound["weight"], bound.get("padding")
    others = [value for name, value in bound.items() if name != "input"]
    if bound["input"] is not source or source in others or bound.get("transposed") or not isinstance(given, (list, tuple)):
        return None
    spatial = len(given)
    before, after = amounts[0::2], amounts[1::2]
    if before != after or min(before, default=0) < 0 or any(before[spatial:]) or not isinstance(weight, fx.Node):
        return None
    missing = [0] * (spatial - len(before))
    return [int(own) + more for own, more in zip(given, [*missing, *reversed(before[:spatial])], strict=True)]
