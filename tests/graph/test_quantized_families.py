"""A quantized model has the families of the float model, whoever put the quantizers in, and is cut exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.ao.quantization as ao
import torch.ao.quantization.fx._decomposed
import torch.nn.functional as F
from bench.zoo.quantized import differences, same_families
from torch import Tensor, nn

import nets
from geta.errors import BadModelError
from geta.graph import DependencyGraph, analyze
from geta.graph.rules import registry
from geta.graph.rules.elementwise import keeps_zero, loses_zero, pointwise
from geta.subnet import compact
from geta.subnet.comparison import max_difference

decomposed = torch.ops.quantized_decomposed
torch.set_num_threads(1)
CONVOLUTIONAL = [name for name in nets.NETS if name.startswith(("resnet", "vgg", "mobilenet", "densenet", "shufflenet"))]
SMALL = [name for name in nets.NETS if name != "resnet56"]  # resnet20 has the same blocks


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_quantizers_of_geta_leave_the_families_alone(name: str, granularity: str) -> None:
    model, args, kwargs = nets.NETS[name]()
    assert same_families(model, args, kwargs, granularity=granularity) == []  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:granularity='group' cuts:UserWarning")
@pytest.mark.parametrize("name", [name for name in SMALL if name not in CONVOLUTIONAL])
def test_scales_per_block_of_columns_leave_the_families_alone(name: str) -> None:
    """The rows of scales go with the weight's rows; columns go one by one, whatever block they are in."""
    model, args, kwargs = nets.NETS[name]()
    assert same_families(model, args, kwargs, granularity="group", group_size=8) == []


def test_the_comparison_sees_a_difference() -> None:
    model, args, kwargs = nets.NETS["vgg7_bn"]()
    plain = analyze(model, args, kwargs)
    narrower = analyze(model, args, kwargs, protect="3")
    found = differences(plain, narrower)
    assert found and "in the float model" in found[0]


class Quantized(nn.Module):
    """Three linear layers; `weight` and `value` quantize the first weight and the activations between them. [B, 12] -> [B, 4].

    What the middle weight reads is never zero after a sigmoid, so that its own columns have to be.
    """

    def __init__(self, weight: Quantizing, value: Quantizing, activation: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.value, self.activation = weight, value, activation
        self.first, self.middle, self.last = nn.Linear(12, 16), nn.Linear(16, 8), nn.Linear(8, 4)
        for width, name in ((16, "first"), (8, "middle")):
            self.register_buffer(f"scale_{name}", torch.rand(width) * 0.05 + 0.01)
            self.register_buffer(f"zero_{name}", torch.randint(-5, 5, (width,), dtype=torch.int32))
            self.register_buffer(f"fraction_{name}", torch.rand(width))
            self.register_parameter(f"step_{name}", nn.Parameter(torch.rand(width, 1) * 0.05 + 0.01))
        self.register_buffer("scale", torch.tensor(0.03))
        self.register_buffer("zero", torch.tensor(3, dtype=torch.int32))
        self.learned = nn.Parameter(torch.tensor([0.03]))
        self.learned_zero = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(F.linear(x, self.weight(self, self.first.weight, "first"), self.first.bias))
        hidden = self.value(self, hidden, "")
        hidden = torch.relu(F.linear(hidden, self.weight(self, self.middle.weight, "middle"), self.middle.bias))
        return self.last(self.value(self, hidden, ""))


Quantizing = Callable[[Quantized, Tensor, str], Tensor]


def unchanged(net: Quantized, x: Tensor, name: str) -> Tensor:
    return x


def per_tensor(net: Quantized, x: Tensor, name: str) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, 0.02, 3, -128, 127)


def per_tensor_parameters(net: Quantized, x: Tensor, name: str) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, net.scale, net.zero, -128, 127)


def per_channel(net: Quantized, x: Tensor, name: str) -> Tensor:
    return torch.fake_quantize_per_channel_affine(x, getattr(net, f"scale_{name}"), getattr(net, f"zero_{name}"), 0, -8, 7)


def learnable(net: Quantized, x: Tensor, name: str) -> Tensor:
    return torch._fake_quantize_learnable_per_tensor_affine(x, net.learned, net.learned_zero, -128, 127, 1.0)


def exported(net: Quantized, x: Tensor, name: str) -> Tensor:
    """As pt2e writes it for weights: per channel."""
    scale, zero = getattr(net, f"scale_{name}"), getattr(net, f"zero_{name}")
    codes = decomposed.quantize_per_channel(x, scale, zero, 0, -128, 127, torch.int8)
    return decomposed.dequantize_per_channel(codes, scale, zero, 0, -128, 127, torch.int8)


def exported_static(net: Quantized, x: Tensor, name: str) -> Tensor:
    codes = decomposed.quantize_per_tensor.default(x, 0.02, 3, -128, 127, torch.int8)
    return decomposed.dequantize_per_tensor.default(codes, 0.02, 3, -128, 127, torch.int8)


def exported_dynamic(net: Quantized, x: Tensor, name: str) -> Tensor:
    scale, zero = decomposed.choose_qparams.tensor(x, -128, 127, 1e-5, torch.int8)
    codes = decomposed.quantize_per_tensor.tensor(x, scale, zero, -128, 127, torch.int8)
    return decomposed.dequantize_per_tensor.tensor(codes, scale, zero, -128, 127, torch.int8)


def exported_per_token(net: Quantized, x: Tensor, name: str) -> Tensor:
    scale, zero = decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = decomposed.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    return decomposed.dequantize_per_token(codes, scale, zero, -128, 127, torch.int8, torch.float32)


def largest(net: Quantized, x: Tensor, name: str) -> Tensor:
    """Symmetric, scale from the largest magnitude of a row (a weight's channel, an activation's token)."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-8)
    return (x / scale).round().clamp(-127, 127) * scale


def extremes(net: Quantized, x: Tensor, name: str) -> Tensor:
    """Affine, scale and zero point from a range that spans zero."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True).clamp(min=0.0)
    scale = ((high - low) / 255).clamp(min=1e-8)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale


def step_sizes(net: Quantized, x: Tensor, name: str) -> Tensor:
    """LSQ with a straight-through rounding: a learned step size per channel."""
    step = getattr(net, f"step_{name}")
    scaled = (x / step).clamp(-128, 127)
    return ((scaled.round() - scaled).detach() + scaled) * step


EXACT: dict[str, tuple[Quantizing, Quantizing]] = {
    "per tensor": (per_tensor, per_tensor),
    "per tensor, parameters": (per_tensor_parameters, per_tensor_parameters),
    "per channel": (per_channel, per_tensor),
    "learnable": (learnable, learnable),
    "exported static": (exported, exported_static),
    "exported dynamic": (exported, exported_dynamic),
    "exported per token": (exported, exported_per_token),
    "largest magnitude": (largest, largest),
    "range that spans zero": (extremes, extremes),
    "learned step sizes": (step_sizes, unchanged),
}


DYNAMIC = (exported_dynamic, exported_per_token, largest, extremes)


def own(graph: DependencyGraph) -> dict[str, tuple[object, ...]]:
    """Families without what the quantizers add and without who must be zero."""
    layers = ("first.", "middle.", "last.")
    return {
        family.name: (
            family.size,
            family.unit,
            family.prunable,
            family.reason.partition(" in ")[0],
            [(member.param, member.dim) for member in family.members if member.param.startswith(layers)],
        )
        for family in graph.families
        if any(member.param.startswith(layers) for member in family.members)
    }


def cut_exactly(model: nn.Module, graph: DependencyGraph, x: Tensor, seed: int = 1) -> None:
    """The compact model computes what the zeroed one does, in evaluation mode; the removal shows."""
    model.eval()
    selection = graph.random_selection(0.5, seed=seed)
    small = compact(model, graph, selection)
    assert small.info.max_difference is not None and small.info.max_difference <= 1e-9
    zeroed = copy.deepcopy(model)
    graph.zero_(zeroed, selection)
    with torch.no_grad():
        assert max_difference([model(x)], [zeroed(x)])[1] > 1e-3
        assert max_difference([zeroed(x)], [small.eval()(x)])[1] < 1e-2  # one rounding step at most


@pytest.mark.parametrize("kind", list(EXACT))
def test_quantizers_of_others_leave_the_families_alone(kind: str) -> None:
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    # A range found from the activations themselves is only the same without what was zero.
    activation = torch.tanh if EXACT[kind][1] in DYNAMIC else torch.sigmoid
    plain = analyze(Quantized(unchanged, unchanged, activation).eval(), (x,))
    model = Quantized(*EXACT[kind], activation).eval()
    graph = analyze(model, (x,))
    assert graph.num_groups == 24
    assert own(graph) == own(plain)
    assert not any("fixed batch size" in note for note in graph.notes)
    added = [member for family in graph.families for member in family.members if member.param.startswith(("scale_", "step_", "zero_"))]
    assert not any(member.zero for member in added if any(member in family.members for family in graph.prunable_families))
    cut_exactly(model, graph, x)


def fractional_zero(net: Quantized, x: Tensor, name: str) -> Tensor:
    """round(z) - z is what a zero becomes."""
    return torch.fake_quantize_per_channel_affine(x, getattr(net, f"scale_{name}"), getattr(net, f"fraction_{name}"), 0, -8, 7)


def foreign_zero(net: Quantized, x: Tensor, name: str) -> Tensor:
    """Codes that are read with another zero point than they were written with."""
    codes = decomposed.quantize_per_tensor.default(x, 0.02, 3, -128, 127, torch.int8)
    return decomposed.dequantize_per_tensor.default(codes, 0.02, 4, -128, 127, torch.int8)


def zero_outside(net: Quantized, x: Tensor, name: str) -> Tensor:
    """The clamp does not leave this zero point alone."""
    return (((x / 0.02).round() + 300).clamp(-128, 127) - 300) * 0.02


def unclamped_range(net: Quantized, x: Tensor, name: str) -> Tensor:
    """The range need not span zero, so zeros may move it."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 255).clamp(min=1e-8)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale


def vanishing_scale(net: Quantized, x: Tensor, name: str) -> Tensor:
    """A channel of zeros divides by zero."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-127, 127) * scale


@pytest.mark.parametrize(
    ("weight", "family", "reason"),
    [
        (fractional_zero, "first", "would not be zero where it is summed over in linear"),
        (foreign_zero, "first", "would not be zero where it is summed over in linear"),
        (zero_outside, "first", "would not be zero where it is summed over in linear"),
        (unclamped_range, "first", "crosses amin"),
        (vanishing_scale, "first", "divides by a value that removal makes zero"),
    ],
)
def test_what_is_not_exact_stays(weight: Quantizing, family: str, reason: str) -> None:
    x = torch.randn(5, 12)
    graph = analyze(Quantized(weight, unchanged).eval(), (x,))
    found = next(item for item in graph.families if item.name == family)
    assert not found.prunable
    assert reason in found.reason


def observed_net(fake_quantize: type[ao.FakeQuantize], scheme: torch.qscheme) -> nn.Module:
    """Convolutions behind FakeQuantize modules, ranges observed once."""
    symmetric = scheme == torch.per_tensor_symmetric
    dtype, low, high = (torch.qint8, -128, 127) if symmetric else (torch.quint8, 0, 255)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
            self.of_weight = fake_quantize(
                ao.MovingAveragePerChannelMinMaxObserver,
                quant_min=-127,
                quant_max=127,
                dtype=torch.qint8,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
            )
            self.of_input, self.of_hidden = (
                fake_quantize(ao.MovingAverageMinMaxObserver, quant_min=low, quant_max=high, dtype=dtype, qscheme=scheme) for _ in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(self.of_input(x), self.of_weight(self.first.weight), self.first.bias)
            x = self.of_hidden(torch.sigmoid(x) - 0.3)
            return self.last(self.second(x).relu().mean((2, 3)))

    net = Net()
    net(torch.randn(2, 3, 8, 8))
    return net.eval()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scheme", [torch.per_tensor_symmetric, torch.per_tensor_affine])
def test_fake_quantize_modules_with_observers_off(fused: bool, scheme: torch.qscheme) -> None:
    net = observed_net(ao.FusedMovingAvgObsFakeQuantize if fused else ao.FakeQuantize, scheme)
    net.apply(ao.disable_observer)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    graph = analyze(net, (x,))
    assert [(family.name, family.size) for family in graph.prunable_families] == [("first", 8), ("second", 6)]
    assert [member.param for member in graph.prunable_families[0].members if member.role == "buffer"] == [
        "of_weight.scale",
        "of_weight.zero_point",
    ]
    assert graph.notes == []
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert "forward" not in vars(net.of_input)
    cut_exactly(net, graph, x)


def test_a_dynamic_range_sees_what_is_not_zero() -> None:
    """sigmoid(0) = 0.5 may be the largest entry of its token."""
    x = torch.randn(5, 12)
    for value in DYNAMIC:
        graph = analyze(Quantized(unchanged, value).eval(), (x,))
        found = next(family for family in graph.families if family.name == "first")
        assert not found.prunable and found.reason.startswith("crosses ")


def test_observers_that_are_on() -> None:
    net = observed_net(ao.FusedMovingAvgObsFakeQuantize, torch.per_tensor_affine)
    x = torch.randn(2, 3, 8, 8)
    graph = analyze(net, (x,))
    first, second = (next(family for family in graph.families if family.name == name) for name in ("first", "second"))
    assert not first.prunable and "range observer in fused_moving_avg_obs_fake_quant at of_hidden" in first.reason
    assert "disable_observer" in first.reason
    assert second.prunable
    with pytest.raises(BadModelError, match=r"range observer of 'of_weight' is on.*disable_observer"):
        analyze(observed_net(ao.FakeQuantize, torch.per_tensor_affine), (x,))


class MLP(nn.Module):
    """[B, 64] -> [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.middle, self.out = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.middle(torch.tanh(self.up(x)))))


def test_torchao_per_channel_and_per_token() -> None:
    from torchao.quantization import qat, quantize_

    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    plain = analyze(MLP(), (x,))
    model = MLP()
    config = qat.QATConfig(
        activation_config=qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=qat.IntxFakeQuantizeConfig(torch.int4, "per_channel"),
        step="prepare",
    )
    quantize_(model, config)
    graph = analyze(model, (x,))
    found = [text for text in differences(plain, graph) if "need to be zero" not in text]
    assert found == []
    # The scale of a row is computed from the whole row, so a column that goes must be zero in it.
    assert any(member.param == "middle.weight" and member.zero for member in graph.prunable_families[0].members)
    assert [branch.granularity for branch in graph.quantizers] == ["token", "channel"] * 3
    cut_exactly(model, graph, x)


def test_torchao_groups_of_weights_go_as_a_whole() -> None:
    from torchao.quantization import qat

    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="TorchAODType"):
        model = qat.Int8DynActInt4WeightQATQuantizer(groupsize=32).prepare(MLP())
    graph = analyze(model, (x,))
    assert [(family.name, family.size) for family in graph.prunable_families] == [("up", 3), ("middle", 2)]
    assert {branch.granularity for branch in graph.quantizers} == {"token", "group"}
    assert [branch.bits for branch in graph.quantizers] == [8, 4] * 3
    cut_exactly(model, graph, x)


class Attention(nn.Module):
    """Four query heads of width 8 on two key-value heads, [B, S, 32] -> [B, S, 32]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, 16), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("group_size", [None, 4])
def test_torchao_on_attention(group_size: int | None) -> None:
    """Groups of columns smaller than a head leave the heads alone."""
    from torchao.quantization import qat, quantize_

    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    plain = analyze(Attention(), (x,))
    model = Attention()
    per_channel = qat.IntxFakeQuantizeConfig(torch.int8, "per_channel")
    weights = qat.IntxFakeQuantizeConfig(torch.int8, group_size=group_size) if group_size else per_channel
    quantize_(model, qat.QATConfig(weight_config=weights, step="prepare"))
    graph = analyze(model, (x,))
    assert [(family.unit, family.size) for family in graph.prunable_families] == [("key-value groups", 2)]
    if group_size is None:
        assert [text for text in differences(plain, graph) if "need to be zero" not in text] == []
    else:
        assert [family.size for family in plain.prunable_families] == [2]
    cut_exactly(model, graph, x)


def test_torchao_learned_ranges() -> None:
    from torchao.quantization import qat, quantize_

    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    model = MLP()
    config = qat.IntxFakeQuantizeConfig(torch.int4, "per_channel", is_dynamic=False, range_learning=True)
    quantize_(model, qat.QATConfig(weight_config=config, step="prepare"))
    qat.initialize_fake_quantizers(model, (x,))
    graph = analyze(model, (x,))
    assert differences(analyze(MLP(), (x,)), graph) == []
    scale = next(m for m in graph.prunable_families[0].members if m.param == "up.weight_fake_quantizer.scale")
    assert scale.dim == 0 and not scale.zero
    cut_exactly(model, graph, x)


def test_a_wrong_rule_changes_the_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison and the exactness check are not empty: a scale that couples everything or lost zeros are found."""
    model, args, kwargs = nets.NETS["vgg7_bn"]()
    assert same_families(model, args, kwargs) == []

    def as_a_product(ctx: object) -> object:
        """Takes the scale for a tensor that has to be as large as the activation."""
        value = ctx["x"]  # type: ignore[index]
        ctx.freeze(value, range(value.rank), "is multiplied with a scale")  # type: ignore[attr-defined]
        return keeps_zero(ctx)  # type: ignore[arg-type]

    for wrong in (as_a_product, loses_zero):
        monkeypatch.setitem(registry._RULES, "geta::fake_quantize", wrong)
        assert same_families(model, args, kwargs) != []
    monkeypatch.setitem(registry._RULES, "aten::fake_quantize_per_channel_affine", lambda ctx: pointwise(ctx, [ctx["self"]], "lose"))
    x = torch.randn(5, 12)
    assert own(analyze(Quantized(per_channel, unchanged).eval(), (x,))) != own(analyze(Quantized(unchanged, unchanged).eval(), (x,)))
