"""Quantizers with a fixed bit width: a learned scale, integer bounds, no bit width to learn (LSQ, ternary, binary)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geta.errors import BadModelError, CheckpointError, ConfigError
from geta.quant import fixed_ops, ops
from geta.quant.blocks import Blocks
from geta.quant.quantizer import Kind, block_arguments, blocks_in_words, check_blocks, keep_precision, surrogate_arguments
from geta.quant.surrogate import STE, Surrogate

TERNARY = 1.58
WIDEST = 8


@dataclass(frozen=True)
class FixedBits:
    """A bit width that doesn't change: `geta.quantize(model, weights=geta.FixedBits(2))`.

        bits       integers, signed               never negative (activations, found in calibration)
        2 .. 8     -2^(bits-1) .. 2^(bits-1)-1    0 .. 2^bits - 1
        1.58       -1, 0, 1                       0, 1, 2                ternary; stored in 2 bits
        1          -1, 1 (no zero)                0, 1                   binary

    Raises ConfigError for any other bits. The scale of the integers is learned by whatever optimizer trains the model; give it no
    weight decay. Source: LSQ (arXiv 1902.08153).
    """

    bits: float

    def __post_init__(self) -> None:
        whole = type(self.bits) is int and 1 <= self.bits <= WIDEST
        if not whole and not (type(self.bits) is float and self.bits == TERNARY):
            raise ConfigError(
                f"FixedBits({self.bits!r}) is impossible; use a whole number from 2 to {WIDEST}, 1 (binary) or 1.58 (ternary)"
            )

    @property
    def width(self) -> int:
        """Whole bits that one integer takes; this is what costs count."""
        return math.ceil(self.bits)

    def bounds(self, *, signed: bool) -> tuple[int, int]:
        """The smallest and the largest integer."""
        if self.bits == TERNARY:
            return (-1, 1) if signed else (0, 2)
        if self.bits == 1:
            return (-1, 1) if signed else (0, 1)
        return (-(1 << (self.width - 1)), (1 << (self.width - 1)) - 1) if signed else (0, (1 << self.width) - 1)

    def initial_scale(self, mean_magnitude: Tensor, *, signed: bool) -> Tensor:
        """2 * mean|x| / sqrt(quant_max), LSQ's start; mean|x| for the binary quantizer, which is then the nearest to x."""
        if self.bits == 1 and signed:
            return mean_magnitude
        return mean_magnitude * (2.0 / math.sqrt(self.bounds(signed=signed)[1]))


class FixedQuantizer(nn.Module):
    """x_Q = scale * codes(x) with a learned scale and fixed bounds (`geta.quant.fixed_ops` has the formulas).

    name:    canonical name of what is quantized: `conv1.weight`, or `conv1:input` for the input of module `conv1`.
    kind:    "weight" or "activation".
    bits:    how many integers there are.
    scale:   initial scale, shape `[]` (per tensor), broadcasting against the tensor (per channel) or with one number per row and
             block of columns, above zero; the parameter gets its shape, device and dtype (at least float32).
    blocks:  how long the blocks of columns are (`geta.quant.blocks`); () where there are none.
    signed:  whether there are negative integers.
    enabled: set it to False to let tensors pass unchanged.
    strength: how much of the surrogate is used, `[]`, or None for all of it; set by `geta.quant.anneal`.

    Converting the model to float16 or bfloat16 leaves the scale in float32. Signedness and bits are part of `state_dict()`.
    """

    scale: nn.Parameter
    strength: Tensor | None

    def __init__(
        self,
        name: str,
        kind: Kind,
        bits: FixedBits,
        scale: Tensor,
        *,
        signed: bool = True,
        surrogate: Surrogate | None = None,
        blocks: Blocks = (),
    ) -> None:
        super().__init__()
        self.name = name
        self.blocks = blocks
        self.kind: Kind = kind
        self.bits = bits
        self.signed = signed
        self.surrogate: Surrogate = STE() if surrogate is None else surrogate
        self.enabled = True
        self.register_buffer("strength", None, persistent=False)
        self.scale = nn.Parameter(scale.detach().to(torch.promote_types(scale.dtype, torch.float32)).clamp(*ops.D_DOMAIN))

    @property
    def levels(self) -> tuple[int, int, int]:
        """(width in bits, smallest, largest integer), as the operators take them."""
        return (self.bits.width, *self.bits.bounds(signed=self.signed))

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized x, in x's dtype; x itself when not `enabled`."""
        if not self.enabled:
            return x
        surrogate = surrogate_arguments(self.surrogate, self.strength)
        quantized: Tensor = torch.ops.geta.lsq_quantize(x, self.scale, *self.levels, *surrogate, **block_arguments(self.blocks))
        return quantized

    def right_inverse(self, value: Tensor) -> Tensor:
        """What `torch.nn.utils.parametrize` stores when a user assigns `value` to the quantized tensor."""
        return value

    def codes(self, x: Tensor) -> Tensor:
        """The int32 codes of x: `codes(x) * scale` equals `forward(x)`."""
        return fixed_ops.lsq_codes(x, self.scale, *self.levels, blocks=self.blocks)

    def get_extra_state(self) -> Tensor:
        """A tensor [signed, width, smallest, largest, *blocks] rather than a dict, so that every state-dict file format can hold it."""
        return torch.tensor([self.signed, *self.levels, *self.blocks], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over `signed`; raises CheckpointError when the saved quantizer had another number of levels or other blocks."""
        signed, *levels = state.tolist()
        check_blocks(self.name, tuple(levels[3:]), self.blocks)
        levels = levels[:3]
        mine = [self.bits.width, *self.bits.bounds(signed=bool(signed))]
        if levels != mine:
            raise CheckpointError(
                f"quantizer '{self.name}' was saved with the integers {levels[1]} to {levels[2]} and has {mine[1]} to {mine[2]} here; "
                "call quantize with the same FixedBits before loading"
            )
        self.signed = bool(signed)

    def extra_repr(self) -> str:
        _, smallest, largest = self.levels
        return f"{self.name}, {self.kind}, {self.bits.bits} bits, {smallest} to {largest}{blocks_in_words(self.blocks)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: keep_precision(tensor, fn(tensor)), recurse)  # type: ignore[no-untyped-call]


def fixed_quantizers(model: nn.Module) -> dict[str, FixedQuantizer]:
    """All quantizers of fixed bit width of `model` in module order, keyed by their `name`: `conv1.weight`, `conv1:input`.

    Raises BadModelError when two different quantizers have one name (a quantized layer was copied inside the model).
    """
    found: dict[str, FixedQuantizer] = {}
    for path, module in model.named_modules():
        if isinstance(module, FixedQuantizer):
            if module.name in found:
                raise BadModelError(
                    f"two quantizers are called '{module.name}' (the second is '{path}'): a quantized layer was copied inside the "
                    "model; build the whole model first and quantize it afterwards"
                )
            found[module.name] = module
    return found
