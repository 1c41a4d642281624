"""Shapes of the commonest operators' results, found in one step while a model is captured.

With a symbolic batch size PyTorch finds the shape of, say, a hardswish by running its decomposition, a dozen operators each with
symbolic shapes of their own: 20 to 60 ms per call where one allocation of the same shape takes 0.3. These are the operators whose results
look like their input; they made up half of the time of capturing a convolutional network. Whatever isn't plain (complex or integer
tensors, shapes to be compared symbolically) goes PyTorch's own way, and so does everything where PyTorch lacks the table used here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from geta.graph.shortcut_sizes import BINARY, SCALAR, SIZES, broadcast, leads
from geta.graph.shortcut_views import VIEWS, Layout, all_same, is_contiguous

get_fast_op_impls: Callable[[], dict[Any, Any]] | None = None
with contextlib.suppress(ImportError):  # in another version of PyTorch, perhaps: captures are slower then, that is all
    from torch._decomp import decompositions
    from torch._subclasses.fake_impls import get_fast_op_impls
    from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

_aten = torch.ops.aten

Impl = Callable[..., Any]

_POINTWISE = (
    *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid", "mish", "relu", "selu", "silu"),
    *("softplus", "sigmoid", "tanh", "_softmax", "_log_softmax", "_safe_softmax"),
    *("abs", "clamp", "clamp_max", "clamp_min", "cos", "erf", "exp", "log", "neg", "reciprocal", "rsqrt", "sin", "sqrt"),
)
"""Operators whose floating-point result has the shape, strides and type of the first argument; with `_` behind it, it is that."""

_RECURRENT_LAYERS = ("one_layer_lstm", "one_layer_rnn")
"""PyTorch's decompositions of a recurrent layer in one direction, GRUs and both RNNs among them: a dozen operators for every time step."""

_LIKE_CONTIGUOUS = ("_softmax", "_log_softmax", "_safe_softmax")
"""Of these, those whose result is contiguous."""


@contextlib.contextmanager
def shortcuts() -> Iterator[None]:
    """Use them meanwhile; PyTorch's table is as before afterwards."""
    if get_fast_op_impls is None:
        yield
        return
    table = get_fast_op_impls()
    before = dict(table)
    table.update(_impls(before))
    layers = {name: getattr(decompositions, name) for name in _RECURRENT_LAYERS if hasattr(decompositions, name)}
    try:
        for name, layer in layers.items():
            setattr(decompositions, name, _one_step(layer))
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):  # remembering a result takes longer than finding it again
            yield
    finally:
        table.clear()
        table.update(before)
        for name, layer in layers.items():
            setattr(decompositions, name, layer)


def _one_step(layer: Impl) -> Impl:
    """The shapes of a recurrent layer's results from its first time step alone; x: [steps, batch, features]."""

    def impl(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, FakeTensor) or x.fake_mode.propagate_real_tensors:
            return layer(x, *args, **kwargs)
        output, last = layer(x[:1], *args, **kwargs)
        return output.expand(x.shape[0], *output.shape[1:]).contiguous(), last

    return impl


def _impls(theirs: dict[Any, Impl]) -> dict[Any, Impl]:
    found: dict[Any, Impl] = {operator: _view(operator, layout) for operator, layout in VIEWS.items()}
    found |= {operator: _contiguous(operator, sizes) for operator, sizes in SIZES.items()}
    found |= {operator: _binary(theirs[operator]) for operator in BINARY if operator in theirs}
    found |= {operator: _with_number(operator) for operator in SCALAR}
    found |= {_aten.clone.default: _clone, _aten.clamp.Tensor: _clamp}
    for name in _POINTWISE:
        operator = getattr(_aten, name, None)
        if operator is not None and "default" in operator.overloads():
            found[operator.default] = _same(operator.default, contiguous=name in _LIKE_CONTIGUOUS)
        in_place = getattr(_aten, f"{name}_", None)
        if in_place is not None and "default" in in_place.overloads():
            found[in_place.default] = _in_place(in_place.default)
    norms = (_aten._native_batch_norm_legit_no_training, _aten._native_batch_norm_legit, _aten.native_batch_norm)
    found |= {operator.default: _batch_norm(operator.default) for operator in norms}
    return found | {
        _aten.native_layer_norm.default: _layer_norm(_aten.native_layer_norm.default, moments=2),
        _aten._fused_rms_norm.default: _layer_norm(_aten._fused_rms_norm.default, moments=1),
    }


def _view(operator: Any, layout: Callable[..., Layout | list[Layout] | None]) -> Impl:
    def impl(mode: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        found = layout(x, *args, **kwargs) if isinstance(x, FakeTensor) and x.layout == torch.strided else None
        if found is None:
            return _slowly(mode, operator, (x, *args), kwargs)
        with in_kernel_invocation_manager(mode):  # where every device is the meta device
            views = [torch.as_strided(x, *one) for one in ([found] if isinstance(found, tuple) else found)]
        tensors = [FakeTensor(mode, one, x.device) for one in views]
        return tensors[0] if isinstance(found, tuple) else tensors

    return impl


def _contiguous(operator: Any, sizes: Callable[..., list[Any] | None]) -> Impl:
    def impl(mode: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [one for arg in args for one in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(one, torch.Tensor)]
        found = sizes(*args, **kwargs) if _of_one_kind(tensors) else None
        return _slowly(mode, operator, args, kwargs) if found is None else _new(mode, tuple(found), tensors[0])

    return impl


def _binary(theirs: Impl) -> Impl:
    def impl(mode: Any, x: Any, other: Any, **kwargs: Any) -> Any:
        if not _plain(x) or (isinstance(other, torch.Tensor) and not _of_one_kind([x, other])):
            return theirs(mode, x, other, **kwargs)
        if leads(x, other) and _certain(x):
            return _like(mode, x)
        found = broadcast(x, other)
        return theirs(mode, x, other, **kwargs) if found is None else _new(mode, tuple(found), x)

    return impl


def _with_number(operator: Any) -> Impl:
    def impl(mode: Any, x: Any, other: Any, **kwargs: Any) -> Any:
        usual = _plain(x) and not isinstance(other, torch.Tensor) and leads(x, other) and _certain(x)
        return _like(mode, x) if usual else _slowly(mode, operator, (x, other), kwargs)

    return impl


def _clone(mode: Any, x: Any, *, memory_format: Any = None) -> Any:
    if not _plain(x) or (memory_format is torch.channels_last and x.dim() != 4) or memory_format is torch.channels_last_3d:
        return _slowly(mode, _aten.clone.default, (x,), {"memory_format": memory_format})
    return _like(mode, x, memory_format or torch.preserve_format)


def _clamp(mode: Any, x: Any, *bounds: Any, **kwargs: Any) -> Any:
    """Between numbers that are tensors."""
    given = [bound for bound in (*bounds, *kwargs.values()) if bound is not None]
    if all(isinstance(bound, FakeTensor) and bound.dim() == 0 for bound in given) and _of_one_kind([x, *given]) and _certain(x):
        return _like(mode, x)
    return _slowly(mode, _aten.clamp.Tensor, (x, *bounds), kwargs)


def _same(operator: Any, *, contiguous: bool) -> Impl:
    def impl(mode: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        other_type = any(isinstance(arg, torch.dtype) or arg is True for arg in (*args, *kwargs.values()))
        if not _plain(x) or (contiguous and other_type) or not (contiguous or _certain(x)):
            return _slowly(mode, operator, (x, *args), kwargs)
        return _like(mode, x, torch.contiguous_format if contiguous else torch.preserve_format)

    return impl


def _in_place(operator: Any) -> Impl:
    def impl(mode: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return x if _plain(x) else _slowly(mode, operator, (x, *args), kwargs)

    return impl


def _batch_norm(operator: Any) -> Impl:
    def impl(mode: Any, x: Any, *others: Any) -> Any:
        given = [tensor for tensor in others[:4] if tensor is not None]  # weight, bias, running mean and variance
        usual = x.dim() > 1 and all(all_same(tensor.shape, (x.shape[1],)) for tensor in given)
        if not usual or not _of_one_type(x, given) or not _certain(x):
            return _slowly(mode, operator, (x, *others), {})
        training = len(others) > 6 and others[4]
        saved = x.shape[1] if training or x.device.type != "cpu" else 0  # kernels differ there
        return _like(mode, x), *(_new(mode, (saved,), x) for _ in range(2))

    return impl


def _layer_norm(operator: Any, moments: int) -> Impl:
    """moments: how many tensors of one number per row come after the result, and how many parameters there are."""

    def impl(mode: Any, x: Any, shape: Any, *others: Any) -> Any:
        given, first = [tensor for tensor in others[:moments] if tensor is not None], x.dim() - len(shape)  # weight and bias
        usual = 0 <= first < x.dim() and all(all_same(sizes, shape) for sizes in (x.shape[first:], *(tensor.shape for tensor in given)))
        if not usual or not _of_one_type(x, given):
            return _slowly(mode, operator, (x, shape, *others), {})
        rows = (*x.shape[:first], *(1 for _ in shape))
        return _like(mode, x, torch.contiguous_format), *(_new(mode, rows, x) for _ in range(moments))

    return impl


def _plain(x: Any) -> bool:
    return isinstance(x, FakeTensor) and x.is_floating_point() and x.layout == torch.strided


def _certain(x: Any) -> bool:
    """Whether strides like those of `x` can be told: kernels and allocations don't agree on dimensions with one element."""
    return is_contiguous(x) or 1 not in x.shape[1:]


def _of_one_kind(tensors: list[Any]) -> bool:
    first = tensors[0]
    return all(_plain(tensor) and tensor.dtype == first.dtype and tensor.device == first.device for tensor in tensors)


def _of_one_type(x: Any, others: list[Any]) -> bool:
    """Whether all are of the type that statistics are computed in as well."""
    return _of_one_kind([x, *others]) and x.dtype in (torch.float32, torch.float64)


def _like(mode: Any, x: Any, layout: torch.memory_format = torch.preserve_format) -> Any:
    if layout is torch.contiguous_format or (layout is torch.preserve_format and is_contiguous(x)):
        return _new(mode, x.shape, x)
    with in_kernel_invocation_manager(mode):
        empty = torch.empty_like(x, memory_format=layout, device="meta", requires_grad=False)
    return FakeTensor(mode, empty, x.device)


def _new(mode: Any, sizes: tuple[Any, ...], x: Any) -> Any:
    return FakeTensor(mode, torch.empty(sizes, dtype=x.dtype, device="meta"), x.device)


def _slowly(mode: Any, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """PyTorch's own way."""
    assert get_fast_op_impls is not None
    table = get_fast_op_impls()
    ours = table.pop(operator)
    try:
        with mode:
            return operator(*args, **kwargs)
    finally:
        table[operator] = ours
