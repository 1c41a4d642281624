"""The linear fake quantizer in one pass over memory: a compiled C library on CPUs, Triton kernels on CUDA devices.

Values are bitwise those of the operators in `geta.quant.ops`, and so is dx with the straight-through estimator; sums differ from
theirs by rounding, and don't depend on the number of threads. Whatever isn't covered returns None, and the caller takes the
operators: the nonlinear quantizer, parameters that vary along several dimensions, per-channel parameters along a dimension with
fewer than 8 elements inside, tensors that aren't dense, tensor subclasses and tracing.

Tensors are seen as [outer][channels][inner] in memory, with one `d` and one `q_m` per channel. Half types are computed in float32.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geta.quant.native_build import NativeStatus, build_and_load

_SHORTEST_ROW = 8
_ELEMENTS_PER_THREAD = 32_768
_KINDS = {torch.float32: "f32", torch.float64: "f64"}
_HALF_TYPES = (torch.float16, torch.bfloat16)
_BLOCK = 4096

_lock = threading.Lock()
_loaded: tuple[ctypes.CDLL | None, NativeStatus] | None = None


class Layout(NamedTuple):
    """How parameters lie along a tensor in memory."""

    outer: int
    channels: int
    inner: int


def native_status() -> NativeStatus:
    """Which kernels quantize tensors on the CPU; compiles them if that hasn't happened yet."""
    return _library()[1]


def _library() -> tuple[ctypes.CDLL | None, NativeStatus]:
    global _loaded  # noqa: PLW0603 - one library per process
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = build_and_load()
    return _loaded


def is_eager(*tensors: Tensor) -> bool:
    """Whether these are real tensors that nobody traces, transforms or intercepts."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch):  # a tracer above autograd
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator would cost more than all the rest
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
    return True


def layout_of(x: Tensor, d: Tensor, q_m: Tensor) -> Layout | None:
    """How d and q_m lie along x, or None when the kernels don't know that case."""
    if max(d.dim(), q_m.dim()) > x.dim() or not x.numel():
        return None
    if d.numel() == 1 and q_m.numel() == 1:
        return Layout(1, 1, x.numel()) if is_dense(x) else None
    wide = [dim for dim, size in enumerate(d.shape) if size != 1]
    if d.shape != q_m.shape or len(wide) != 1:
        return None
    dim = wide[0] + x.dim() - d.dim()
    inner = math.prod(x.shape[dim + 1 :])
    if x.shape[dim] != d.numel() or inner < _SHORTEST_ROW:
        return None
    ordered = is_dense(x) if dim == 0 else x.is_contiguous()
    return Layout(math.prod(x.shape[:dim]), d.numel(), inner) if ordered else None


def is_dense(x: Tensor) -> bool:
    """Whether x fills its memory without gaps in one of the usual orders, dimension 0 being the outermost."""
    if x.is_contiguous():
        return True
    dim = x.dim()
    return (dim == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        dim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def quantize(x: Tensor, d: Tensor, q_m: Tensor, t: Tensor, *, signed: bool) -> Tensor | None:
    """x_Q of the linear quantizer, or None when no kernel fits."""
    if not is_eager(x, d, q_m):
        return None
    layout, dtype = layout_of(x, d, q_m), _computing_dtype(x, d, q_m, t)
    if layout is None or dtype is None:
        return None
    if x.is_cuda:
        cuda = _cuda_kernels(x)
        return None if cuda is None else cuda.quantize(x, d, q_m, layout, signed=signed)
    library = _library_for(x, d, q_m)
    if library is None:
        return None
    wide, step, top = x.to(dtype), d.to(dtype).contiguous(), q_m.to(dtype).contiguous()
    out = torch.empty_like(wide)
    kernel = getattr(library, f"geta_forward_{_KINDS[dtype]}")
    kernel(wide.data_ptr(), step.data_ptr(), top.data_ptr(), out.data_ptr(), *layout, signed, _threads(x))
    if x.dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        out.clamp_(-largest, largest)
    return out.to(x.dtype)


def gradients(
    grad: Tensor, x: Tensor, d: Tensor, q_m: Tensor, t: Tensor, *, amplitudes: Sequence[float], strength: Tensor | None, signed: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(dx, dd, dq_m) of the linear quantizer with the "fourier" surrogate, or None when no kernel fits."""
    if not is_eager(grad, x, d, q_m):
        return None
    layout, dtype = layout_of(x, d, q_m), _computing_dtype(x, d, q_m, t)
    if layout is None or dtype is None:
        return None
    if x.is_cuda:
        cuda = _cuda_kernels(x)
        return None if cuda is None else cuda.gradients(grad, x, d, q_m, layout, amplitudes=amplitudes, strength=strength, signed=signed)
    library = _library_for(grad, x, d, q_m)
    if library is None:
        return None
    wide, step, top = x.to(dtype), d.to(dtype).contiguous(), q_m.to(dtype).contiguous()
    grad = like(grad.to(dtype), wide)
    dx, dd, dq_m = torch.empty_like(wide), torch.empty_like(step), torch.empty_like(top)
    partial = torch.empty(2 * library.geta_blocks(*layout), dtype=torch.float64)
    scale = math.sqrt(2.0) * math.pi * (1.0 if strength is None else float(strength))
    harmonics = len(amplitudes) if any(amplitudes) else 0
    kernel = getattr(library, f"geta_backward_{_KINDS[dtype]}")
    kernel(
        *(tensor.data_ptr() for tensor in (grad, wide, step, top, dx, dd, dq_m, partial)),
        *layout,
        (ctypes.c_double * max(1, harmonics))(*(scale * a_k for a_k in amplitudes[:harmonics])),
        harmonics,
        signed,
        _threads(x),
    )
    return dx.to(x.dtype), dd.to(d.dtype), dq_m.to(q_m.dtype)


def fingerprint(*tensors: Tensor) -> tuple[int, ...] | None:
    """A hash of each tensor's contents, which changes with any element; None for tensors that the library cannot read."""
    library = _library_for(*tensors)
    if library is None:
        return None
    found = []
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if size % 4 or not is_dense(tensor):
            return None
        partial = torch.empty(size // (4 * _BLOCK) + 1, dtype=torch.int64)
        found.append(int(library.geta_hash(tensor.data_ptr(), size // 4, partial.data_ptr(), _threads(tensor))))
    return tuple(found)


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` with the strides of x, which has its shape and dtype."""
    if tensor.stride() == x.stride() or (tensor.is_contiguous() and x.is_contiguous()):
        return tensor
    return torch.empty_like(x).copy_(tensor)


def _computing_dtype(x: Tensor, *parameters: Tensor) -> torch.dtype | None:
    """float64 for float64, float32 for narrower types; None when parameters are wider than x."""
    if x.dtype == torch.float64:
        return torch.float64
    if (x.dtype == torch.float32 or x.dtype in _HALF_TYPES) and all(p.dtype != torch.float64 for p in parameters):
        return torch.float32
    return None


def _library_for(*tensors: Tensor) -> ctypes.CDLL | None:
    if any(tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_neg() for tensor in tensors):
        return None
    return _library()[0]


def _threads(x: Tensor) -> int:
    if not native_status().threads:
        return 1
    return min(torch.get_num_threads(), max(1, x.numel() // _ELEMENTS_PER_THREAD))


def _cuda_kernels(x: Tensor) -> Any:
    """The Triton kernels if they are installed and right on x's device, else None."""
    if importlib.util.find_spec("triton") is None:
        return None
    from geta.quant import triton_kernels

    return triton_kernels if triton_kernels.is_right_on(x.device) else None
