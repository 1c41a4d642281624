"""Which families are found, what they are called and why some can't be pruned."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nets
from geta.errors import BadModelError, ConfigError
from geta.graph import DependencyGraph, analyze
from geta.graph.coupling import build_families


def signature(graph: DependencyGraph) -> list[tuple[str, str, int, bool]]:
    return [(family.name, family.unit, family.size, family.prunable) for family in graph.families]


def members(graph: DependencyGraph, name: str) -> set[tuple[str, int, bool, int]]:
    family = next(family for family in graph.families if family.name == name)
    return {(m.param, m.dim, m.zero, m.index.shape[1]) for m in family.members if m.role != "buffer"}


class Two(nn.Module):
    """conv -> bn -> relu -> conv -> pool -> linear."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.activation = activation
        self.second = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.activation(self.norm(self.first(x)))).mean((2, 3)))


IMAGE = (torch.zeros(2, 3, 8, 8),)


def test_plain_network() -> None:
    graph = analyze(Two(nn.ReLU()), IMAGE)
    assert signature(graph) == [
        ("first", "channels", 6, True),
        ("first (inputs)", "channels", 3, False),
        ("second", "channels", 4, True),
        ("head", "neurons", 2, False),
    ]
    assert members(graph, "first") == {
        ("first.weight", 0, True, 1),
        ("norm.weight", 0, True, 1),
        ("norm.bias", 0, True, 1),
        ("second.weight", 1, False, 1),
    }
    reasons = {family.name: family.reason for family in graph.families}
    assert "model input" in reasons["first (inputs)"]
    assert reasons["head"] == "reaches the model output"
    assert graph.num_groups == 10


def test_consumer_joins_the_zeroed_slices_only_where_it_sees_a_nonzero_value() -> None:
    graph = analyze(Two(nn.Sigmoid()), IMAGE)
    assert ("second.weight", 1, True, 1) in members(graph, "first")
    assert ("head.weight", 1, False, 1) in members(graph, "second")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit", {"heads": 2, "neurons": 2}),
        ("bert", {"heads": 2, "neurons": 3}),
        ("llama_gqa", {"key-value groups": 2, "neurons": 2}),
    ],
)
def test_transformers_have_heads_and_neurons(name: str, expected: dict[str, int]) -> None:
    model, args, kwargs = nets.NETS[name]()
    graph = analyze(model, args, kwargs)
    found: dict[str, int] = {}
    for family in graph.prunable_families:
        found[family.unit] = found.get(family.unit, 0) + 1
    assert found == expected
    stream = [family for family in graph.families if family.unit == "features" and not family.prunable]
    assert stream and any("layer_norm" in f.reason or "mean" in f.reason for f in stream)


def test_gqa_group_takes_all_its_query_heads() -> None:
    model, args, kwargs = nets.NETS["llama_gqa"]()
    graph = analyze(model, args, kwargs)
    rows = {m[0].rpartition(".self_attn.")[2]: m[3] for m in members(graph, "model.layers.0.self_attn")}
    assert rows["q_proj.weight"] == 2 * rows["k_proj.weight"] == 2 * rows["v_proj.weight"] == rows["o_proj.weight"]


def test_residual_width_is_prunable_when_inexact_is_allowed() -> None:
    model, args, kwargs = nets.NETS["vit"]()
    exact = {family.name for family in analyze(model, args, kwargs).prunable_families}
    loose = analyze(model, args, kwargs, exact=False)
    added = [family for family in loose.prunable_families if family.name not in exact]
    assert any("layer_norm" in family.inexact for family in added)


def test_padding_shortcut_gives_the_new_channels_no_partner() -> None:
    model, args, kwargs = nets.NETS["resnet20_pad"]()
    graph = analyze(model, args, kwargs)
    sizes = sorted(family.size for family in graph.prunable_families)
    assert graph.num_groups == 400 and sizes.count(16) >= 4


class Odd(nn.Module):
    """Each branch of `forward` holds one thing that must stay."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.second, self.what = nn.Linear(4, 6), nn.Linear(6, 2), what
        self.gate = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.what == "unknown op":
            y = torch.cummax(y, 1).values
        if self.what == "normed":
            y = F.layer_norm(y, (6,))
        if self.what == "gather":
            y = torch.gather(y, 1, torch.zeros(y.shape[0], 6, dtype=torch.long))
        if self.what == "stride":
            y = y[:, ::4].repeat(1, 3)
        if self.what == "position":
            y = y * torch.arange(6.0)
        if self.what == "divisor":
            y = self.gate / y
        return self.second(y)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("unknown op", "aten.cummax at the model itself has no rule"),
        ("normed", "crosses layer_norm"),
        ("gather", "is gathered by index in gather"),
        ("stride", "sliced with a step"),
        ("position", "fixed size"),
        ("divisor", "divides by"),
    ],
)
def test_what_must_stay_says_why(what: str, words: str) -> None:
    graph = analyze(Odd(what), (torch.zeros(3, 4),))
    family = next(f for f in graph.families if any((m.param, m.dim) == ("first.weight", 0) for m in f.members))
    assert not family.prunable
    assert words in family.reason
    assert family.name in str(graph) and family.reason in str(graph)


class OutputOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def test_unused_parameters_are_not_prunable() -> None:
    graph = analyze(OutputOnly(), (torch.zeros(2, 4),))
    assert graph.num_groups == 0
    assert any("never used" in family.reason for family in graph.families if family.name.startswith("unused"))


def test_model_is_left_as_it_was() -> None:
    model = Two(nn.ReLU())
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    analyze(model, IMAGE)
    assert model.training and not model.norm.training and model.first.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_meta_device_needs_no_weights() -> None:
    with torch.device("meta"):
        model = Two(nn.ReLU())
        graph = analyze(model, (torch.zeros(2, 3, 8, 8),))
    assert graph.num_groups == 10


def test_shared_module_counts_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 2)
            self.same = self.inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.same(torch.relu(self.inner(x)))))

    graph = analyze(Shared(), (torch.zeros(2, 5),))
    names = {member.param for family in graph.families for member in family.members}
    assert not any(name.startswith("same") for name in names)
    assert graph.num_groups == 0  # its rows are its own columns, and those read the model's input


def test_json_and_dot() -> None:
    graph = analyze(Two(nn.ReLU()), IMAGE)
    record = json.loads(graph.to_json())
    assert record["format"] == 1 and record["num_groups"] == 10
    assert record["families"][0]["members"][0] == {
        "param": "first.weight", "dim": 0, "rows_per_group": 1, "role": "producer", "zero": True,
    }  # fmt: skip
    assert graph.to_dot().startswith("graph") and '"second"' in graph.to_dot()


def test_same_result_under_any_hash_seed() -> None:
    code = (
        "import torch, nets; from geta.graph import analyze; m, a, k = nets.NETS['mobilenet_v2_like'](); "
        "g = analyze(m, a, k); print(g.to_json())"
    )
    outputs = set()
    for seed in ("1", "77"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        outputs.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout)
    assert len(outputs) == 1


def test_selection_is_checked() -> None:
    graph = analyze(Two(nn.ReLU()), IMAGE)
    with pytest.raises(ConfigError, match="does not have"):
        graph.check_selection({"nothing": torch.zeros(1, dtype=torch.bool)})
    with pytest.raises(ConfigError, match=r"BoolTensor\[6\]"):
        graph.check_selection({"first": torch.zeros(5, dtype=torch.bool)})
    with pytest.raises(ConfigError, match="reaches the model output"):
        graph.check_selection({"head": torch.tensor([True, False])})
    with pytest.raises(ConfigError, match="keep at least one"):
        graph.check_selection({"first": torch.ones(6, dtype=torch.bool)})
    with pytest.raises(ConfigError, match="below 1"):
        graph.random_selection(1.0)
    with pytest.raises(ConfigError, match="multiple_of"):
        graph.random_selection(0.5, multiple_of=0)


@pytest.mark.parametrize("multiple", [1, 2, 4, 5, 100])
def test_random_selection_keeps_multiples(multiple: int) -> None:
    graph = analyze(Two(nn.ReLU()), IMAGE)
    selection = graph.random_selection(0.5, seed=3, multiple_of=multiple)
    for family in graph.prunable_families:
        kept = int((~selection[family.name]).sum())
        assert kept == family.size or kept % multiple == 0
        assert kept > 0
    again = graph.random_selection(0.5, seed=3, multiple_of=multiple)
    assert all(torch.equal(selection[name], again[name]) for name in selection)


def test_zero_and_find_zero_groups() -> None:
    model = Two(nn.ReLU())
    graph = analyze(model, IMAGE)
    assert not any(bool(remove.any()) for remove in graph.zero_groups(model).values())
    selection = graph.random_selection(0.5, seed=1)
    graph.zero_(model, selection)
    found = graph.zero_groups(model)
    assert all(torch.equal(found[name], selection[name]) for name in selection)
    assert float(model.first.weight.detach()[selection["first"]].abs().sum()) == 0
    assert float(model.norm.bias.detach()[selection["first"]].abs().sum()) == 0
    assert float(model.first.weight.detach()[~selection["first"]].abs().min()) > 0


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # this line is what the message must name
            return x
        return -x


def test_errors_say_what_to_do() -> None:
    with pytest.raises(BadModelError, match="no values to follow") as caught:
        analyze(Branching(), (torch.ones(2, 2, device="meta"),))
    assert "test_families.py" in str(caught.value)
    with pytest.raises(BadModelError, match="Linear can't be captured"):
        analyze(nn.Linear(3, 2), (torch.ones(2, 5),))
    with pytest.raises(BadModelError, match="Linear can't be captured"):
        analyze(nn.Linear(3, 2), (torch.ones(2, 3), torch.ones(2, 3)))
    with pytest.raises(BadModelError, match="tuple"):
        analyze(nn.Linear(3, 2), torch.ones(2, 3))  # type: ignore[arg-type]
    with pytest.raises(BadModelError, match="no tensor"):
        analyze(nn.Linear(3, 2), ())
    with pytest.raises(BadModelError, match=r"torch\.nn\.Module"):
        analyze("model", (torch.ones(2, 3),))  # type: ignore[arg-type]


def test_a_rule_for_a_users_own_operator() -> None:
    from geta.graph import rule
    from geta.graph.rules.elementwise import pointwise

    @torch.library.custom_op("getatest::scale", mutates_args=())
    def scale(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @scale.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.ops.getatest.scale(self.first(x)))

    before = analyze(Model(), (torch.zeros(2, 4),))
    assert before.num_groups == 0
    assert "getatest.scale" in next(f.reason for f in before.families if f.name == "first")

    @rule("getatest::scale")
    def scale_rule(ctx):  # type: ignore[no-untyped-def]
        return pointwise(ctx, [ctx["x"]], "keep")

    assert analyze(Model(), (torch.zeros(2, 4),)).num_groups == 6
    with pytest.raises(ConfigError, match="already has a rule"):
        rule("getatest::scale")(scale_rule)
    with pytest.raises(ConfigError, match="namespace"):
        rule("scale")(scale_rule)


class Buckets(nn.Module):
    """A table of [buckets, heads] made by a layer and gathered by bucket: heads may go, buckets may not."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.heads, self.out = nn.Linear(5, 6 * 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.table(x).view(x.shape[0], 6, 4).transpose(1, 2).reshape(-1, 6)
        picked = torch.gather(rows, 1, torch.arange(3).expand(rows.shape[0], 3) * 2).view(x.shape[0], 4, 3).sum(2)
        return self.out(picked * self.heads(x))


def test_what_is_gathered_stays_even_where_one_entry_of_it_stays_for_another_reason() -> None:
    graph = analyze(Buckets(), (torch.randn(2, 5),))
    for family in graph.prunable_families:
        for member in family.members:
            if member.param == "table.weight" and member.dim == 0:
                assert member.index.shape == (4, 6), str(graph)


def test_what_touches_the_same_stays_one_family_whatever_keeps_its_parts():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = analyze(model, (torch.randn(2, 4),))
    solved = graph.analysis
    (hidden,) = graph.prunable_families
    owner = next(owner for owner in solved.propagation.space.owners if owner.tensor == "0.weight" and owner.dim == 0)
    roots = solved.partition.root[owner.start : owner.start + owner.size].tolist()
    reasons = {root: "is read by somebody" if place % 2 else "is read by somebody else" for place, root in enumerate(roots)}
    for partition in (replace(solved.partition, frozen=solved.partition.frozen | reasons), solved.partition):
        found = {family.name: family for family in build_families(solved.propagation, partition, model)}
        assert found[hidden.name].size == 8
        assert found[hidden.name].prunable == (partition is solved.partition)
