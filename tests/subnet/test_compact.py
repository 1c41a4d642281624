"""Compact models: integers are bitwise the fake quantizer's values, the user's model is untouched, errors say what to do."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import geta
import nets
from geta.errors import BadModelError, CheckpointError, ConfigError
from geta.graph import analyze
from geta.quant import Bits, Fourier, quantize, quantizers
from geta.subnet import compact
from geta.subnet.comparison import max_difference
from geta.subnet.structure import Outputs, describe, rebuild

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(OrderedDict(first=nn.Linear(6, 12), act=nn.ReLU(), second=nn.Linear(12, 8), tanh=nn.Tanh(), head=nn.Linear(8, 3)))


def quantized(model: nn.Module, args: tuple[torch.Tensor, ...], **options: object) -> nn.Module:
    settings = {"weights": Bits(4, 8), "activations": Bits(8, 8), "calibration": [args], "exclude": (), **options}
    quantize(model, **settings)  # type: ignore[arg-type]
    for quantizer in quantizers(model).values():
        quantizer.round_bits_()
    return model


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("nonlinear", [False, True])
def test_integers_equal_the_fake_quantizer_bitwise(granularity: str, nonlinear: bool) -> None:
    model = quantized(net(), (X,), granularity=granularity, nonlinear=nonlinear)
    if nonlinear:
        with torch.no_grad():
            for quantizer in quantizers(model).values():
                quantizer.t.fill_(0.8)
                quantizer.round_bits_()
    graph = analyze(model, (X,))
    whole = compact(model, graph, {})
    with torch.no_grad():
        assert torch.equal(whole(X), model(X))
    assert whole.net.get_buffer("first.weight_codes").dtype == torch.int8
    assert not any(name.endswith("first.weight") for name, _ in whole.named_parameters())
    assert whole.bits["first.weight"] == 8 and whole.bits["head:input"] == 8


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_pruned_and_quantized(granularity: str) -> None:
    model = quantized(net(), (X,), granularity=granularity, surrogate=Fourier((0.21,)))
    graph = analyze(model, (X,))
    selection = graph.random_selection(0.5, seed=1)
    small = compact(model, graph, selection)
    assert small.info.precision == "float64" and small.info.max_difference <= 1e-12
    assert small.net.get_buffer("second.weight_codes").shape == (4, 6)
    trainable = compact(model, graph, selection, integers=False)
    with torch.no_grad():
        assert torch.equal(trainable(X), small(X))
    trainable.train()(X).sum().backward()
    names = [name for name, p in trainable.named_parameters() if p.grad is not None]
    assert any("weight" in name for name in names)


def test_a_graph_made_before_quantization_works_after_it() -> None:
    model = net()
    graph = analyze(model, (X,))
    selection = graph.random_selection(0.5, seed=2)
    quantized(model, (X,))
    small = compact(model, graph, selection)
    assert small.info.max_difference <= 1e-12
    later = analyze(model, (X,))
    assert [(f.name, f.size, f.prunable) for f in later.families] == [(f.name, f.size, f.prunable) for f in graph.families]


def test_selection_is_read_from_the_zeros_of_the_model() -> None:
    model = net()
    graph = analyze(model, (X,))
    selection = graph.random_selection(0.5, seed=3)
    graph.zero_(model, selection)
    small = compact(model, graph)
    assert {name: kept.tolist() for name, kept in small.kept.items()} == {
        name: (~remove).nonzero().flatten().tolist() for name, remove in selection.items()
    }
    assert small.verify(X, reference=model) <= 1e-6


def test_a_family_that_is_zero_altogether_keeps_one_group() -> None:
    model = net()
    graph = analyze(model, (X,))
    with torch.no_grad():
        model.first.weight.zero_()
        model.first.bias.zero_()
    small = compact(model, graph)
    assert small.kept["first"].tolist() == [0]
    assert small.verify(X, reference=model) <= 1e-6


def test_model_is_left_as_it_was() -> None:
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    graph = analyze(model, (X,))
    small = compact(model, graph, graph.random_selection(0.5))
    assert model.training and small.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    stored = {tensor.data_ptr() for tensor in small.tensors().values()}
    assert not stored & {tensor.data_ptr() for tensor in model.state_dict().values()}


def test_costs_follow_the_cut() -> None:
    model = net()
    graph = analyze(model, (X,))
    small = compact(model, graph, graph.random_selection(0.5))
    assert small.cost.macs == 4 * (6 * 6 + 6 * 4 + 4 * 3)
    assert small.info.dense_cost is not None
    assert small.info.dense_cost["macs"] == 4 * (6 * 12 + 12 * 8 + 8 * 3)
    assert small.info.dense_cost["bops"] == small.info.dense_cost["macs"] * 1024
    assert small.cost.params == sum(p.numel() for p in small.parameters())


@dataclass
class Result:
    logits: torch.Tensor
    extra: list[torch.Tensor]


pytree.register_dataclass(Result, serialized_type_name="tests.Result")


class Structured(nn.Module):
    """Several inputs, keyword arguments, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor, *, pair: tuple[torch.Tensor, torch.Tensor], scale: float = 2.0) -> Result:
        hidden = torch.relu(self.first(x + pair[0])) * scale
        return Result(self.second(hidden), [pair[1], self.second(hidden).mean(1)])


def test_structured_inputs_and_outputs() -> None:
    model = Structured()
    kwargs = {"pair": (X, X + 1), "scale": 3.0}
    graph = analyze(model, (X,), kwargs)
    selection = graph.random_selection(0.5)
    small = compact(model, graph, selection)
    graph.zero_(model, selection)
    found, expected = small(X, scale=3.0, pair=(X, X + 1)), model(X, **kwargs)
    assert isinstance(found, Result)
    assert torch.allclose(found.logits, expected.logits, atol=1e-6) and len(found.extra) == 2
    with pytest.raises(BadModelError, match="pair"):
        small(X)


def test_structures_are_plain_json() -> None:
    tree = ((torch.zeros(1), [torch.zeros(1)]), {"b": torch.zeros(1), "a": Result(torch.zeros(1), [])})
    text = describe(pytree.tree_structure(tree))
    spec = rebuild(text)
    back = pytree.tree_unflatten([1, 2, 3, 4], spec)
    assert back[0] == (1, [2]) and back[1]["b"] == 3
    assert isinstance(back[1]["a"], Outputs) and back[1]["a"].logits == 4
    with pytest.raises(AttributeError, match="logits"):
        _ = back[1]["a"].nothing
    for bad in ("{", '["set",["*"]]', '["tuple"]', "3"):
        with pytest.raises(CheckpointError, match="malformed"):
            rebuild(bad)


def test_wrong_models_are_refused() -> None:
    model = net()
    graph = analyze(model, (X,))
    with pytest.raises(ConfigError, match="Sequential"):
        compact(nn.Linear(6, 3), graph)
    other = nn.Sequential(OrderedDict(first=nn.Linear(6, 3)))
    with pytest.raises(BadModelError, match="another model"):
        compact(other, graph)
    with pytest.raises(ConfigError, match="reaches the model output"):
        compact(model, graph, {"head": torch.tensor([True, False, False])})


class Changing(nn.Module):
    """Couples its layers only after a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head, self.tied = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.first(x), self.second(x)
        return self.head(a * b) if self.tied else self.head(a) + self.head(b.flip(1))


def test_a_model_that_changed_since_is_refused() -> None:
    model = Changing()
    model.tied = True
    graph = analyze(model, (X,))
    selection = {name: remove for name, remove in graph.random_selection(0.4, seed=1).items() if bool(remove.any())}
    model.tied = False
    with pytest.raises(BadModelError, match="analyze"):
        compact(model, graph, selection)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x)) + torch.rand(3)


def test_what_cannot_be_verified_is_not_handed_out() -> None:
    model = Noisy()
    graph = analyze(model, (X,))
    with pytest.raises(BadModelError, match="random"):
        compact(model, graph, graph.random_selection())
    assert compact(model, graph, graph.random_selection(), verify=False)(X).shape == (4, 3)


def test_half_precision_weights_as_integers() -> None:
    model = quantized(net().to(torch.bfloat16), (X.bfloat16(),))
    graph = analyze(model, (X.bfloat16(),))
    small = compact(model, graph, graph.random_selection())
    assert small(X.bfloat16()).dtype == torch.bfloat16


def test_running_statistics_move_in_training() -> None:
    model, args, _ = nets.NETS["resnet20_conv"]()
    graph = analyze(model, args)
    small = compact(model, graph, graph.random_selection()).train()
    before = small.net.get_buffer("bn1.num_batches_tracked").clone()
    small(*args)
    assert int(small.net.get_buffer("bn1.num_batches_tracked")) == int(before) + 1


def test_without_a_training_graph_it_says_so() -> None:
    class EvalOnly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise RuntimeError("only for inference")
            return self.head(self.first(x))

    model = EvalOnly().eval()
    graph = analyze(model, (X,))
    small = compact(model, graph, graph.random_selection())
    assert any("only for inference" in note for note in small.info.notes)
    with pytest.raises(BadModelError, match="no training graph"):
        small.train()


def test_without_gradients_the_same_values_come_out_and_follow_changes() -> None:
    model = quantized(net(), (X,))
    small = compact(model, analyze(model, (X,)), {})
    with torch.no_grad():
        lean = small(X)
        again = small(X)
    assert torch.equal(small(X).detach(), lean) and torch.equal(again, lean)
    with torch.no_grad():
        small.net.get_buffer("head.weight_scale").mul_(2.0)
        small.net.get_parameter("head.input_quantizer.d").mul_(1.5)
        changed = small(X)
    assert not torch.equal(changed, lean) and torch.equal(small(X).detach(), changed)
    with torch.inference_mode():
        assert torch.equal(small(X), changed)
    copied = copy.deepcopy(small).double()
    with torch.no_grad():
        assert copied(X.double()).dtype == torch.float64
        assert torch.equal(small(X), changed)


class AwkwardNames(nn.Module):
    """Names that a generated program could stumble over."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"in": nn.Linear(6, 8), "add": nn.Linear(8, 8), "class": nn.Linear(8, 3), "bits": nn.Linear(3, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts["bits"](self.parts["class"](torch.relu(self.parts["add"](torch.relu(self.parts["in"](x))))))


def test_any_module_name() -> None:
    model = AwkwardNames()
    small = compact(model, analyze(model, (X,)), analyze(model, (X,)).random_selection())
    assert small.info.max_difference <= 1e-6
    assert "net.parts.in.weight" in small.state_dict()
    moved = small.double()
    assert moved(X.double()).dtype == torch.float64


def test_verify_runs_on_the_inputs_it_is_given() -> None:
    model = quantized(net(), (X,))
    graph = analyze(model, (X,))
    small = compact(model, graph, graph.random_selection())
    assert small.verify(X * 3 + 1) <= 1e-12
    with torch.no_grad():
        small.net.get_parameter("head.bias").add_(0.5)
    assert small.verify(X) == pytest.approx(0.5, abs=1e-6)
    unverified = compact(model, graph, graph.random_selection(), verify=False)
    with pytest.raises(BadModelError, match="reference=zeroed_model"):
        unverified.verify(X)


def test_differences_are_measured_per_output() -> None:
    big, small = torch.tensor([1000.0]), torch.tensor([1.0, torch.nan, -torch.inf])
    assert max_difference([big, small], [big, small.clone()]) == (0.0, 0.0)
    assert max_difference([big, small], [big, small + 0.5])[1] == pytest.approx(0.5)
    assert max_difference([small], [torch.zeros(3)])[1] == float("inf")
    assert max_difference([big], [big.repeat(2)]) == (float("inf"), float("inf"))
    assert max_difference([torch.tensor([2, 3])], [torch.tensor([2, 5])])[0] == 2


class Auxiliary(nn.Module):
    """A second head that only training has, as Inception has it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head, self.other = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        x = self.first(x).relu()
        y = self.head(self.second(x).relu())
        return {"main": y, "auxiliary": self.other(x)} if self.training else y


def test_training_may_return_more_than_evaluation(tmp_path):
    torch.manual_seed(0)
    model = Auxiliary().eval()
    graph = analyze(model, (X,))
    selection = graph.random_selection(0.5)
    small = compact(model, graph, selection)
    graph.zero_(model, selection)
    small.save(tmp_path / "small")
    for one in (small, copy.deepcopy(small), geta.load(tmp_path / "small")):
        torch.testing.assert_close(one.eval()(X), model.eval()(X))
        found, expected = one.train()(X), model.train()(X)
        assert list(found) == ["main", "auxiliary"]
        torch.testing.assert_close(found, expected)
