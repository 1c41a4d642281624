"""What the shortcuts say of a result is what PyTorch says without them: shape, strides, type, device."""

from __future__ import annotations

import itertools

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_impls import get_fast_op_impls
from torch.nn.attention import SDPBackend, sdpa_kernel

from fake_calls import both, described
from geta.graph import shortcuts as module
from geta.graph.capture import capture
from geta.graph.shortcuts import shortcuts

_aten = torch.ops.aten
_ARGUMENTS = {
    "_softmax": (-1, False),
    "_log_softmax": (1, False),
    "_safe_softmax": (-1,),
    "clamp": (-1, 2.5),
    "clamp_max": (0.5,),
    "clamp_min": (0,),
}


def inputs() -> dict[str, Tensor]:
    x = torch.randn(3, 4, 5, 6)
    return {
        "contiguous": x,
        "channels last": x.to(memory_format=torch.channels_last),
        "permuted": x.permute(0, 2, 3, 1),
        "with gaps": torch.randn(3, 8, 5, 6)[:, ::2],
        "expanded": torch.randn(3, 4, 1, 6).expand(3, 4, 5, 6),
        "bfloat16": x.bfloat16(),
        "double": x.double(),
        "meta": x.to("meta"),
        "offset": torch.randn(4, 4, 5, 6)[1:],
        "one channel": torch.randn(3, 5, 1, 6).transpose(1, 2),
        "one of many": torch.randn(3, 4, 5, 6)[:, :1],
    }


@pytest.mark.parametrize("name", module._POINTWISE)
@pytest.mark.parametrize("kind", inputs())
def test_pointwise(name, kind):
    x = inputs()[kind]
    for leaf in (name, f"{name}_"):
        packet = getattr(_aten, leaf, None)
        if packet is None or "default" not in packet.overloads():
            continue
        if leaf.endswith("_") and kind == "expanded":
            continue  # can't be written to
        fast, slow = both(packet.default, x, *_ARGUMENTS.get(name, ()))
        assert fast == slow


@pytest.mark.parametrize("x", [torch.arange(6).reshape(2, 3), torch.randn(2, 3, dtype=torch.complex64)], ids=["integers", "complex"])
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "relu", "hardtanh"])
def test_other_types_go_the_slow_way(name, x):
    fast, slow = both(getattr(_aten, name).default, x)
    assert fast == slow


def test_softmax_into_another_type():
    fast, slow = both(_aten._safe_softmax.default, torch.randn(2, 3), -1, torch.float64)
    assert fast == slow
    assert fast[0][2] == torch.float64


@pytest.mark.parametrize("kind", inputs())
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16])
def test_norms(kind, affine, other):
    x = inputs()[kind]
    channels, last = (torch.ones(size, dtype=other, device=x.device) for size in (x.shape[1], x.shape[-1]))
    weight, bias = (channels, channels.clone()) if affine else (None, None)
    statistics = (channels.clone(), channels.clone())
    fast, slow = both(_aten._native_batch_norm_legit_no_training.default, x, weight, bias, *statistics, 0.1, 1e-5)
    assert fast == slow
    for operator in (_aten._native_batch_norm_legit.default, _aten.native_batch_norm.default):
        for training in (True, False):
            fast, slow = both(operator, x, weight, bias, *statistics, training, 0.1, 1e-5)
            assert fast == slow
    fast, slow = both(_aten.native_batch_norm.default, x, weight, bias, None, None, True, 0.1, 1e-5)
    assert fast == slow
    weight, bias = (last, last.clone()) if affine else (None, None)
    fast, slow = both(_aten.native_layer_norm.default, x, [x.shape[-1]], weight, bias, 1e-5)
    assert fast == slow
    for eps in (1e-5, None):
        fast, slow = both(_aten._fused_rms_norm.default, x, [x.shape[-1]], weight, eps)
        assert fast == slow


@pytest.mark.parametrize("size", [3, 7])
def test_a_wrong_size_is_refused_as_ever(size):
    x, wrong = torch.randn(2, 4), torch.ones(size)
    fast, slow = both(_aten.native_layer_norm.default, x, [4], wrong, wrong, 1e-5)
    assert fast == slow
    assert isinstance(fast, type)


@pytest.mark.parametrize("kind", inputs())
def test_clamping_between_tensors(kind):
    x = inputs()[kind]
    low, high = torch.zeros((), dtype=x.dtype, device=x.device), torch.ones((), dtype=x.dtype, device=x.device)
    for bounds in ((low, high), (low,), (None, high), (low.double(), high.double()), (low.expand(6), high), (low.new_zeros(5, 1), None)):
        fast, slow = both(_aten.clamp.Tensor, x, *bounds)
        assert fast == slow


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(nn.LSTM, {}), (nn.LSTM, {"proj_size": 2}), (nn.GRU, {}), (nn.RNN, {"nonlinearity": "relu"}), (nn.RNN, {})],
    ids=["lstm", "projected", "gru", "relu", "tanh"],
)
def test_recurrent_layers(kind, options, device):
    shapes = ({}, {"num_layers": 2, "batch_first": True, "bidirectional": True}, {"bias": False, "bidirectional": True})
    for shape in shapes:
        layer, x = kind(3, 4, device=device, **shape, **options), torch.randn(5, 3, 3, device=device)

        def call(x, layer=layer):
            output, last = layer(x)
            return [output, *(last if isinstance(last, tuple) else (last,))]

        fast, slow = both(call, x)
        assert fast == slow
        assert isinstance(fast, list) or (kind, device) == (nn.LSTM, "cpu")  # PyTorch's kernel there refuses weights that aren't fake


def test_real_recurrent_layers_compute_as_ever():
    module, x = nn.GRU(3, 4), torch.randn(5, 6, 3)
    expected, _ = torch._decomp.decompositions.gru_impl(x, torch.zeros(1, 6, 4), [*module.parameters()], True, 1, 0.0, False, False, False)
    with shortcuts():
        again, _ = torch._decomp.decompositions.gru_impl(x, torch.zeros(1, 6, 4), [*module.parameters()], True, 1, 0.0, False, False, False)
    assert torch.equal(again, expected)


def test_the_table_is_as_before():
    before, layer = dict(get_fast_op_impls()), torch._decomp.decompositions.one_layer_lstm
    with shortcuts():
        assert len(get_fast_op_impls()) > len(before)
        assert torch._decomp.decompositions.one_layer_lstm is not layer
    assert get_fast_op_impls() == before
    assert torch._decomp.decompositions.one_layer_lstm is layer


def test_without_the_table(monkeypatch):
    monkeypatch.setattr(module, "get_fast_op_impls", None)
    with shortcuts():
        pass


def test_a_capture_is_the_same_without():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 8, 1), nn.ReLU6(inplace=True), nn.Flatten(2), nn.LayerNorm(36)
    )
    model.append(nn.TransformerEncoderLayer(36, 2, 16, batch_first=True))

    def nodes(patched: bool, train: bool) -> list:
        with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
            if not patched:
                patch.setattr(module, "get_fast_op_impls", None)
            found = capture(model, (torch.randn(2, 3, 8, 8),), train=train)
        for number, node in enumerate(found.graph.nodes):  # names count nodes that were dropped again
            node.name = f"n{number}"
        values = [node.meta.get("val") for node in found.graph.nodes]
        return [
            (node.format_node(), layout(value) if isinstance(value, Tensor) else None)
            for node, value in zip(found.graph.nodes, values, strict=True)
        ]

    def layout(value: Tensor) -> tuple:
        """As `described`, but strides at several batch sizes: PyTorch's own are sometimes written as Min(36, 36*s31)."""

        def at(stride: int | torch.SymInt, batch: int) -> int:
            expression = sympy.Integer(stride) if isinstance(stride, int) else stride.node.expr
            return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))

        ((shape, _, *others),) = described(value)
        return shape, [[at(stride, batch) for stride in value.stride()] for batch in (2, 3, 8)], *others

    for train in (False, True):
        assert nodes(True, train) == nodes(False, train)


def test_every_operator_of_the_list_is_one():
    known = [name for name in module._POINTWISE if hasattr(_aten, name) or hasattr(_aten, f"{name}_")]
    assert sorted(known) == sorted(module._POINTWISE)
    assert len(set(itertools.chain(module._POINTWISE))) == len(module._POINTWISE)
