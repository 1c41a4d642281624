"""Index maps and saliency scores against loops that look at one group at a time."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from geta.errors import BadModelError, ConfigError
from geta.graph.families import Family, Member
from geta.optim import CRITERIA, GroupIndex, Saliency, register_criterion
from geta.optim.saliency import GroupStatistics, group_statistics


class Net(nn.Module):
    """Parameters with one or two grouped dimensions, groups of several rows, rows without a group, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(6, 4, 3, generator=generator))
        self.b = nn.Parameter(torch.randn(5, 6, generator=generator))
        self.c = nn.Parameter(torch.randn(6, generator=generator), requires_grad=False)
        self.register_buffer("seen", torch.ones(6))


def member(param: str, dim: int, index: list[list[int]], *, zero: bool = True) -> Member:
    return Member(param, dim, torch.tensor(index), "producer" if zero else "consumer", zero)


def families() -> list[Family]:
    one = [[i] for i in range(6)]
    pairs = [[0, 3], [1, 4], [2, 5]]
    first = (member("a", 0, one), member("c", 0, one), member("seen", 0, one), member("b", 1, one, zero=False))
    second = (member("a", 1, [[0, 2], [3, 1]]), member("b", 0, [[4, 0], [2, 1]]))
    third = (member("b", 1, pairs),)
    return [
        Family("first", "channels", 6, True, "", first),
        Family("frozen", "channels", 6, False, "reaches the model output", first),
        Family("second", "heads", 2, True, "", second),
        Family("third", "heads", 3, True, "", third),
    ]


def graph(net: nn.Module, found: list[Family] | None = None) -> SimpleNamespace:
    return SimpleNamespace(model=net, families=families() if found is None else found)


def slices(net: nn.Module, family: Family, group: int):
    """Every zeroed slice of one group, as (parameter name, view)."""
    for part in family.zeroed:
        tensor = dict(net.named_parameters()).get(part.param)
        if tensor is not None:
            yield part.param, tensor.detach().index_select(part.dim, part.index[group])


def naive(net: Net, after: dict[str, torch.Tensor]) -> list[dict[str, float]]:
    changed = Net()
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            parameter.copy_(after[name])
    groups = []
    for family in families():
        for group in range(family.size if family.prunable else 0):
            x = torch.cat([piece.flatten() for _, piece in slices(net, family, group)]).tolist()
            new = torch.cat([piece.flatten() for _, piece in slices(changed, family, group)]).tolist()
            grad = [old - value for old, value in zip(x, new, strict=True)]
            inner = sum(u * v for u, v in zip(x, grad, strict=True))
            norm, direction = math.sqrt(sum(u * u for u in x)), math.sqrt(sum(v * v for v in grad))
            groups.append({"norm": norm, "direction": direction, "inner": inner, "size": len(x)})
    return groups


FORMULAS = {
    "magnitude": lambda g: g["norm"],
    "average_magnitude": lambda g: g["norm"] / g["size"],
    "cosine": lambda g: 1 - g["inner"] / (g["norm"] * g["direction"]),
    "taylor_first": lambda g: abs(g["inner"]),
    "taylor_second": lambda g: g["inner"] ** 2 / 2,
}


@pytest.fixture
def stepped():
    net = Net()
    generator = torch.Generator().manual_seed(1)
    after = {name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for name, p in net.named_parameters()}
    index = GroupIndex(graph(net))
    before = [entry.tensor.detach() for entry in index.parameters]
    return net, after, group_statistics(index, before, [after[entry.name] for entry in index.parameters])


def test_statistics_equal_a_loop_over_groups(stepped):
    net, after, found = stepped
    expected = naive(net, after)
    for key in ("norm", "direction", "inner", "size"):
        assert getattr(found, key).tolist() == pytest.approx([group[key] for group in expected], rel=1e-5)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_each_criterion_is_its_formula_divided_by_its_norm(stepped, name):
    net, after, found = stepped
    raw = [FORMULAS[name](group) for group in naive(net, after)]
    norm = math.sqrt(sum(value * value for value in raw))
    assert CRITERIA[name](found).tolist() == pytest.approx(raw, rel=1e-4)
    assert Saliency(name).score(found).tolist() == pytest.approx([value / norm for value in raw], rel=1e-4)


def test_the_default_is_the_weighted_sum_of_all_five(stepped):
    found = stepped[2]
    by_hand = sum(0.2 * Saliency(name).score(found) for name in FORMULAS)
    assert torch.allclose(Saliency().score(found), by_hand)
    weighted = Saliency({"magnitude": 3.0, "cosine": 1.0}).score(found)
    assert torch.allclose(weighted, 3 * Saliency("magnitude").score(found) + Saliency("cosine").score(found))


def test_moving_towards_zero_makes_a_group_less_important():
    ones = torch.ones(2)
    stats = GroupStatistics(norm=ones, size=ones, direction=ones, inner=torch.tensor([1.0, -1.0]), family=torch.tensor([0, 0]))
    towards, away = CRITERIA["cosine"](stats).tolist()
    assert (towards, away) == (0.0, 2.0)


def test_relative_criteria_compare_with_the_mean_of_the_family(stepped):
    net, after, found = stepped
    groups = naive(net, after)
    ids = [0] * 6 + [1] * 2 + [2] * 3
    for name, value in (("relative_magnitude", lambda g: g["norm"]), ("relative_taylor", lambda g: abs(g["inner"]))):
        means = [sum(value(g) for g, i in zip(groups, ids, strict=True) if i == j) / ids.count(j) for j in range(3)]
        expected = [value(g) / means[i] for g, i in zip(groups, ids, strict=True)]
        assert CRITERIA[name](found).tolist() == pytest.approx(expected, rel=1e-4)


def test_zero_groups_and_zero_directions_have_finite_scores():
    zero = torch.zeros(3)
    scores = Saliency(dict.fromkeys(CRITERIA, 1.0)).score(
        GroupStatistics(zero, zero + 1, zero, zero, torch.tensor([0, 0, 1]), observed={"fisher": zero, "activation": zero})
    )
    assert torch.isfinite(scores).all()


def test_criteria_are_pluggable_by_name_and_as_callables(stepped):
    found = stepped[2]

    def smallest_first(groups: GroupStatistics) -> torch.Tensor:
        return groups.size

    expected = found.size / found.size.norm()
    assert torch.allclose(Saliency(smallest_first).score(found), expected)
    assert torch.allclose(Saliency([(smallest_first, 2.0)]).score(found), 2 * expected)
    register_criterion("smallest_first")(smallest_first)
    try:
        assert torch.allclose(Saliency({"smallest_first": 1}).score(found), expected)
        with pytest.raises(ConfigError, match="exists already"):
            register_criterion("smallest_first")(smallest_first)
    finally:
        del CRITERIA["smallest_first"]


def test_both_normalisations_have_norm_one_and_the_second_makes_families_alike(stepped):
    found = stepped[2]
    for normalise in ("global", "family"):
        assert Saliency("magnitude", normalise=normalise).score(found).norm().item() == pytest.approx(1.0, rel=1e-5)
    score, raw = Saliency("taylor_first", normalise="family").score(found), CRITERIA["taylor_first"](found)
    for family in range(3):
        mine = found.family == family
        expected = raw[mine] / (raw[mine].square().mean().sqrt() * math.sqrt(11))
        assert torch.allclose(score[mine], expected)
    zero = torch.zeros(3)
    stats = GroupStatistics(norm=torch.tensor([0.0, 0.0, 3.0]), size=zero + 1, direction=zero, inner=zero, family=torch.tensor([0, 0, 1]))
    assert Saliency("magnitude", normalise="family").score(stats).tolist() == pytest.approx([0.0, 0.0, 1 / math.sqrt(3)])


def test_an_instance_stands_for_itself():
    saliency = Saliency({"magnitude": 1.0})
    assert Saliency.of(saliency) is saliency
    assert isinstance(Saliency.of("cosine"), Saliency)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalise": "layer"}, "normalise is 'layer'; it must be one of global, family"),
        ({"observers": ["moon"]}, "no observer named 'moon'; known are activation, fisher"),
        ({"window": 5}, "window = 5 has no effect"),
        ({"spec": "fisher", "window": 0}, "window is 0"),
        ({"spec": "fisher", "window": 2.5}, "window is 2.5"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Saliency(**options)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("size", "no criterion named 'size'; known are activation, average_magnitude"),
        ({}, "no criterion has a weight"),
        ({"magnitude": 0.0}, "no criterion has a weight"),
        ({"magnitude": float("nan")}, "finite"),
        ({"magnitude": "high"}, "finite"),
        (3, "saliency is 3"),
        ([(3, 1.0)], "neither"),
    ],
)
def test_bad_specifications_are_refused(spec, words):
    with pytest.raises(ConfigError, match=words):
        Saliency(spec)


def test_a_criterion_of_the_wrong_shape_is_refused(stepped):
    with pytest.raises(ConfigError, match="it must be a float tensor of shape"):
        Saliency(lambda groups: groups.norm.sum()).score(stepped[2])


def test_zero_groups_are_found_with_buffers_and_two_dimensions():
    net = Net()
    index = GroupIndex(graph(net))
    assert not index.zero_groups().any()
    flags = torch.tensor([i in (1, 7, 9) for i in range(11)])
    with torch.no_grad():
        for entry in index.parameters:
            entry.tensor.masked_fill_(entry.element_mask(flags), 0)
    assert index.zero_groups().nonzero().flatten().tolist() == [7, 9]  # group 1 still has its buffer
    net.seen[1] = 0
    assert index.zero_groups().nonzero().flatten().tolist() == [1, 7, 9]
    assert index.selection(flags)["second"].tolist() == [False, True]


def test_tied_parameters_are_counted_once():
    net = Net()
    net.tied = net.a
    one = [[i] for i in range(6)]
    found = [Family("both", "channels", 6, True, "", (member("a", 0, one), member("tied", 0, one)))]
    index = GroupIndex(graph(net, found))
    assert [entry.name for entry in index.parameters] == ["a"]
    stats = group_statistics(index, [net.a.detach()], [net.a.detach()])
    assert stats.size.tolist() == [12.0] * 6


def test_a_family_that_zeroes_nothing_is_left_out_with_a_note():
    cut_only = Family("cut", "channels", 6, True, "", (member("a", 0, [[i] for i in range(6)], zero=False),))
    index = GroupIndex(graph(Net(), [cut_only]))
    assert index.num_groups == 0
    assert "family 'cut' is left out" in index.notes[0]


def test_a_graph_of_another_model_is_refused():
    too_long = Family("long", "channels", 7, True, "", (member("c", 0, [[i] for i in range(7)]),))
    with pytest.raises(BadModelError, match=r"'c' has shape \(6,\), but the graph speaks of index 6"):
        GroupIndex(graph(Net(), [too_long]))
    missing = Family("missing", "channels", 1, True, "", (member("nothing", 0, [[0]]),))
    with pytest.raises(BadModelError, match="no tensor 'nothing'"):
        GroupIndex(graph(Net(), [missing]))
    shared = [Family(name, "channels", 1, True, "", (member("c", 0, [[2]]),)) for name in ("one", "two")]
    with pytest.raises(BadModelError, match="belongs to two groups"):
        GroupIndex(graph(Net(), shared))
