"""What the user may forbid or force: protected tensors, units, granularity; and the suggestions that would allow more."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import nets
from geta.errors import ConfigError
from geta.graph import DependencyGraph, Family, analyze
from geta.graph.capture import capture
from geta.graph.dependency import _loosened, analyse_capture
from geta.graph.solver import Solver
from geta.quant import Bits, quantize
from geta.subnet import compact
from geta.subnet.comparison import max_difference

IMAGE = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


class Plain(nn.Module):
    """Three convolutions without norms, so that nothing but a wish can protect the middle one; `conv10` resembles `conv1`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.conv10 = nn.Conv2d(6, 8, 3)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv10(torch.relu(self.conv1(x)))
        return self.head(self.body(x).mean((2, 3)))


class Grouped(nn.Module):
    """A convolution with four groups of three channels each on both sides, between two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 1)
        self.middle = nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.last = nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


def family(graph: DependencyGraph, name: str) -> Family:
    return next(family for family in graph.families if family.name == name)


def prunable(graph: DependencyGraph) -> list[tuple[str, str, int]]:
    return [(one.name, one.unit, one.size) for one in graph.prunable_families]


def check_identity(model: nn.Module, graph: DependencyGraph, args: tuple[object, ...], kwargs: dict[str, object]) -> nn.Module:
    """Removing half of the groups changes the dense output, and the compact one equals the zeroed one in both modes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    selection = graph.random_selection(0.5, seed=3)
    small = compact(model, graph, selection)
    zeroed = copy.deepcopy(model)
    graph.zero_(zeroed, selection)

    def run(net: nn.Module, training: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            return [leaf for leaf in pytree.tree_leaves(net.train(training)(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]

    assert max_difference(run(model, False), run(zeroed, False))[1] > 1e-4, "removing groups changed nothing"
    for training in (False, True):
        assert max_difference(run(zeroed, training), run(small, training))[1] <= 2e-5
    return small


# ---- protect ---------------------------------------------------------------------------------------------------------


def test_a_protected_module_keeps_every_shape() -> None:
    model = Plain().eval()
    graph = analyze(model, IMAGE, protect=["conv10"])
    assert prunable(analyze(model, IMAGE)) == [("conv1", "channels", 6), ("conv10", "channels", 8), ("body.1", "channels", 4)]
    assert prunable(graph) == [("body.1", "channels", 4)]
    for name in ("conv1", "conv10"):
        assert family(graph, name).reason == "was protected by protect='conv10'"
        assert family(graph, name).suggestion == "take 'conv10' out of protect"
    small = check_identity(model, graph, IMAGE, {})
    assert small.net.get_parameter("conv10.weight").shape == (8, 6, 3, 3)
    assert small.net.get_parameter("body.1.weight").shape == (2, 8, 1, 1)


@pytest.mark.parametrize(
    ("protect", "left"),
    [
        ("conv1", ["conv10", "body.1"]),
        (["conv1*"], ["body.1"]),
        (["body"], ["conv1"]),
        (["body.*"], ["conv1"]),
        (["*.1"], ["conv1"]),
        (["conv1.bias"], ["conv10", "body.1"]),
        (["conv1", "head"], ["conv10"]),
        ([], ["conv1", "conv10", "body.1"]),
    ],
)
def test_globs_mean_tensors_and_whole_modules(protect: list[str] | str, left: list[str]) -> None:
    graph = analyze(Plain(), IMAGE, protect=protect)
    assert [name for name, _, _ in prunable(graph)] == left


def test_other_reasons_are_told_before_a_wish_and_kernels_stay_hidden() -> None:
    graph = analyze(Plain(), IMAGE, protect=["*"])
    reasons = {one.name: one.reason for one in graph.families}
    assert reasons == {
        "conv1": "was protected by protect='*'",
        "conv1 (inputs)": "must match a tensor of fixed size, such as a model input, in conv2d at conv1",
        "conv10": "was protected by protect='*'",
        "body.1": "was protected by protect='*'",
        "head": "reaches the model output",
    }
    assert [one.suggestion for one in graph.families if one.name in ("conv1 (inputs)", "head")] == ["", ""]


def test_one_dimension_alone_can_be_protected() -> None:
    """`conv10:1` are the channels that it reads, those of the convolution before; what it makes may go."""
    made, read = (analyze(Plain(), IMAGE, protect=[glob]) for glob in ("conv10:0", "conv10.weight:1"))
    assert [name for name, _, _ in prunable(made)] == ["conv1", "body.1"]
    assert [name for name, _, _ in prunable(read)] == ["conv10", "body.1"]
    assert family(read, "conv1").reason == "was protected by protect='conv10.weight:1'"
    assert family(read, "conv1").suggestion == "take 'conv10.weight:1' out of protect"
    with pytest.raises(ConfigError, match=r"protect='conv10:4': none of the 2 tensors has a dimension 4"):
        analyze(Plain(), IMAGE, protect=["conv10:4"])


def test_a_tied_tensor_is_protected_by_any_of_its_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(4, 6)
            self.inner = nn.Linear(6, 6, bias=False)
            self.twin = nn.Linear(6, 6, bias=False)
            self.twin.weight = self.inner.weight
            self.leave = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.leave(torch.relu(self.twin(torch.relu(self.inner(torch.relu(self.enter(x)))))))

    x = (torch.zeros(2, 4),)
    assert prunable(analyze(Tied(), x)) == [("enter", "neurons", 6)]
    assert prunable(analyze(Tied(), x, protect=["twin"])) == []


def test_a_glob_that_matches_nothing_is_an_error_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"protect='haed' matches no tensor and no module.*did you mean 'head'"):
        analyze(Plain(), IMAGE, protect=["haed"])
    with pytest.raises(ConfigError, match=r"protect='body.0' matches no tensor"):
        analyze(Plain(), IMAGE, protect=["body.0"])  # a ReLU has nothing to protect
    with pytest.raises(ConfigError, match="Plain has conv1, conv10"):
        analyze(Plain(), IMAGE, protect=["zzzzzzzz"])
    with pytest.raises(ConfigError, match="protect holds ''"):
        analyze(Plain(), IMAGE, protect=[""])


def test_wishes_hold_after_quantization() -> None:
    model = Plain().eval()
    graph = analyze(model, IMAGE, protect=["conv10"])
    quantize(model, weights=Bits(8, 8), activations=None)
    again = analyze(model, IMAGE, protect=["conv10"])
    assert prunable(again) == prunable(graph) == [("body.1", "channels", 4)]
    small = compact(model, graph, graph.random_selection(0.5))
    assert small.net.get_buffer("conv10.weight_codes").shape == (8, 6, 3, 3)


# ---- prune -----------------------------------------------------------------------------------------------------------


def test_only_the_named_units_are_pruned() -> None:
    model, args, kwargs = nets.NETS["vit"]()
    graph = analyze(model, args, kwargs, prune=["heads"])
    assert {unit for _, unit, _ in prunable(graph)} == {"heads"} and len(prunable(graph)) == 2
    mlp = family(graph, "vit.layers.0.mlp.fc1")
    assert (mlp.prunable, mlp.reason, mlp.suggestion) == (False, "was excluded by prune='heads'", "add 'neurons' to prune")
    assert family(graph, "classifier").reason == "reaches the model output"
    with pytest.raises(ConfigError, match="can't be pruned: it was excluded by prune='heads'"):
        graph.zero_(model, {mlp.name: torch.ones(mlp.size, dtype=torch.bool)})


def test_heads_cover_key_value_groups() -> None:
    model, args, kwargs = nets.NETS["llama_gqa"]()
    assert {unit for _, unit, _ in prunable(analyze(model, args, kwargs, prune="heads"))} == {"key-value groups"}


def test_unknown_and_absent_units_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"prune names 'filters', but this model has families of channels, neurons \(possible are"):
        analyze(Plain(), IMAGE, prune=["filters"])
    with pytest.raises(ConfigError, match=r"prune names 'heads', but this model has families of channels, neurons$"):
        analyze(Plain(), IMAGE, prune=["channels", "heads"])
    with pytest.raises(ConfigError, match="prune is empty"):
        analyze(Plain(), IMAGE, prune=[])


# ---- granularity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "vit",
            [
                ("vit.layers.0.attention.q_proj.weight", 8, {"q_proj.weight": 4, "q_proj.bias": 4, "k_proj.weight": 4, "k_proj.bias": 4}),
                ("vit.layers.0.attention.v_proj.weight", 8, {"v_proj.weight": 4, "v_proj.bias": 4, "o_proj.weight": 4}),
            ],
        ),
        (
            "bert",
            [
                (
                    "bert.encoder.layer.0.attention.self.query.weight",
                    8,
                    {"query.weight": 4, "query.bias": 4, "key.weight": 4, "key.bias": 4},
                ),
                ("bert.encoder.layer.0.attention.self.value.weight", 8, {"value.weight": 4, "value.bias": 4, "dense.weight": 4}),
            ],
        ),
        # Rotary embeddings couple position d with d + 4 of all heads, and their table couples the layers.
        (
            "llama_gqa",
            [
                ("model.layers.0.self_attn.q_proj.weight", 4, {"q_proj.weight": 8, "k_proj.weight": 4}),
                ("model.layers.0.self_attn.v_proj.weight", 8, {"v_proj.weight": 2, "o_proj.weight": 4}),
            ],
        ),
    ],
)
def test_head_dims_are_pruned_exactly(name: str, expected: list[tuple[str, int, dict[str, int]]]) -> None:
    model, args, kwargs = nets.NETS[name]()
    graph = analyze(model, args, kwargs, granularity="head_dim")
    assert {unit for _, unit, _ in prunable(graph)} == {"head dims", "neurons"} and not graph.notes
    owner = {member.param: one for one in graph.prunable_families for member in one.members if member.dim == 0}
    for tensor, size, rows in expected:
        found = owner[tensor]
        assert (found.unit, found.size) == ("head dims", size)
        assert {m.param.split(".", m.param.count(".") - 1)[-1]: m.index.shape[1] for m in found.members if m.role != "buffer"} == rows
    q = owner[expected[0][0]].members[0]
    assert q.index[1].tolist() == ([1, 5, 9, 13, 17, 21, 25, 29] if name == "llama_gqa" else [1, 9, 17, 25])
    check_identity(model, graph, args, kwargs)


class Fused(nn.Module):
    """One projection makes queries, keys and values; the scores get a trained bias per head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 48), nn.Linear(16, 3)
        self.bias = nn.Parameter(torch.randn(4, 5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 4, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (0.5 * q @ k.transpose(-2, -1) + self.bias).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).flatten(2))


def test_a_bias_per_head_stays_whole_when_head_dims_go() -> None:
    torch.manual_seed(0)
    model, x = Fused().eval(), (torch.randn(2, 5, 8),)
    heads = analyze(model, x, granularity="head").prunable_families
    assert [(one.size, one.members[0].param) for one in heads] == [(4, "bias")]
    graph = analyze(model, x, granularity="head_dim")
    assert prunable(graph) == [("qkv", "head dims", 4)]
    assert family(graph, "qkv").members[0].index[1].tolist() == list(range(1, 48, 4))  # one view makes q, k and v, so they go together
    check_identity(model, graph, x, {})


def test_granularity_is_chosen_per_module() -> None:
    model, args, kwargs = nets.NETS["vit"]()
    graph = analyze(model, args, kwargs, granularity={"vit.layers.1": "head_dim", "*": "head"})
    units = {name: (unit, size) for name, unit, size in prunable(graph)}
    assert units["vit.layers.0.attention"] == ("heads", 4)
    assert units["vit.layers.1.attention"] == units["vit.layers.1.attention.v_proj"] == ("head dims", 8)
    check_identity(model, graph, args, kwargs)


def test_whole_groups_of_a_convolution() -> None:
    torch.manual_seed(0)
    model = Grouped().eval()
    usual = family(analyze(model, IMAGE), "first")
    assert usual.members[0].index.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert analyze(model, IMAGE, granularity="channel").to_json() == analyze(model, IMAGE).to_json()
    graph = analyze(model, IMAGE, granularity={"middle": "group"})
    groups = family(graph, "first")
    assert (groups.size, groups.members[0].index.tolist()) == (4, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])
    small = check_identity(model, graph, IMAGE, {})
    assert small.net.get_parameter("middle.weight").shape == (6, 3, 3, 3)


def test_a_granularity_without_effect_is_noted_and_a_wrong_one_is_an_error() -> None:
    graph = analyze(Plain(), IMAGE, granularity="head_dim")
    assert graph.notes == ["granularity 'head_dim' for '*' decided nothing: there is no attention over heads there"]
    graph = analyze(Grouped(), IMAGE, granularity={"first": "group", "middle": "group"})
    assert graph.notes == ["granularity 'group' for 'first' decided nothing: there is no convolution with groups there"]
    with pytest.raises(ConfigError, match="granularity 'heads' for '\\*' is none of head, head_dim, group, channel"):
        analyze(Plain(), IMAGE, granularity="heads")
    with pytest.raises(ConfigError, match=r"granularity: 'midle' matches no module; did you mean 'middle'"):
        analyze(Grouped(), IMAGE, granularity={"midle": "group"})


# ---- suggestions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "bert", "llama_gqa"])
def test_exact_false_is_suggested_exactly_where_it_helps(name: str) -> None:
    model, args, kwargs = nets.NETS[name]()
    strict = analyze(model, args, kwargs)
    loose = {(one.members[0].param, one.members[0].dim): one for one in analyze(model, args, kwargs, exact=False).families}
    hopeful = [one for one in strict.families if one.suggestion == "would become prunable with exact=False"]
    assert hopeful
    for one in strict.families:
        if not one.prunable:
            assert loose[one.members[0].param, one.members[0].dim].prunable == (one in hopeful)
    assert not any(one.suggestion for one in strict.prunable_families)
    assert f"suggestion for {hopeful[0].name} (32 groups): would become prunable with exact=False" in str(strict)
    assert f'"suggestion": "{hopeful[0].suggestion}"' in strict.to_json()


class Ragged(nn.Module):
    """Two axes of one tensor could shrink, one of them across a LayerNorm: the choice depends on `exact`."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 24)
        self.norm = nn.LayerNorm(6, elementwise_affine=False)
        self.leave = nn.Linear(24, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(self.norm(self.enter(x).unflatten(1, (4, 6))).flatten(1))


@pytest.mark.parametrize("name", ["vit", "bert", "Ragged"])
def test_the_loosened_partition_is_the_one_that_solving_again_finds(name: str) -> None:
    model, args, kwargs = (Ragged(), (torch.zeros(2, 4),), {}) if name == "Ragged" else nets.NETS[name]()
    solved = analyse_capture(model, capture(model, args, kwargs), exact=True)
    assert solved.partition.swayed == (name == "Ragged")
    found = solved.propagation
    real, loose = Solver(found.space.size, found.constraints, exact=False).solve(), _loosened(solved)
    assert loose is not None and np.array_equal(real.root, loose.root) and set(real.frozen) == set(loose.frozen)
    assert set(real.frozen) < set(solved.partition.frozen) or name == "Ragged"
    assert analyse_capture(model, solved.capture, exact=True).partition.frozen == solved.partition.frozen


def test_a_rule_is_suggested_for_an_unknown_operator() -> None:
    @torch.library.custom_op("geta_test_limits::mystery", mutates_args=())
    def mystery(x: torch.Tensor) -> torch.Tensor:
        return x.flip(1)

    mystery.register_fake(torch.empty_like)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.leave(mystery(self.enter(x)))

    graph = analyze(Net(), (torch.zeros(2, 4),))
    assert "geta_test_limits.mystery" in family(graph, "enter").reason
    assert family(graph, "enter").suggestion == "write a rule for the operator: @geta.rule('geta_test_limits::mystery')"
