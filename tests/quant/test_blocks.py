"""One scale per block of columns: operators against a reference that takes each block alone, and how such quantizers get into a model."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import geta
from geta.errors import BadModelError, CheckpointError, ConfigError
from geta.quant import DGE, DSQ, STE, FixedBits, Fourier, Surrogate, fixed_quantizers, native, quantize, quantizers
from geta.quant.blocks import Cutting, block_of_column, blocks_of, shortest_form, widths_of
from geta.quant.fixed import FixedQuantizer
from geta.quant.quantizer import Quantizer

SURROGATES: list[Surrogate] = [STE(), Fourier((0.21,)), DSQ(0.2), DGE(5.0, 3.0)]
BLOCKS = {"even": (8,), "with a shorter one": (16,), "uneven": (3, 20, 1, 16)}
ROWS, COLUMNS = 5, 40
WEIGHT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
GRADIENT = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


def pieces(table: Tensor, widths: list[int]) -> list[tuple[slice, Tensor]]:
    """(columns, one number per row) of every block."""
    ends = torch.tensor(widths).cumsum(0).tolist()
    return [(slice(end - width, end), table[:, place : place + 1]) for place, (width, end) in enumerate(zip(widths, ends, strict=True))]


def parameters(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    d = torch.rand(ROWS, count, generator=generator) * 0.2 + 0.05
    return d, torch.rand(ROWS, count, generator=generator) + 0.7, torch.rand(ROWS, count, generator=generator) * 0.6 + 0.7


def differentiated(inputs: list[Tensor], compute) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = compute(*leaves)
    value.backward(GRADIENT)
    return [value.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("linear", [True, False])
def test_learned_quantizers_equal_one_quantizer_per_block(surrogate: Surrogate, linear: bool, blocks: tuple[int, ...]) -> None:
    widths = widths_of(blocks, COLUMNS)
    settings = (True, linear, surrogate.coefficients, surrogate.kind)

    def reference(x: Tensor, *tables: Tensor) -> Tensor:
        parts = zip(*[pieces(table, widths) for table in tables], strict=True)
        return torch.cat([torch.ops.geta.fake_quantize(x[:, part[0][0]], *(one for _, one in part), *settings) for part in parts], 1)

    def blockwise(turned: bool, *tensors: Tensor) -> Tensor:
        given = [tensor.t() for tensor in tensors] if turned else tensors
        found: Tensor = torch.ops.geta.fake_quantize(*given, *settings, blocks=blocks)
        return found.t() if turned else found

    inputs = [WEIGHT, *parameters(len(widths))]
    wanted, *expected = differentiated(inputs, reference)
    for turned in (False, True):
        value, *gradients = differentiated(inputs, partial(blockwise, turned))
        assert torch.equal(value, wanted)
        torch.testing.assert_close(gradients[0], expected[0], rtol=1e-5, atol=1e-6)
        for found, right in zip(gradients[1:], expected[1:], strict=True):
            assert found.shape == (ROWS, len(widths))
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("bits", [1, 1.58, 2, 3, 4])
def test_fixed_quantizers_equal_one_quantizer_per_block(bits: float, surrogate: Surrogate, blocks: tuple[int, ...]) -> None:
    widths, fixed = widths_of(blocks, COLUMNS), FixedBits(bits)
    settings = (fixed.width, *fixed.bounds(signed=True), surrogate.coefficients, surrogate.kind)

    def reference(x: Tensor, table: Tensor) -> Tensor:
        return torch.cat([torch.ops.geta.lsq_quantize(x[:, columns], scale, *settings) for columns, scale in pieces(table, widths)], 1)

    def blockwise(turned: bool, *tensors: Tensor) -> Tensor:
        given = [tensor.t() for tensor in tensors] if turned else tensors
        found: Tensor = torch.ops.geta.lsq_quantize(*given, *settings, blocks=blocks)
        return found.t() if turned else found

    inputs = [WEIGHT, parameters(len(widths))[0] * 4]
    wanted, dx_wanted, dscale_wanted = differentiated(inputs, reference)
    for turned in (False, True):
        value, dx, dscale = differentiated(inputs, partial(blockwise, turned))
        assert torch.equal(value, wanted)
        torch.testing.assert_close(dx, dx_wanted, rtol=1e-5, atol=1e-6)  # powers and cosh of the last few in a row may round otherwise
        torch.testing.assert_close(dscale, dscale_wanted, rtol=1e-4, atol=1e-5)  # 1 / sqrt(n) with the block's own n


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("compiled", [True, False])
def test_modules_equal_their_operator_and_codes(blocks: tuple[int, ...], compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(native, "_loaded", (None, native.native_status()))
    count = len(widths_of(blocks, COLUMNS))
    d, q_m, _ = parameters(count)
    learned = Quantizer("w", "weight", geta.Bits(4, 8), q_m, initial_bits=4, blocks=blocks)
    fixed = FixedQuantizer("w", "weight", FixedBits(3), d * 4, blocks=blocks)
    operator = torch.ops.geta.fake_quantize(WEIGHT, learned.d, learned.q_m, learned.t, True, True, (), blocks=blocks)
    assert torch.equal(learned(WEIGHT), operator)
    for quantizer, table in ((learned, learned.d), (fixed, fixed.scale)):
        codes = quantizer.codes(WEIGHT)
        assert codes.dtype == torch.int32
        spread = table[:, torch.from_numpy(block_of_column(blocks, COLUMNS))]
        assert torch.equal(codes * spread, quantizer(WEIGHT))
        assert torch.equal(torch.ops.geta.dequantize(codes, table, 4, blocks=blocks), quantizer(WEIGHT))
    x, y = (WEIGHT.clone().requires_grad_() for _ in range(2))
    learned(x).backward(GRADIENT)
    torch.ops.geta.fake_quantize(y, learned.d.detach(), learned.q_m.detach(), learned.t, True, True, (), blocks=blocks).backward(GRADIENT)
    assert torch.equal(x.grad, y.grad)
    assert learned.d.grad.shape == (ROWS, count)


def test_dequantize_has_a_gradient_to_scales() -> None:
    codes, blocks = torch.randint(-8, 8, (ROWS, COLUMNS)), (16,)
    scale = parameters(3)[0].requires_grad_()
    torch.ops.geta.dequantize(codes, scale, 4, blocks=blocks).backward(GRADIENT)
    sums = [(GRADIENT * codes)[:, columns].sum(1) for columns, _ in pieces(scale, widths_of(blocks, COLUMNS))]
    torch.testing.assert_close(scale.grad, torch.stack(sums, 1))


def test_forms_of_blocks() -> None:
    assert [widths_of(blocks, 40) for blocks in ((), (16,), (20, 20), (1, 39))] == [[40], [16, 16, 8], [20, 20], [1, 39]]
    assert [shortest_form(widths) for widths in ([40], [16, 16, 8], [8, 16], [5, 5], [3, 2, 3])] == [(), (16,), (8, 16), (5,), (3, 2, 3)]
    assert [blocks_of(size, 16) for size in (8, 16, 17)] == [(), (), (16,)]
    assert Cutting.of((4, 6), (4, 2), (3,)).axis == 1
    assert Cutting.of((6, 4), (2, 4), (3,)).axis == 0
    with pytest.raises(RuntimeError, match=r"parameters of shape \[4, 3\] don't fit a tensor of shape \[4, 6\] in blocks \[3\]"):
        torch.ops.geta.dequantize(torch.zeros(4, 6, dtype=torch.int8), torch.ones(4, 3), 4, blocks=[3])


class Mixed(nn.Module):
    """A table, matrices and a convolution. [B, T] -> [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(9, 24), nn.Conv1d(24, 20, 3)
        self.linear, self.narrow = nn.Linear(20, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.narrow(self.linear(self.conv(self.embed(ids).transpose(1, 2)).mean(2)))


CHANNELS = r"blocks; 1 weights are no matrices and have one scale per output channel instead \(first: 'conv.weight', \[20, 24, 3\]\)"


@pytest.mark.parametrize("bits", [(4, 8), FixedBits(3)])
def test_every_weight_by_its_rule(bits: object) -> None:
    torch.manual_seed(0)
    model, mean = Mixed(), isinstance(bits, FixedBits)
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=CHANNELS):
        quantize(model, weights=bits, activations=None, exclude=(), granularity="group", group_size=16)
    found = fixed_quantizers(model) if mean else quantizers(model)
    shapes = {name: (list((q.scale if mean else q.q_m).shape), q.blocks) for name, q in found.items()}
    assert shapes == {
        "embed.weight": ([9, 2], (16,)),
        "conv.weight": ([20, 1, 1], ()),
        "linear.weight": ([16, 2], (16,)),
        "narrow.weight": ([3, 1], ()),
    }
    magnitudes = before.linear.weight.detach().abs()
    if mean:
        start = torch.stack([magnitudes[:, :16].mean(1), magnitudes[:, 16:].mean(1)], 1) * 2 / 3**0.5
        torch.testing.assert_close(found["linear.weight"].scale.detach(), start)
    else:
        assert torch.equal(found["linear.weight"].q_m.detach(), torch.stack([magnitudes[:, :16].amax(1), magnitudes[:, 16:].amax(1)], 1))
        assert found["linear.weight"].bit_width().round().unique().tolist() == [16]
    assert "blocks of 16 columns" in repr(model.linear)


def test_transposed_and_tied_weights() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer, tied = Conv1D(6, 20), nn.ModuleDict({"embed": nn.Embedding(9, 20), "head": nn.Linear(20, 9, bias=False)})
    tied["head"].weight = tied["embed"].weight
    for model in (layer, tied):
        quantize(model, activations=None, exclude=(), granularity="group", group_size=8)
    (first,), (both,) = quantizers(layer).values(), quantizers(tied).values()
    assert (first.d.shape, first.blocks) == ((3, 6), (8,))
    assert (both.d.shape, both.blocks) == ((9, 3), (8,))
    assert torch.equal(tied["head"].weight, tied["embed"].weight)
    weight = layer.parametrizations.weight.original
    assert torch.equal(layer.weight, torch.cat([first_part(layer, weight, block) for block in range(3)]))


def first_part(layer: nn.Module, weight: Tensor, block: int) -> Tensor:
    quantizer = layer.parametrizations.weight[0]
    rows, one = weight[8 * block : 8 * block + 8], slice(block, block + 1)
    return torch.ops.geta.fake_quantize(rows, quantizer.d[one], quantizer.q_m[one], quantizer.t[one], True, True, ())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_blocks_of_few_bits_are_nearer_to_the_weight_than_one_scale(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 128) * torch.rand(32, 128).pow(2)
    errors = {}
    for granularity, size in (("tensor", None), ("channel", None), ("group", 32)):
        layer = nn.Linear(128, 32, bias=False)
        with torch.no_grad():
            layer.weight.copy_(weight)
        quantize(layer, weights=bits, activations=None, exclude=(), initial_bits=bits, granularity=granularity, group_size=size)
        errors[granularity] = float((layer.weight - weight).detach().square().mean())
    assert errors["group"] < 0.9 * errors["channel"] < 0.9 * errors["tensor"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "group"}, "granularity: 'group' needs group_size.*use 32, 64 or 128"),
        ({"group_size": 32}, "group_size: 32 needs granularity='group', and granularity is 'tensor': give both or none"),
        ({"granularity": "channel", "group_size": 32}, "group_size: 32 needs granularity='group', and granularity is 'channel'"),
        *(({"granularity": "group", "group_size": size}, f"group_size: {size!r} is impossible.*at least 8") for size in (7, 0, 32.0, True)),
        ({"granularity": "group", "group_size": "64"}, "group_size: '64' is impossible"),
    ],
)
def test_impossible_groups_are_refused(settings: dict[str, object], message: str) -> None:
    model = nn.Linear(64, 4)
    with pytest.raises(ConfigError, match=message):
        quantize(model, activations=None, exclude=(), **settings)
    assert not quantizers(model)


def test_groups_without_weights_are_warned_of_and_infinite_weights_refused() -> None:
    with pytest.warns(UserWarning, match="granularity='group' has no effect.*weights=None"):
        quantize(nn.Linear(64, 4), weights=None, granularity="group", group_size=32, calibration=[torch.randn(2, 64)])
    layer = nn.Linear(64, 4)
    with torch.no_grad():
        layer.weight[0, 0] = torch.inf
    with pytest.raises(BadModelError, match="infinite"):
        quantize(layer, activations=None, exclude=(), granularity="group", group_size=32)


@pytest.mark.parametrize("bits", [(4, 8), FixedBits(2)])
def test_saved_blocks_must_be_the_same(bits: object) -> None:
    def model(size: int) -> nn.Module:
        return quantize(nn.Linear(64, 4), weights=bits, activations=None, exclude=(), granularity="group", group_size=size)

    state = model(24).state_dict()
    model(24).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"'weight' was saved with blocks of columns \[24\] and has \[28\] here"):
        model(28).load_state_dict(state)


def test_zero_blocks_can_grow_and_empty_weights_have_no_blocks() -> None:
    layer = nn.Linear(40, 4)
    with torch.no_grad():
        layer.weight[:, :16] = 0
    quantize(layer, activations=None, exclude=(), granularity="group", group_size=16)
    q_m = quantizers(layer)["weight"].q_m
    assert torch.equal(q_m[:, 0], layer.parametrizations.weight.original.abs().amax().expand(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own about tensors without elements, and ours about weights without blocks
        empty = quantize(nn.Linear(0, 4), activations=None, exclude=(), granularity="group", group_size=16)
    assert quantizers(empty)["weight"].blocks == ()


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("turned", [False, True])
def test_operators_keep_what_they_promise_when_traced(blocks: tuple[int, ...], turned: bool) -> None:
    tensors = [WEIGHT, *parameters(len(widths_of(blocks, COLUMNS)))]
    x, d, q_m, t = (tensor.t().contiguous() if turned else tensor for tensor in tensors)
    codes = torch.randint(-4, 4, x.shape, dtype=torch.int8)
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    calls = [
        (torch.ops.geta.fake_quantize.default, (x.requires_grad_(), d, q_m, t, True, True, [0.21])),
        (torch.ops.geta.lsq_quantize.default, (x, d, 3, -4, 3, [])),
        (torch.ops.geta.dequantize.default, (codes, d.clone().requires_grad_(), 4)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, {"blocks": [*blocks]}, test_utils=utilities)
        found, traced = operator(*arguments, blocks=blocks), torch.empty_like(arguments[0])
        assert found.stride() == traced.stride()


@pytest.mark.parametrize("bits", [(4, 8), FixedBits(3)])
def test_compiled_models_compute_the_same(bits: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 4))
    quantize(model, weights=bits, activations=None, exclude=(), granularity="group", group_size=16, surrogate=Fourier())
    x = torch.randn(3, 40)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for one in (model, compiled):
        model.zero_grad()
        one(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert torch.equal(compiled(x), model(x))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
