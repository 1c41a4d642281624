"""Residual branches: which are found, what has to be zero, and why some can't go."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import geta
from depth_nets import NETS, STUCK, WIDTH, Wrapped, mlp, on_tokens
from geta import ConfigError
from geta.graph.families import layer_sets


def layers(graph: geta.DependencyGraph) -> list[geta.graph.Family]:
    return [family for family in graph.families if family.is_layer]


@pytest.mark.parametrize("name", NETS)
def test_the_branches_of_a_network_are_families_of_one_group(name: str) -> None:
    build, paths = NETS[name]
    model, args = build()
    found = layers(geta.analyze(model, args, depth=True))
    assert [family.name for family in found] == [f"{path} (layer)" for path in paths]
    assert all(family.prunable and family.size == 1 and family.unit == "layers" for family in found)
    for family in found:
        makers = {member.param for member in family.members}
        assert makers
        assert makers <= set(family.removes)
        assert all(member.zero for member in family.members)


@pytest.mark.parametrize("name", STUCK)
def test_a_branch_that_can_not_be_zero_says_why(name: str) -> None:
    build, reason = STUCK[name]
    model, args = build()
    found = layers(geta.analyze(model, args, depth=True))
    assert found
    assert not found[0].prunable
    assert found[0].reason == reason


def test_nothing_changes_without_depth() -> None:
    model, args = NETS["pre-norm"][0]()
    plain, deep = geta.analyze(model, args), geta.analyze(model, args, depth=True)
    assert [family.summary() for family in plain.families] == [family.summary() for family in deep.families if not family.is_layer]
    assert deep.num_groups == plain.num_groups + 4


def test_what_has_to_be_zero_is_the_last_layer_with_its_norm() -> None:
    for name, expected in {
        "basic blocks": {"1.branch.3.weight", "1.branch.4.weight", "1.branch.4.bias"},
        "convnext": {"1.branch.3.weight", "1.branch.3.bias"},
        "pre-norm": {"1.branch.out.weight", "1.branch.out.bias"},
        "norm behind": {"1.branch.4.weight", "1.branch.4.bias"},
        "adapter": {"1.down.weight", "1.down.bias", "1.lora_b.weight"},
    }.items():
        model, args = NETS[name][0]()
        assert {member.param for member in layers(geta.analyze(model, args, depth=True))[0].members} == expected, name


def test_a_mask_or_a_bias_of_attention_scores_is_no_stream() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.bias = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = self.bias(x) @ self.bias(x).mT
            h = x * bias.mean()
            return (bias + self.q(h) @ self.k(h).mT).softmax(-1) @ x

    assert layers(geta.analyze(Biased(), (torch.randn(2, 5, WIDTH),), depth=True)) == []


def test_protect_and_prune_hold_for_branches() -> None:
    model, args = NETS["pre-norm"][0]()
    guarded = layers(geta.analyze(model, args, depth=True, protect=["2"]))
    assert [family.prunable for family in guarded] == [True, False, True, True]
    assert guarded[1].reason == "was protected by protect='2'"
    assert guarded[1].suggestion == "take '2' out of protect"
    other = layers(geta.analyze(model, args, depth=True, prune=["heads"]))
    assert {family.reason for family in other} == {"was excluded by prune='heads'"}
    only = geta.analyze(model, args, depth=True, prune="layers")
    assert only.prunable_families == layers(only)
    with pytest.raises(ConfigError, match="found with depth=True alone"):
        geta.analyze(model, args, prune="layers")
    with pytest.raises(ConfigError, match="depth is 1"):
        geta.analyze(model, args, depth=1)


def test_random_selections_leave_a_branch_of_every_set() -> None:
    model, args = NETS["pre-norm"][0]()
    graph = geta.analyze(model, args, depth=True)
    sets = layer_sets(graph.families)
    assert [[family.name for family in one] for one in sets] == [
        ["1.branch (layer)", "3.branch (layer)"],
        ["2.branch (layer)", "4.branch (layer)"],
    ]
    seen = set()
    for seed in range(40):
        selection = graph.random_selection(0.5, seed=seed)
        gone = [name for name, remove in selection.items() if name.endswith("(layer)") and bool(remove.all())]
        assert len(gone) == 2
        assert all(any(not bool(selection[family.name].all()) for family in one) for one in sets)
        seen.add(tuple(gone))
    assert len(seen) == 4
    assert sum(bool(graph.random_selection(0.9, seed=0)[family.name].all()) for family in layers(graph)) == 2
    even = graph.random_selection(0.5, uniform=True)
    assert sum(bool(even[family.name].all()) for family in layers(graph)) == 2


def test_branches_that_repeat_nowhere_are_one_set() -> None:
    model, args = on_tokens(Wrapped(mlp()), Wrapped(nn.Linear(WIDTH, WIDTH)), Wrapped(nn.Linear(WIDTH, WIDTH, bias=False)))
    (together,) = layer_sets(geta.analyze(model, args, depth=True).families)
    assert len(together) == 3


def test_a_branch_is_explained_shown_and_written() -> None:
    model, args = NETS["pre-norm"][0]()
    graph = geta.analyze(model, args, depth=True)
    told = graph.explain("2.branch (layer)", 0, 0)
    assert (told.family, told.prunable, told.parameters) == ("2.branch (layer)", True, 16 + 8 * 12 + 12 + 12 * 8 + 8)
    assert "leaves the whole residual branch out" in str(told)
    assert "2.branch.3.weight (has to be zero)" in str(told)
    assert graph.explain("2.branch.3.weight", 0, 0).family == geta.analyze(model, args).explain("2.branch.3.weight", 0, 0).family
    with pytest.raises(ConfigError, match="one residual branch"):
        graph.explain("2.branch (layer)", 0, 1)
    line = next(line for line in str(graph).splitlines() if line.startswith("2.branch (layer)"))
    assert line.split()[2:4] == ["1", "layers"]
    assert "the whole branch" in line
    record = {family["name"]: family for family in json.loads(graph.to_json())["families"]}
    assert record["2.branch (layer)"]["removes"] == [
        f"2.branch.{part}" for part in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
    ]
    assert record["2.branch.1"]["removes"] == []
    assert (record["2.branch (layer)"]["block"], record["2.branch.1"]["block"]) == ("2", "")


def test_the_page_of_a_graph_with_branches_names_what_goes(tmp_path) -> None:
    build, _ = STUCK["sigmoid"]
    model, args = build()
    for number, (one, given) in enumerate([(model, args), NETS["basic blocks"][0]()]):
        graph = geta.analyze(one, given, depth=True)
        graph.save_html(tmp_path / f"{number}.html")
        assert "(layer)" in (tmp_path / f"{number}.html").read_text()
        assert graph.to_dot().count("(layer)") == len(layers(graph))
