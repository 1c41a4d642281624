"""The eager product: the user's own class, sliced, computes what the zeroed model and the graph product compute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import geta
import nets
from eager_checks import check, first_of, outputs, zeroed
from geta.graph import analyze
from geta.quant import Bits, quantize, quantizers
from geta.subnet import CompactModel, compact, compact_eager
from geta.subnet.attributes import Change, Sizes, applied, proposals
from geta.subnet.comparison import max_difference

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
EAGER_NETS = [
    "resnet20_conv",
    "vgg7_bn",
    "mobilenet_v2_like",
    "densenet_like",
    "shufflenet_like",
    "vit",
    "bert",
    "llama_gqa",
]


@pytest.mark.parametrize("name", EAGER_NETS)
def test_the_users_class_comes_back(name: str) -> None:
    model, args, kwargs = nets.NETS[name]()
    before, attributes = copy.deepcopy(model.state_dict()), [str(module) for module in model.modules()]
    graph = analyze(model, args, kwargs)
    selection = graph.random_selection(0.5, seed=1)
    product = compact_eager(model, graph, selection)
    small = product.model

    assert type(small) is type(model) and not small.training
    assert list(small.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [str(module) for module in model.modules()] == attributes
    stored = {tensor.data_ptr() for tensor in small.state_dict().values() if tensor.numel()}
    assert not stored & {tensor.data_ptr() for tensor in model.state_dict().values()}

    expected = outputs(zeroed(model, graph, selection), args, kwargs)
    found = outputs(small, args, kwargs)
    assert max_difference(outputs(model, args, kwargs), expected)[1] > 1e-4
    assert max_difference(expected, found)[1] <= 1e-5
    if name in ("vgg7_bn", "densenet_like", "bert", "llama_gqa"):
        assert max_difference(outputs(compact(model, graph, selection), args, kwargs), found)[1] <= 1e-5
    assert product.max_difference <= 1e-5
    assert {key: len(kept) for key, kept in product.kept.items()} == {key: int((~gone).sum()) for key, gone in selection.items()}

    sum(leaf.square().sum() for leaf in pytree.tree_leaves(small.train()(*args, **kwargs)) if isinstance(leaf, Tensor)).backward()
    assert [key for key, p in small.named_parameters() if p.grad is None or p.grad.shape != p.shape] == []


def test_attributes_of_torch_layers_say_what_they_are() -> None:
    product = check(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.GroupNorm(4, 16),
            nn.PReLU(16),
            nn.Conv2d(16, 12, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(12, 8, 2, stride=2),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.InstanceNorm2d(8, affine=True),
            nn.Flatten(),
            nn.Linear(8 * 6 * 6, 5),
        ),
        (nets.image(size=6),),
    )
    layers = list(product.model)
    assert layers[1].num_groups == 2 and layers[1].num_channels == layers[0].out_channels == 8
    assert layers[2].num_parameters == layers[3].in_channels == 8
    assert layers[5].in_channels == layers[3].out_channels
    assert layers[6].num_features == layers[5].out_channels == layers[7].groups == layers[7].in_channels == layers[8].num_features == 4
    assert layers[10].in_features == layers[10].weight.shape[1] == 4 * 36
    assert "7.groups: 8 -> 4" in product.changes


class Attention(nn.Module):
    """Packed projection, both numbers written into the reshape."""

    def __init__(self, dim: int, heads: int, size: int, fixed: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fixed, self.scale = heads, size, fixed, size**-0.5
        self.inner_dim = heads * size
        self.qkv, self.proj = nn.Linear(dim, 3 * self.inner_dim), nn.Linear(self.inner_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        last = self.head_dim if self.fixed else -1
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.num_heads, last).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, count, self.inner_dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.hidden_features = hidden
        self.first, self.second = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).view(*x.shape[:-1], self.hidden_features))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, size: int, fixed: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, heads, size, fixed), Mlp(dim, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def transformer(fixed: bool = True, blocks: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nets.randomize(nn.Sequential(*[Block(24, 6, 4, fixed) for _ in range(blocks)], nn.LayerNorm(24))).eval()


@pytest.mark.parametrize("fixed", [True, False], ids=["both numbers", "heads and -1"])
def test_numbers_of_user_modules_follow(fixed: bool) -> None:
    """Every block keeps another number of heads and neurons."""
    model = transformer(fixed)
    product = check(model, (TOKENS,), first_of(analyze(model, (TOKENS,)), 2, every=4))
    for number, block in enumerate(product.model[:4]):
        attention, mlp = block.attn, block.mlp
        assert attention.inner_dim == attention.proj.in_features == attention.num_heads * 4
        assert mlp.hidden_features == mlp.first.out_features < 40
        assert attention.head_dim == 4 and attention.scale == 0.5
        assert f"{number}.attn.num_heads: 6 -> {attention.num_heads}" in product.changes


class Settings:
    """Plain settings that all blocks of a model share."""

    def __init__(self, heads: int, size: int) -> None:
        self.n_units, self.size = heads, size


class ByHand(nn.Module):
    """The number of heads stands in a shared object, under an unusual name."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        inner = settings.n_units * settings.size
        self.q, self.k, self.v, self.o = nn.Linear(24, inner), nn.Linear(24, inner), nn.Linear(24, inner), nn.Linear(inner, 24)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.settings.n_units, self.settings.size)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.o(mixed.transpose(1, 2).flatten(2))


def test_a_shared_settings_object_is_copied_where_it_changes() -> None:
    torch.manual_seed(0)
    settings = Settings(6, 4)
    model = nn.Sequential(ByHand(settings), ByHand(settings), ByHand(settings))
    graph = analyze(model, (TOKENS,))
    product = check(model, (TOKENS,), first_of(graph, 2, every=3))
    assert sorted(layer.settings.n_units for layer in product.model) == [2, 3, 4]
    assert settings.n_units == 6 and all(layer.settings is settings for layer in model)


class HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(x)).view(x.shape[0], 4, 16).flatten(1))


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.body = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_constant_in_the_code_gives_the_graph_product_and_the_reason() -> None:
    model = Outer(HardCoded()).eval()
    graph = analyze(model, (X,))
    selection = graph.random_selection(0.5)
    with pytest.raises(geta.BadModelError, match=r"Outer.*in 'body' \(HardCoded\): RuntimeError: shape '\[4, 4, 16\]' is invalid"):
        compact(model, graph, selection, product="eager")
    small = compact(model, graph, selection, product="auto")
    assert isinstance(small, CompactModel)
    assert [note for note in small.info.notes if "no eager product" in note and "'body' (HardCoded)" in note]
    assert "\n" not in small.info.notes[-1]
    assert max_difference(outputs(zeroed(model, graph, selection), (X,)), outputs(small, (X,)))[1] <= 1e-5


def test_auto_hands_out_the_users_class_where_it_can() -> None:
    model = transformer(blocks=1)
    graph = analyze(model, (TOKENS,))
    assert type(compact(model, graph, graph.random_selection(), product="auto")) is nn.Sequential
    assert isinstance(compact(model, graph, graph.random_selection()), CompactModel)


def test_padding_shortcuts_work_or_say_why() -> None:
    model, args, _ = nets.NETS["resnet20_pad"]()
    graph = analyze(model, args)
    selection = graph.random_selection(0.5, seed=1)
    small = compact(model, graph, selection, product="auto")
    assert max_difference(outputs(zeroed(model, graph, selection), args), outputs(small, args))[1] <= 1e-5
    if isinstance(small, CompactModel):
        assert any("BasicBlock" in note for note in small.info.notes)
    else:
        assert small.layer2[0].extra == small.layer2[0].conv2.out_channels - small.layer2[0].conv1.in_channels


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_quantizers_stay(granularity: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    graph = analyze(model, (X,))
    quantize(model, weights=Bits(4, 8), activations=Bits(8, 8), calibration=[(X,)], granularity=granularity, exclude=())
    selection = graph.random_selection(0.5, seed=1)
    small = compact(model, graph, selection, product="eager")
    assert list(small.state_dict()) == list(model.state_dict())
    assert list(quantizers(small)) == list(quantizers(model))
    assert small[2].parametrizations.weight.original.shape == (4, 6) and small[2].in_features == 6
    assert small[2].parametrizations.weight[0].d.numel() == (4 if granularity == "channel" else 1)
    assert max_difference(outputs(zeroed(model, graph, selection), (X,)), outputs(small, (X,)))[1] <= 1e-4


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Linear(6, 10, bias=False), nn.Linear(6, 8)
        self.back, self.again, self.head = nn.Linear(8, 10), nn.Linear(8, 10), nn.Linear(10, 3)
        self.again.weight = self.back.weight
        self.inner.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.inner(x))
        return self.head(torch.relu(self.back(y)) + torch.relu(self.again(y)) + self.embed(x))


def test_tied_tensors_stay_tied_and_frozen_ones_frozen() -> None:
    torch.manual_seed(0)
    small = check(Tied(), (X,)).model
    assert small.back.weight is small.again.weight and small.back.weight.shape == (5, 4)
    assert isinstance(small.inner.bias, nn.Parameter) and not small.inner.bias.requires_grad
    assert small.again.in_features == 4 and small.again.out_features == 5


def test_a_state_dict_goes_into_a_freshly_sliced_model(tmp_path: Path) -> None:
    model = transformer(blocks=1)
    graph = analyze(model, (TOKENS,))
    selection = graph.random_selection(0.5)
    small = compact(model, graph, selection, product="eager")
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(1.1)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    fresh = compact(model, graph, selection, product="eager")
    fresh.load_state_dict(load_file(tmp_path / "small.safetensors"))
    assert torch.equal(fresh(TOKENS), small(TOKENS)) and not torch.equal(fresh(TOKENS), model(TOKENS))


def test_zero_groups_are_read_from_the_model_and_it_can_be_pruned_again() -> None:
    model = transformer(blocks=1)
    graph = analyze(model, (TOKENS,))
    graph.zero_(model, first_of(graph, 4))
    small = compact(model, graph, product="eager")
    assert small[0].attn.num_heads == 4
    again = analyze(small, (TOKENS,))
    smaller = compact(small, again, first_of(again, 3), product="eager")
    assert smaller[0].attn.num_heads == 3 and small[0].attn.num_heads == 4


class TwoHeaded(nn.Module):
    """An auxiliary head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head, self.aux = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.norm(self.body(x)))
        return (self.head(y), self.aux(y)) if self.training else self.head(y)


def test_training_only_parts_are_cut_too() -> None:
    torch.manual_seed(0)
    model = nets.randomize(TwoHeaded())
    before = copy.deepcopy(model.state_dict())
    small = check(model, (X,)).model
    assert small.aux.in_features == small.aux.weight.shape[1] == 4
    assert small.train()(X)[1].shape == (4, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TrainingConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head(y.view(-1, 8) if self.training else y)


def test_a_product_that_could_not_train_is_none() -> None:
    model = TrainingConstant().eval()
    graph = analyze(model, (X,))
    with pytest.raises(geta.BadModelError, match="fails in training mode: RuntimeError: mat1"):
        compact_eager(model, graph, graph.random_selection())


def test_half_precision() -> None:
    model = transformer(blocks=1).to(torch.bfloat16)
    tokens = TOKENS.bfloat16()
    graph = analyze(model, (tokens,))
    product = compact_eager(model, graph, graph.random_selection())
    assert product.model(tokens).dtype == torch.bfloat16 and product.max_difference <= 1e-6
    assert product.model[0].attn.num_heads == 3


def test_an_inexact_removal_has_no_eager_product() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)).eval()
    graph = analyze(model, (X,), exact=False)
    with pytest.raises(geta.BadModelError, match="removing groups of '0' changes the result"):
        compact_eager(model, graph, graph.random_selection())


def test_multihead_attention_says_why_not() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True).eval()
    graph = analyze(model, (TOKENS,))
    heads = [family for family in graph.prunable_families if family.unit == "heads"]
    neurons = [family for family in graph.prunable_families if family.size == 32]
    assert len(neurons) == 1
    small = compact(model, graph, {neurons[0].name: torch.arange(32) % 2 == 0}, product="eager")
    assert type(small) is nn.TransformerEncoderLayer and small.linear1.out_features == 16
    for family in heads:
        with pytest.raises(geta.BadModelError, match=r"'self_attn' \(MultiheadAttention\)"):
            compact(model, graph, {family.name: torch.arange(family.size) >= 2}, product="eager")


def test_what_cannot_be_decided_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).eval()
    graph = analyze(model, (X,))
    selection = graph.random_selection()
    with pytest.raises(geta.ConfigError, match="verify=True"):
        compact(model, graph, selection, product="eager", verify=False)
    with pytest.raises(geta.ConfigError, match="'graph', 'eager' or 'auto'"):
        compact(model, graph, selection, product="best")  # type: ignore[call-overload]
    with pytest.raises(geta.ConfigError, match="Sequential"):
        compact_eager(nn.Linear(6, 3), graph)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    graph = analyze(empty, (X.to("meta"),))
    with pytest.raises(geta.BadModelError, match="meta device"):
        compact_eager(empty, graph, selection)


class NoCopy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x))

    def __deepcopy__(self, memo: dict[int, Any]) -> NoCopy:
        raise TypeError("there is only one of me")


def test_a_model_that_refuses_a_copy() -> None:
    model = NoCopy().eval()
    graph = analyze(model, (X,))
    with pytest.raises(geta.BadModelError, match=r"can't be copied .*only one of me"):
        compact_eager(model, graph, graph.random_selection())


def test_the_same_trials_every_time() -> None:
    model = transformer(blocks=2)
    graph = analyze(model, (TOKENS,))
    changes = [compact_eager(model, graph, graph.random_selection()).changes for _ in range(2)]
    assert changes[0] == changes[1]


def test_proposals_are_ordered_by_how_usual_they_are() -> None:
    module = Attention(24, 6, 4)
    found = proposals("a", module, Sizes(((72, 36), (24, 12)), ((6, 3),)))
    assert [str(one.change) for one in found[:2]] == ["a.num_heads: 6 -> 3", "a.inner_dim: 24 -> 12"]
    assert {one.change.path for one in found} == {("num_heads",), ("inner_dim",), ("head_dim",)}
    assert all(one.change.before != one.change.after for one in found)


def test_trial_changes_are_taken_back() -> None:
    settings = Settings(6, 4)
    model = nn.Sequential(ByHand(settings))
    changes = [Change("0", ("settings", "n_units"), 6, 3), Change("0", ("settings", "size"), 4, 2)]
    with applied(model, changes):
        assert (model[0].settings.n_units, model[0].settings.size) == (3, 2)
        assert settings.n_units == 6
    assert model[0].settings is settings and [str(c) for c in changes] == ["0.settings.n_units: 6 -> 3", "0.settings.size: 4 -> 2"]
    assert (settings.n_units, settings.size) == (6, 4)
