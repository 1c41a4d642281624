"""The quantizer outside of traces: an autograd node without a dispatcher round trip, and values of weights that are kept.

A weight's quantized values need not be computed again while the weight and the parameters stay as they are: between the optimizer
steps of gradient accumulation, and in evaluation. Version counters cannot decide that: changes through `.data`, through shared
memory and by PyTorch's fused optimizers don't count. So contents decide, by a hash over every element of the weight, the parameters and
the kept values themselves, which costs a fraction of quantizing them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geta.quant import native, ops

_WORTHWHILE = 3
_LARGE = 32 * 2**20
"""Bytes from which the C library's allocator asks the system for new pages each time, which then cost more than the quantization."""
_SMALL = 4096
_PLAIN_DEVICES = ("cpu", "cuda")


class Settings(NamedTuple):
    """What a quantizer's operator takes besides tensors."""

    signed: bool
    linear: bool
    coefficients: tuple[float, ...]
    kind: str


class KeptValues:
    """The last quantized values of one weight, handed out again as long as that gives the same bits as computing them.

    They are kept from the third use of an unchanged weight on; once a weight had that many uses before it changed, from the first:
    a training loop that changes weights in every step pays nothing and keeps nothing. Only weights are kept for which a hash is
    clearly cheaper than the values: large ones, and those of nonlinear quantizers, which take powers.

    Handed out are fresh tensors over the kept memory, and only while nobody else holds such a tensor, so that changing one in
    place never changes another; the next use then finds the hash changed and computes anew.

    Needs the compiled kernels and a dense weight on the CPU; without them nothing is kept. Copies and pickles start empty.
    """

    __slots__ = ("_kept", "_previous_uses", "_stamp", "_uses")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Give the memory back."""
        self._kept: tuple[Tensor, tuple[int, ...]] | None = None
        self._stamp: tuple[Any, ...] = ()
        self._uses = self._previous_uses = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptValues:
        return KeptValues()

    def __reduce__(self) -> tuple[type[KeptValues], tuple[()]]:
        return KeptValues, ()

    @property
    def holds_memory(self) -> bool:
        """Whether values are kept at the moment."""
        return self._kept is not None

    def values(self, compute: Callable[[], Tensor], tensors: tuple[Tensor, ...], signed: bool) -> Tensor:
        """`compute()` of these tensors (the weight and its parameters), or its kept result."""
        if any(tensor.is_inference() or tensor.device.type != "cpu" for tensor in tensors):
            self.clear()
            return compute()
        self._count(tensors, signed)
        kept = self._kept
        if kept is not None and _holders(kept[0]) == _holders_of_a_lone_tensor():
            if native.fingerprint(*tensors, kept[0]) == kept[1]:
                return kept[0].detach()
            self._kept = kept = None
        result = compute()
        if kept is None and (self._uses >= _WORTHWHILE or self._previous_uses >= _WORTHWHILE):
            prints = native.fingerprint(*tensors, result)
            self._kept = None if prints is None else (result.detach(), prints)
        return result

    def _count(self, tensors: tuple[Tensor, ...], signed: bool) -> None:
        """Count the uses of the same tensors; a new version of one of them ends the count and releases what was kept."""
        identities = tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors)
        stamp = (*identities, tensors[0].shape, tensors[0].stride(), signed, torch.is_inference_mode_enabled())
        if stamp != self._stamp:
            self._kept = None
            self._stamp, self._previous_uses, self._uses = stamp, self._uses, 0
        self._uses += 1


def _holders(tensor: Tensor) -> int:
    """How many tensors and saved variables share this tensor's memory, plus a constant."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


def _holders_of_a_lone_tensor() -> int:
    return _holders(torch.empty(1))


class _FakeQuantize(torch.autograd.Function):
    """`geta::fake_quantize` as a node whose values come from `values()`."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes arguments by position
        ctx: Any, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor, strength: Tensor | None, values: Callable[[], Tensor], settings: Settings
    ) -> Tensor:
        ctx.save_for_backward(x, d, q_m, t, strength)
        ctx.settings = settings
        return values()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, strength = ctx.saved_tensors
        plain = not torch.is_grad_enabled() and native.is_eager(grad, *tensors)
        kernel: Callable[..., tuple[Tensor, ...]] = ops.fake_quantize_gradients if plain else torch.ops.geta.fake_quantize_backward
        return (*kernel(grad, *tensors, *ctx.settings, strength), None, None, None)


def is_worth_keeping(x: Tensor, *, linear: bool) -> bool:
    """Whether hashing x and its quantized values is clearly cheaper than quantizing it."""
    return x.numel() * x.element_size() >= _LARGE if linear else x.numel() >= _SMALL


def is_plain(*tensors: Tensor) -> bool:
    """Whether `fake_quantize` may stand in for the operator `geta::fake_quantize`."""
    return native.is_eager(*tensors) and tensors[0].device.type in _PLAIN_DEVICES


def fake_quantize(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], settings: Settings, strength: Tensor | None, kept: KeptValues | None
) -> Tensor:
    """`geta::fake_quantize` of plain tensors (x, d, q_m, t); a weight's values may be kept in `kept`."""
    ops._check_kind(settings.kind)

    def compute() -> Tensor:
        return ops.fake_quantize_values(*tensors, settings.signed, settings.linear, settings.coefficients)

    def values() -> Tensor:
        if kept is None or not is_worth_keeping(tensors[0], linear=settings.linear):
            return compute()
        return kept.values(compute, tensors[:3] if settings.linear else tensors, settings.signed)

    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        quantized: Tensor = _FakeQuantize.apply(*tensors, strength, values, settings)  # type: ignore[no-untyped-call]
        return quantized
    return values()
