"""Quantizers in models: which tensors get one, that they are really used, and that failures change nothing."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from geta.errors import BadModelError, ConfigError
from geta.graph.names import canonical_name, find_tensor
from geta.quant import Bits, Fourier, Quantizer, quantize, quantize_codes, quantizers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 8))
        self.position = nn.Parameter(torch.randn(1, 8))
        self.classifier = nn.Module()
        self.classifier.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.norm(self.stem(x)))).mean((2, 3))
        return self.classifier.head(self.body(x) + self.position)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
EVERYTHING = [
    *("stem.weight", "stem:input", "up.weight", "up:input", "body.0.weight", "body.0:input"),
    *("body.3.weight", "body.3:input", "classifier.head.weight", "classifier.head:input"),
]


def test_everything_gets_its_quantizer_in_module_order() -> None:
    model = net()
    assert quantize(model, exclude=(), calibration=[X]) is model
    found = quantizers(model)
    assert list(found) == EVERYTHING
    assert [quantizer.kind for quantizer in found.values()] == ["weight", "activation"] * 5
    assert all(quantizer.bits == Bits(4, 8) for quantizer in found.values() if quantizer.kind == "weight")
    assert all(quantizer.bits == Bits(8, 8) for quantizer in found.values() if quantizer.kind == "activation")


def test_settings_reach_the_quantizers() -> None:
    model = quantize(
        net(), weights=(3, 6), activations=4, surrogate=Fourier((0.1,)), exclude=(), calibration=[X], nonlinear=True, initial_bits=12
    )
    for quantizer in quantizers(model).values():
        assert quantizer.bits == (Bits(3, 6) if quantizer.kind == "weight" else Bits(4, 4))
        assert quantizer.surrogate == Fourier((0.1,))
        assert not quantizer.linear
        assert quantizer.bit_width().item() == pytest.approx(12.0, abs=1e-3)


@pytest.mark.parametrize(
    ("exclude", "missing"),
    [
        (("*.head",), ["classifier.head"]),
        ("*.head", ["classifier.head"]),
        (("body",), ["body.0", "body.3"]),
        (("body.0", "st?m"), ["body.0", "stem"]),
        (("classifier",), ["classifier.head"]),
    ],
)
def test_exclude_matches_whole_paths_and_what_is_inside(exclude: tuple[str, ...], missing: list[str]) -> None:
    found = quantizers(quantize(net(), exclude=exclude, calibration=[X]))
    assert list(found) == [name for name in EVERYTHING if re.split(r"\.weight$|:input$", name)[0] not in missing]


def test_the_head_is_excluded_by_default_and_nowhere_by_substring() -> None:
    assert "classifier.head.weight" not in quantizers(quantize(net(), activations=None))
    model = nn.Sequential()
    model.add_module("conv1", nn.Linear(2, 2))
    model.add_module("conv10", nn.Linear(2, 2))
    assert list(quantizers(quantize(model, activations=None, exclude=["conv1"]))) == ["conv10.weight"]


@pytest.mark.parametrize("pattern", ["head", "bod", "*.heads", "BODY"])
def test_a_pattern_without_match_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=rf"exclude: '{re.escape(pattern)}' matches no module of Net.*such as 'stem', 'norm', 'up'"):
        quantize(net(), activations=None, exclude=(pattern,))


def test_the_default_pattern_needs_no_match() -> None:
    assert list(quantizers(quantize(nn.Sequential(nn.Linear(3, 3)), activations=None))) == ["0.weight"]


def test_weights_start_at_their_largest_value() -> None:
    model = net()
    largest = {name: parameter.detach().abs().max() for name, parameter in model.named_parameters()}
    for name, quantizer in quantizers(quantize(model, activations=None, exclude=())).items():
        assert torch.equal(quantizer.q_m, largest[name])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 5), (5, 1)),
        (nn.Conv2d(4, 6, 3, groups=2), (6, 1, 1, 1)),
        (nn.Conv1d(4, 6, 3), (6, 1, 1)),
        (nn.ConvTranspose2d(4, 6, 3), (1, 6, 1, 1)),
        (nn.Embedding(10, 4), (1, 4)),
        (nn.Bilinear(2, 3, 4), (4, 1, 1)),
    ],
)
def test_per_channel_ranges_follow_the_output_channels(layer: nn.Module, shape: tuple[int, ...]) -> None:
    weight = layer.weight.detach().clone()
    quantize(layer, activations=None, exclude=(), granularity="channel")
    quantizer = quantizers(layer)["weight"]
    assert quantizer.q_m.shape == quantizer.d.shape == torch.Size(shape)
    others = [dim for dim, size in enumerate(shape) if size == 1]
    assert torch.equal(quantizer.q_m, weight.abs().amax(others, keepdim=True))
    quantizer.project_(4, 4)
    for step, values in zip(quantizer.d.movedim(shape.index(max(shape)), 0), layer.weight.movedim(shape.index(max(shape)), 0), strict=True):
        codes = values / step.flatten()
        assert float((codes - codes.round()).abs().max().detach()) < 1e-4
        assert int(codes.abs().max().round()) == 7


def test_transformers_conv1d_has_its_output_channels_last() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer = pytorch_utils.Conv1D(6, 4)
    quantize(layer, activations=None, exclude=(), granularity="channel")
    assert quantizers(layer)["weight"].q_m.shape == (1, 6)


def test_zero_weights_get_a_range_that_lets_them_leave_zero() -> None:
    model = nn.Sequential(nn.Linear(16, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.copy_(torch.tensor([[0.5, 0.1, 0.0], [0.0, 0.0, 0.0], [0.1, -0.2, 0.0]]))
    twin = copy.deepcopy(model)
    quantize(model, activations=None, exclude=())
    assert quantizers(model)["0.weight"].q_m.item() == pytest.approx(1.0 / math.sqrt(16))
    quantize(twin, activations=None, exclude=(), granularity="channel")
    assert quantizers(twin)["1.weight"].q_m.flatten().tolist() == pytest.approx([0.5, 0.5, 0.2])


def test_the_layer_computes_with_quantized_weights_and_inputs() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    weight, bias = (parameter.detach().clone() for parameter in model[0].parameters())
    x = torch.randn(5, 6)
    quantize(model, exclude=(), calibration=[x])
    found = quantizers(model)
    for quantizer in found.values():
        quantizer.project_(4, 4)
    w, a = found["0.weight"], found["0:input"]
    w_codes = quantize_codes(weight, w.d, w.q_m, w.t, w.signed, linear=True)
    a_codes = quantize_codes(x, a.d, a.q_m, a.t, a.signed, linear=True)
    wanted = nn.functional.linear(a_codes * a.d, w_codes * w.d, bias)
    assert torch.equal(model(x), wanted)
    assert torch.equal(model[0](input=x), wanted)
    assert not torch.allclose(wanted, nn.functional.linear(x, weight, bias), atol=1e-3)
    for quantizer in found.values():
        quantizer.enabled = False
    assert torch.equal(model(x), nn.functional.linear(x, weight, bias))


def test_names_agree_with_the_graphs_names() -> None:
    model = net()
    names = [name for name, _ in model.named_parameters()]
    quantize(model, activations=None, exclude=())
    renamed = {canonical_name(name) for name, _ in model.named_parameters()}
    assert set(names) <= renamed
    for name in quantizers(model):
        assert find_tensor(model, name) is model.get_parameter(re.sub(r"\.weight$", ".parametrizations.weight.original", name))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_stays_as_it_was(training: bool) -> None:
    model = net().train(training)
    quantize(model, exclude=(), calibration=[X])
    assert all(module.training == training for module in model.modules())


def test_tied_weights_share_one_quantizer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.alias = nn.Embedding(7, 4)  # holds the table for others to use and is never called
            self.alias.weight = self.table.weight
            self.output = nn.Linear(4, 7, bias=False)
            self.output.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.table(x))

    model = Tied()
    tokens = torch.tensor([[1, 2, 3]])
    quantize(model, exclude=(), calibration=[tokens], initial_bits=8)
    assert list(quantizers(model)) == ["table.weight", "output:input"]
    assert model.output.parametrizations.weight[0] is model.table.parametrizations.weight[0]
    assert model.output.parametrizations.weight.original is model.table.parametrizations.weight.original
    assert torch.equal(model.output.weight, model.table.weight)
    twin = copy.deepcopy(model)
    assert twin.output.parametrizations.weight[0] is twin.table.parametrizations.weight[0]
    assert twin.output.parametrizations.weight[0] is not model.output.parametrizations.weight[0]
    assert torch.equal(twin(tokens), model(tokens))

    with pytest.raises(ConfigError, match="nothing to quantize: Tied"):
        quantize(Tied(), exclude=("output",), activations=None)  # the excluded layer's tensor is the table's too


def test_a_module_used_twice_is_quantized_once_and_excluded_by_either_path() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    twin = copy.deepcopy(model)
    quantize(model, exclude=(), calibration=[torch.randn(3, 4)])
    assert list(quantizers(model)) == ["0.weight", "0:input"]
    with pytest.raises(ConfigError, match="nothing to quantize"):
        quantize(twin, exclude=("2",), activations=None)


class Attending(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)  # type: ignore[arg-type]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        other = x if y is None else y
        return self.attention(x, other, other, need_weights=False)[0]


def test_attention_uses_its_quantized_projection_in_every_path() -> None:
    torch.manual_seed(0)
    model = Attending()
    reference = copy.deepcopy(model)
    x = torch.randn(2, 5, 8)
    quantize(model, exclude=(), calibration=[x], weights=Bits(3, 3), activations=Bits(4, 4), initial_bits=4)
    found = quantizers(model)
    assert sorted(found) == ["attention.in_proj_weight", "attention.out_proj.weight", "attention:input"]
    for quantizer in found.values():
        quantizer.project_(quantizer.bits.lower, quantizer.bits.upper)
    with torch.no_grad():
        reference.attention.in_proj_weight.copy_(model.attention.in_proj_weight)
        reference.attention.out_proj.weight.copy_(model.attention.out_proj.weight)
    assert len(model.attention.in_proj_weight.unique()) <= 7
    quantized_x = found["attention:input"](x)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(model.train()(x), reference.train()(quantized_x), **tolerance)
    with torch.no_grad():  # the fused kernel
        torch.testing.assert_close(model.eval()(x), reference.eval()(quantized_x), **tolerance)
    model(x).sum().backward()
    original = model.attention.parametrizations.in_proj_weight.original
    assert original.grad is not None
    assert float(original.grad.abs().sum()) > 0.0
    assert found["attention.in_proj_weight"].d.grad is not None


def test_cross_attention_with_separate_projections() -> None:
    torch.manual_seed(0)
    model = Attending(kdim=6, vdim=6)
    x, y = torch.randn(2, 5, 8), torch.randn(2, 3, 6).abs() * 9
    quantize(model, exclude=(), calibration=[(x, y)], percentile=100)
    found = quantizers(model)
    assert sorted(found) == [
        *("attention.k_proj_weight", "attention.out_proj.weight", "attention.q_proj_weight"),
        *("attention.v_proj_weight", "attention:input"),
    ]
    assert found["attention:input"].signed
    assert found["attention:input"].q_m.item() == pytest.approx(max(x.abs().max().item(), y.max().item()))
    assert torch.isfinite(model(x, y)).all()


def test_attention_with_learned_extra_keys_quantizes_only_projections() -> None:
    model = Attending(add_bias_kv=True)
    quantize(model, activations=None, exclude=())
    assert sorted(quantizers(model)) == ["attention.in_proj_weight", "attention.out_proj.weight"]


def test_encoder_layers_quantize_in_train_and_eval() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    quantize(layer, exclude=(), calibration=[x])
    for quantizer in quantizers(layer).values():
        quantizer.project_(3, 3)
    with torch.no_grad():
        torch.testing.assert_close(layer.train()(x), layer.eval()(x))


def test_users_own_layer_counts_when_it_has_a_weight() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T * self.scale

    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table

    model = nn.Sequential(Position(), Own(), nn.LayerNorm([2, 3]))
    quantize(model, exclude=(), calibration=[torch.randn(2, 4)])
    assert list(quantizers(model)) == ["1.weight", "1:input"]
    assert list(quantizers(quantize(Own(), exclude=(), activations=None))) == ["weight"]


def test_deep_copies_are_independent_and_equal() -> None:
    model = quantize(net(), exclude=(), calibration=[X]).eval()
    twin = copy.deepcopy(model)
    assert list(quantizers(twin)) == list(quantizers(model))
    assert torch.equal(twin(X), model(X))
    with torch.no_grad():
        for quantizer in quantizers(twin).values():
            quantizer.project_(2, 2)
    assert not torch.allclose(twin(X), model(X))
    assert all(quantizer.bit_width().item() > 10 for quantizer in quantizers(model).values())


def test_state_dict_round_trip() -> None:
    model = quantize(net(), exclude=(), calibration=[X]).eval()
    for quantizer in quantizers(model).values():
        quantizer.project_(4, 6)
    torch.manual_seed(5)
    other = quantize(Net(), exclude=(), calibration=[-X.abs()]).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))
    assert {n: q.signed for n, q in quantizers(other).items()} == {n: q.signed for n, q in quantizers(model).items()}


def test_training_moves_every_quantizer_parameter() -> None:
    model = quantize(net(), exclude=(), calibration=[X], nonlinear=True, initial_bits=4, weights=(4, 8), activations=(4, 8))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert [name for name in still if name.rpartition(".")[2] in ("d", "t", "original")] == []


def test_assigning_to_a_quantized_weight_stores_it() -> None:
    model = quantize(nn.Sequential(nn.Linear(3, 2)), activations=None)
    model[0].weight = torch.full((2, 3), 0.25)
    assert torch.equal(model[0].parametrizations.weight.original, torch.full((2, 3), 0.25))


def test_meta_device_models_can_be_quantized() -> None:
    with torch.device("meta"):
        model = Net()
    quantize(model, activations=None, exclude=())
    assert all(quantizer.d.is_meta for quantizer in quantizers(model).values())
    assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5)


def test_twice_is_refused() -> None:
    model = quantize(net(), activations=None)
    with pytest.raises(ConfigError, match=r"already has 4 quantizers \(first: 'stem\.weight'\); call quantize once"):
        quantize(model, activations=None)


def test_copied_layers_inside_a_model_are_found() -> None:
    model = quantize(nn.Sequential(nn.Linear(3, 3)), activations=None)
    model.append(copy.deepcopy(model[0]))
    with pytest.raises(BadModelError, match=r"two quantizers are called '0\.weight' \(the second is '1\."):
        quantizers(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": None, "activations": None}, "weights and activations are both None"),
        ({"surrogate": "ste"}, r"surrogate: 'ste' has no coefficients; use STE\(\) or Fourier"),
        ({"surrogate": Fourier}, "surrogate: .* has no coefficients"),
        ({"granularity": "row"}, "granularity: 'row' is unknown; use 'tensor', 'channel' or 'group'"),
        ({"initial_bits": 3}, r"initial_bits: 3 is outside \[4, 16\].*16 is a good start"),
        ({"initial_bits": 17}, r"initial_bits: 17 is outside \[4, 16\]"),
        ({"weights": (8, 4)}, r"bits: \(8, 4\) is impossible"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(net(), **{"activations": None, **settings})  # type: ignore[arg-type]


def test_a_setting_without_effect_warns() -> None:
    with pytest.warns(UserWarning, match=r"granularity='channel' has no effect.*weights=None"):
        quantize(net(), weights=None, granularity="channel", calibration=[X])


def test_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nothing to quantize: Sequential has no layer.*check exclude"):
        quantize(nn.Sequential(nn.ReLU(), nn.LayerNorm([2, 3])), activations=None)
    with pytest.raises(ConfigError, match=r"nothing to quantize: Net.*exclude=\('\*',\)"):
        quantize(net(), activations=None, exclude="*")


def test_bad_models_are_named() -> None:
    with pytest.raises(BadModelError, match=r"needs a torch\.nn\.Module, got function"):
        quantize(lambda x: x, activations=None)  # type: ignore[arg-type]
    model = net()
    with torch.no_grad():
        model.body[0].weight[0, 0] = math.nan
    with pytest.raises(BadModelError, match=r"weight 'body\.0\.weight' has infinite or NaN values"):
        quantize(model, activations=None)
    with pytest.raises(ConfigError, match=r"'0\.weight' has no shape yet \(lazy module\): run the model once"):
        quantize(nn.Sequential(nn.LazyLinear(3)), activations=None)


def test_other_parametrizations_are_refused_by_name() -> None:
    model = net()
    nn.utils.parametrizations.weight_norm(model.body[0])
    with pytest.raises(ConfigError, match=r"'body\.0\.weight' already has a parametrization.*exclude=\['body\.0'\]"):
        quantize(model, activations=None)
    quantize(model, activations=None, exclude=("body.0",))
    assert "body.0.weight" not in quantizers(model)
    assert "body.3.weight" in quantizers(model)


def snapshot(model: nn.Module) -> list[tuple[str, str, list[str], int]]:
    return [
        (path, type(module).__name__, list(module._parameters), len(module._forward_pre_hooks)) for path, module in model.named_modules()
    ]


def test_a_failure_in_the_middle_leaves_the_model_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    before, tensors, y = snapshot(model), dict(model.named_parameters()), model.eval()(X)
    register, calls = parametrize.register_parametrization, []

    def failing(*args: object, **kwargs: object) -> nn.Module:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("third")
        return register(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(parametrize, "register_parametrization", failing)
    with pytest.raises(RuntimeError, match="third"):
        quantize(model, exclude=(), calibration=[X])
    assert snapshot(model) == before
    assert all(tensors[name] is parameter for name, parameter in model.named_parameters())
    assert torch.equal(model(X), y)
    monkeypatch.undo()
    assert list(quantizers(quantize(model, exclude=(), calibration=[X]))) == EVERYTHING


def test_an_attribute_in_the_way_is_named() -> None:
    model = net()
    model.body[3].input_quantizer = "mine"
    with pytest.raises(ConfigError, match=r"module 'body\.3' already has an attribute 'input_quantizer'.*rename it or exclude"):
        quantize(model, exclude=(), calibration=[X])
    assert quantizers(model) == {}
    assert model.body[3].input_quantizer == "mine"


def test_half_precision_models() -> None:
    model = net().to(torch.bfloat16)
    x = X.to(torch.bfloat16)
    quantize(model, exclude=(), calibration=[x])
    assert all(quantizer.d.dtype == torch.float32 for quantizer in quantizers(model).values())
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert all(isinstance(module, Quantizer) for module in quantizers(model).values())
