"""The module that holds one tensor's quantizer parameters and applies it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from geta.errors import CheckpointError
from geta.quant import native_plan, native_reuse, ops
from geta.quant.bits import Bits, allowed_widths, nearest
from geta.quant.blocks import Blocks, Cutting
from geta.quant.native import is_eager
from geta.quant.sampling import is_sampled, sample_of
from geta.quant.surrogate import STE, Surrogate

Kind = Literal["weight", "activation"]


class Quantizer(nn.Module):
    """x_Q = d * round(c(x) / d) with learned step size d, range q_m and exponent t (`geta.quant.ops` has the formulas).

    name:    canonical name of what is quantized: `conv1.weight`, or `conv1:input` for the input of module `conv1`.
    kind:    "weight" or "activation".
    bits:    the bit widths that the tensor may end up with.
    q_m:     initial range, shape `[]` (per tensor), broadcasting against the tensor (per channel) or with one number per row and
             block of columns, above zero; d and t get its shape, device and dtype (at least float32).
    blocks:  how long the blocks of columns are (`geta.quant.blocks`); () where there are none.
    signed:  whether the codes are symmetric around zero; otherwise they start at zero.
    linear:  t stays 1 and isn't trained.
    initial_bits: bit width that the first d is computed from.
    enabled: set it to False to let tensors pass unchanged.
    strength: how much of the surrogate is used, `[]`, or None for all of it; set by `geta.quant.anneal`.
    keep_values: whether values may be kept between uses of the same tensor (`geta.quant.native_reuse`); True for weights only.
    sample:  what forward passes of training leave of their x (`geta.quant.sampling`), `[N]`, an empty one at first; None = nothing.

    Converting the model to float16 or bfloat16 leaves d, q_m and t in float32: with fewer digits the codes would miss their
    range. The signedness found in calibration is part of `state_dict()`.
    """

    d: nn.Parameter
    q_m: nn.Parameter
    t: nn.Parameter
    strength: Tensor | None
    sample: Tensor | None

    def __init__(
        self,
        name: str,
        kind: Kind,
        bits: Bits,
        q_m: Tensor,
        *,
        signed: bool = True,
        linear: bool = True,
        surrogate: Surrogate | None = None,
        initial_bits: int = 16,
        blocks: Blocks = (),
    ) -> None:
        super().__init__()
        self.name = name
        self.kind: Kind = kind
        self.bits = bits
        self.blocks = blocks
        self.signed = signed
        self.linear = linear
        self.surrogate: Surrogate = STE() if surrogate is None else surrogate
        self.enabled = True
        self.sample = None
        self._kept = native_reuse.KeptValues()
        self._keep_values = kind == "weight"
        self._planner = native_plan.Planner()
        self.register_buffer("strength", None, persistent=False)
        q_m = q_m.detach().to(torch.promote_types(q_m.dtype, torch.float32)).clamp(*ops.Q_M_DOMAIN)
        t = torch.ones_like(q_m)
        self.q_m = nn.Parameter(q_m)
        self.t = nn.Parameter(t, requires_grad=not linear)
        self.d = nn.Parameter(ops.step_size(initial_bits, q_m, t, signed))

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized x, in x's dtype; x itself when not `enabled`."""
        if not self.enabled:
            return x
        if self.sample is not None and is_sampled(x):
            self.sample = torch.cat([self.sample, sample_of(x)])
        d, q_m = self._parameters.get("d"), self._parameters.get("q_m")
        if self.blocks:
            return self._by_block(x)
        if self.linear and d is not None and q_m is not None and self.strength is None and is_eager(x, d, q_m):
            plan = self._planner.plan(x, d, q_m, self.surrogate, signed=self.signed, keeps=self._keep_values)
            if plan is not None:
                return native_plan.quantize(plan, x, d, q_m)
        tensors = (x, self.d, self.q_m, self.t)
        return self._plainly(*tensors) if native_reuse.is_plain(*tensors) else self._operator(*tensors)

    def _by_block(self, x: Tensor) -> Tensor:
        """The same for a matrix whose rows are cut into blocks: a matrix with one block per row, where nobody traces."""
        tensors = (x, self.d, self.q_m, self.t)
        if not native_reuse.is_plain(*tensors):
            return self._operator(*tensors)
        cut = Cutting.of(x.shape, self.d.shape, self.blocks)
        rows, d, q_m = cut.rows(x), cut.line(self.d), cut.line(self.q_m)
        if self.linear and self.strength is None:
            plan = self._planner.plan(rows, d, q_m, self.surrogate, signed=self.signed, keeps=self._keep_values)
            if plan is not None:
                return cut.back(native_plan.quantize(plan, rows, d, q_m))
        return cut.back(self._plainly(rows, d, q_m, cut.line(self.t)))

    def _plainly(self, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor) -> Tensor:
        settings = native_reuse.Settings(self.signed, self.linear, self.surrogate.coefficients, self.surrogate.kind)
        return native_reuse.fake_quantize((x, d, q_m, t), settings, self.strength, self._kept if self.keep_values else None)

    def _operator(self, *tensors: Tensor) -> Tensor:
        surrogate, blocks = surrogate_arguments(self.surrogate, self.strength), block_arguments(self.blocks)
        quantized: Tensor = torch.ops.geta.fake_quantize(*tensors, self.signed, self.linear, *surrogate, **blocks)
        return quantized

    @property
    def keep_values(self) -> bool:
        """Whether an unchanged weight's values may be kept for its next use, at the cost of as much memory as it takes."""
        return self._keep_values

    @keep_values.setter
    def keep_values(self, keep: bool) -> None:
        self._keep_values = keep
        self._kept.clear()

    def right_inverse(self, value: Tensor) -> Tensor:
        """What `torch.nn.utils.parametrize` stores when a user assigns `value` to the quantized tensor."""
        return value

    def codes(self, x: Tensor) -> Tensor:
        """The int32 codes of x: `codes(x) * d` equals `forward(x)`."""
        return ops.quantize_codes(x, self.d, self.q_m, self.t, self.signed, linear=self.linear, blocks=self.blocks)

    def bit_width(self) -> Tensor:
        """The bit width that d, q_m and t imply now, in bits; d's shape."""
        return ops.bit_width(self.d, self.q_m, self.t, self.signed)

    @torch.no_grad()
    def project_(self, lower_bits: float, upper_bits: float) -> None:
        """Clamp d, and only d, so that the bit width lies in [lower_bits, upper_bits] (GETA, partial projection)."""
        smallest = ops.step_size(upper_bits, self.q_m, self.t, self.signed)
        largest = ops.step_size(lower_bits, self.q_m, self.t, self.signed)
        self.d.copy_(torch.clamp(self.d, min=smallest, max=largest))

    @torch.no_grad()
    def round_bits_(self) -> Tensor:
        """Set d so that every bit width is the nearest one of `bits`; return these widths, int64, d's shape."""
        widths = nearest(self.bit_width(), allowed_widths([self.bits], self.d.device)[0])
        self.d.copy_(ops.step_size(widths, self.q_m, self.t, self.signed))
        return widths.to(torch.int64)

    def get_extra_state(self) -> Tensor:
        """A tensor [signed, linear, *blocks] rather than a dict, so that every state-dict file format can hold it."""
        return torch.tensor([self.signed, self.linear, *self.blocks], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over `signed`; raises CheckpointError when the saved quantizer was linear and this one isn't, or had other blocks."""
        values = state.tolist()
        signed, linear = (bool(value) for value in values[:2])
        check_blocks(self.name, tuple(values[2:]), self.blocks)
        if linear != self.linear:
            word = {True: "linear", False: "nonlinear"}
            raise CheckpointError(
                f"quantizer '{self.name}' was saved as {word[linear]} and is {word[self.linear]} here; "
                f"call quantize(nonlinear={not linear}) before loading"
            )
        self.signed = signed

    def extra_repr(self) -> str:
        sign = "signed" if self.signed else "unsigned"
        shape = "linear" if self.linear else "nonlinear"
        return f"{self.name}, {self.kind}, bits {self.bits}, {sign}, {shape}{blocks_in_words(self.blocks)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._kept.clear()
        self._planner.clear()
        return super()._apply(lambda tensor: keep_precision(tensor, fn(tensor)), recurse)  # type: ignore[no-untyped-call]


def surrogate_arguments(surrogate: Surrogate, strength: Tensor | None) -> tuple[Any, ...]:
    """The operators' trailing arguments, without those that have their default."""
    if strength is not None:
        return surrogate.coefficients, surrogate.kind, strength
    return (surrogate.coefficients,) if surrogate.kind == "fourier" else (surrogate.coefficients, surrogate.kind)


def block_arguments(blocks: Blocks) -> dict[str, Blocks]:
    """The operators' argument `blocks`, left out where it has its default."""
    return {"blocks": blocks} if blocks else {}


def blocks_in_words(blocks: Blocks) -> str:
    """For printing a quantizer."""
    if not blocks:
        return ""
    return f", blocks of {blocks[0]} columns" if len(blocks) == 1 else f", {len(blocks)} uneven blocks of columns"


def check_blocks(name: str, saved: Blocks, mine: Blocks) -> None:
    """Raise CheckpointError when a saved quantizer had other blocks of columns."""
    if saved != mine:
        raise CheckpointError(
            f"quantizer '{name}' was saved with blocks of columns {list(saved) or 'none'} and has {list(mine) or 'none'} here; "
            "call quantize with the same granularity and group_size before loading"
        )


def keep_precision(before: Tensor, after: Tensor) -> Tensor:
    narrower = after.is_floating_point() and after.dtype.itemsize < torch.float32.itemsize
    return before.to(after.device) if narrower else after
