"""`graph.plot()`: every family is a bar with its numbers and its reason; hundreds of families stay readable."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import geta
import page_nets
from geta.errors import ConfigError, GetaError
from geta.graph.families import Family
from geta.graph.page import page_data
from geta.graph.plot import rows


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return geta.analyze(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), (torch.randn(2, 6),))


def words_in(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels())]


def test_bars_are_the_families(graph):
    figure = graph.plot()
    groups, touched = figure.axes
    assert [label.get_text() for label in groups.get_yticklabels()] == [family.name for family in graph.families]
    assert [round(bar.get_width()) for bar in groups.patches] == [family.size for family in graph.families]
    assert [round(bar.get_width()) for bar in touched.patches] == [family["touched"] for family in page_data(graph)["families"]]
    assert any("stays: it reaches the model output" in text for text in words_in(figure))
    assert figure.get_suptitle() == "Sequential: 13 groups in 2 of 4 families can be removed"


def test_it_can_be_saved_and_pyplot_knows_nothing_of_it(graph):
    stream = io.BytesIO()
    graph.plot().savefig(stream, format="png")
    assert stream.getvalue().startswith(b"\x89PNG")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_hundreds_of_families_are_summed():
    big = page_nets.big_graph(3000)
    found = rows(big, 20)
    assert len(found) == 22
    assert [row.label for row in found[-2:]] == ["279 smaller, prunable", "1 smaller, not prunable"]
    assert sum(row.groups for row in found) == sum(family.size for family in big.families)
    assert len(big.plot(20).axes[0].patches) == 22


def test_the_largest_get_bars_of_their_own_in_the_order_of_the_network(graph):
    assert [row.label for row in rows(graph, 2)] == ["0", "2", "2 smaller, not prunable"]


def test_inexact_families_and_odd_names(graph):
    odd = Family("a$b_{" * 20, "neurons", 8, True, "", graph.families[0].members, inexact="crosses a mean")
    figure = replace(graph, families=[odd]).plot()
    assert any("inexactly: it crosses a mean" in text for text in words_in(figure))
    figure.savefig(io.BytesIO(), format="png")  # dollar signs start no formula


def test_a_graph_without_families(graph):
    replace(graph, families=[]).plot().savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("most", [0, -1, 1.5, True])
def test_a_bad_number_of_bars(graph, most):
    with pytest.raises(ConfigError, match="most is"):
        graph.plot(most)


def test_missing_matplotlib_is_explained(graph, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(GetaError, match=r"graph\.plot\(\) needs matplotlib.*pip install 'geta\[plots\]'"):
        graph.plot()
