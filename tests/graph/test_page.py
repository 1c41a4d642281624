"""The page of a dependency graph, without a browser: its data, its text and its file; and the documented JSON."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import geta
import nets
import page_nets
from geta.cli.main import main
from geta.errors import GetaError
from geta.graph.layout import LANE, ROW, block_of, lay_out
from geta.graph.page import build_page, escape_json, fill_page, page_data
from geta.graph.view import GraphView, NodeView

FORMAT = Path(__file__).resolve().parents[2] / "docs" / "json-format.md"


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])


@pytest.fixture(scope="module")
def resnet():
    return geta.analyze(*nets.resnet20("conv"))


@pytest.fixture(scope="module")
def quantized():
    return page_nets.quantized_resnet20()


def test_page_shows_every_family_and_the_headline(resnet):
    data = data_of(build_page(resnet))
    assert [family["name"] for family in data["families"]] == [family.name for family in resnet.families]
    assert [family["reason"] for family in data["families"]] == [family.reason for family in resnet.families]
    assert data["model"] == "CifarResNet"
    assert data["groups"] == resnet.num_groups == 448
    assert data["parameters"] == sum(parameter.numel() for parameter in resnet.model.parameters())
    assert data["operators"] == len(resnet.view.nodes) - 2  # one input, one output
    assert 0 < data["share"] <= 1


def test_parameters_touched_are_counted_once(resnet):
    touched = {family["name"]: family["touched"] for family in page_data(resnet)["families"]}
    block = 16 * 16 * 9 + 2 * 16 + 16 * 16 * 9  # its own filters, two BatchNorm vectors, the columns of its reader
    assert touched["layer1.0.conv1"] == block


def test_families_run_through_the_operators_between_producer_and_reader(resnet):
    carried = [(node.op, node.module) for node in resnet.view.nodes if "layer1.0.conv1" in node.families]
    assert carried == [("aten::conv2d", "layer1.0.conv1"), ("aten::batch_norm", "layer1.0.bn1"), ("aten::relu", "layer1.0")]
    conv = next(node for node in resnet.view.nodes if node.module == "layer1.0.conv1")
    assert conv.parameters == ("layer1.0.conv1.weight",)
    assert conv.shapes[0][1:] == (16, 32, 32) and isinstance(conv.shapes[0][0], str)  # the batch is open
    assert conv.dtype == "float32" and conv.branch == "" and conv.fed


def test_inputs_of_a_node_come_before_it(resnet, quantized):
    for graph in (resnet, quantized):
        assert all(source < place for place, node in enumerate(graph.view.nodes) for source in node.inputs)
        assert graph.view.nodes[0].op == "input" and graph.view.nodes[-1].op == "output"
        assert len(graph.view.nodes[-1].inputs) == 1


def test_quantizers_are_branches(quantized):
    attached = [node for node in quantized.view.nodes if node.branch == "attached"]
    inserted = [node for node in quantized.view.nodes if node.branch == "inserted"]
    assert len(attached) == sum(branch.kind == "attached" for branch in quantized.quantizers) > 20
    assert len(inserted) == sum(branch.kind == "inserted" for branch in quantized.quantizers) > 20
    assert {node.op for node in attached + inserted} == {"geta::fake_quantize"}
    assert all(node.parameters[0].endswith(".weight") and not node.fed and not node.inputs for node in attached)
    assert all(node.fed and len(node.inputs) == 1 for node in inserted)


def test_a_quantizer_written_out_is_a_branch_from_its_division_to_its_multiplication():
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            weight = torch.clamp(torch.round(self.first.weight / 0.1), -8, 7) * 0.1
            return self.last(torch.relu(nn.functional.linear(x, weight, self.first.bias)))

    view = geta.analyze(Rounded(), (torch.randn(2, 4),)).view
    assert [node.op for node in view.nodes if node.branch == "attached"] == ["aten::div", "aten::round", "aten::clamp", "aten::mul"]


def test_page_names_all_families_of_a_quantized_net(quantized):
    data = data_of(build_page(quantized))
    assert [family["name"] for family in data["families"]] == [family.name for family in quantized.families]
    branches = [node[8] for node in data["nodes"]]
    assert branches.count(1) > 20 and branches.count(2) > 20


def test_hostile_names_are_data_and_never_markup():
    graph = page_nets.hostile_graph()
    page = build_page(graph)
    assert page_nets.HOSTILE not in page
    assert page.count("</script>") == 2  # of the two script elements themselves
    assert data_of(page)["families"][0]["name"] == page_nets.HOSTILE
    assert json.loads(escape_json(json.dumps("<!-- </script> <script>"))) == "<!-- </script> <script>"


def test_data_that_looks_like_a_slot_of_the_template_stays_data():
    page = fill_page({"model": "{{script}}"}, title="<b> & {{data}}")
    assert data_of(page) == {"model": "{{script}}"}
    assert "<title>&lt;b&gt; &amp; {{data}}</title>" in page


def test_page_loads_nothing(resnet):
    page = build_page(resnet)
    assert re.findall(r"https?:|//[a-z]+\.|@import|url\(|<link|<img|\bsrc=|\bfetch\(|XMLHttpRequest", page) == []
    assert "default-src 'none'" in page
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", page) == []


def test_save_html_writes_the_page_and_makes_the_folder(resnet, tmp_path):
    path = tmp_path / "new" / "graph.html"
    resnet.save_html(path)
    assert path.read_text(encoding="utf-8") == build_page(resnet)
    assert [file.name for file in path.parent.iterdir()] == ["graph.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(GetaError, match="can't be written"):
        resnet.save_html(str(tmp_path / "file" / "graph.html"))


def net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(2, 4),)


def test_analyze_command_writes_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "factory_of_the_page", sys.modules[__name__])
    path = tmp_path / "graph.html"
    assert main(["analyze", "factory_of_the_page:net", "--html", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"page written to {path}\n")
    assert data_of(path.read_text())["groups"] == 8


def test_five_thousand_operators_are_a_small_page_soon():
    graph = page_nets.big_graph(5000)
    start = time.perf_counter()
    page = build_page(graph)
    seconds = time.perf_counter() - start
    assert len(data_of(page)["nodes"]) == 5002
    assert len(page.encode()) < 5_000_000
    assert seconds < 20


def test_operators_are_recorded_when_somebody_asks(monkeypatch):
    import geta.graph.dependency as module

    graph = geta.analyze(*nets.NETS["vgg7_bn"]())
    assert "view" not in vars(graph)
    found = graph.view
    monkeypatch.setattr(module, "build_view", None)
    assert graph.view is found


def boxes(view: GraphView) -> np.ndarray:
    placed = lay_out(view)
    return np.stack([placed.x, placed.y], axis=1)


def test_no_two_operators_are_drawn_in_one_place(resnet, quantized):
    for graph in (resnet, quantized, page_nets.big_graph(600)):
        at = boxes(graph.view)
        by_row = at[np.lexsort((at[:, 0], at[:, 1]))]
        same_row = by_row[1:, 1] == by_row[:-1, 1]
        assert (by_row[1:, 0] - by_row[:-1, 0])[same_row].min(initial=LANE) >= LANE - 1  # positions are rounded to pixels


def test_an_operator_is_drawn_below_what_it_reads_or_in_a_later_column(quantized):
    placed = lay_out(quantized.view)
    assert len(placed.gutters) > 1
    for place, node in enumerate(quantized.view.nodes):
        for source in node.inputs:
            before, after = placed.column[source], placed.column[place]
            assert before < after or (before == after and placed.y[source] + ROW <= placed.y[place])


def test_layout_of_wide_layers_isolated_operators_and_nothing():
    node = NodeView("x", "input", "", ((1,),), "float32", (), (), (), "", True)
    wide = GraphView((node, *(NodeView(f"n{i}", "aten::relu", "m", ((1,),), "float32", (0,), (), (), "", True) for i in range(100))))
    at = boxes(wide)
    assert len(np.unique(at, axis=0)) == 101
    assert at[:, 0].max() - at[:, 0].min() < 60 * LANE  # a hundred lanes are folded into rows
    assert boxes(GraphView((node, node))).shape == (2, 2)
    assert boxes(GraphView(())).shape == (0, 2)


@pytest.mark.parametrize(
    ("module", "block"),
    [("layer1.0.conv1", "layer1.0"), ("model.layers.31.mlp", "model.layers.31"), ("conv1", "conv1"), ("head.fc", "head"), ("0.1", "0")],
)
def test_blocks_end_at_the_first_number(module, block):
    assert block_of(module) == block


def key_paths(value: object, prefix: str = "") -> list[str]:
    """The paths of all keys, in the notation of docs/json-format.md, in the order in which they first appear."""
    found: list[str] = []
    if isinstance(value, dict):
        for key, inner in value.items():
            path = f"{prefix}.{key}" if prefix else key
            found += [path, *key_paths(inner, path)]
    elif isinstance(value, list):
        for inner in value:
            found += key_paths(inner, f"{prefix}[]")
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def written() -> dict:
    model, args = net()
    model = geta.quantize(model, weights=geta.Bits(4, 8), activations=None, exclude=["2"])
    return json.loads(geta.analyze(model, args).to_json())


def test_documentation_lists_exactly_the_keys_that_are_written(written):
    documented = re.findall(r"^\| `([\w.\[\]]+)` \|", FORMAT.read_text(), flags=re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert sorted(documented) == sorted(key_paths(written))


def test_the_documented_example_is_what_is_written(written):
    example = re.search(r"```json\n(.*?)```", FORMAT.read_text(), flags=re.DOTALL)
    assert example is not None
    assert json.loads(example[1]) == written
