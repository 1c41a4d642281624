"""What an index takes with it, and how it came to stay."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

import nets
from geta.cli.analyze import parse_granularity, parse_question
from geta.cli.main import main
from geta.errors import ConfigError
from geta.graph import DependencyGraph, analyze
from geta.graph.explain import Slice
from geta.quant import Bits, quantize
from geta.subnet import compact


class Small(nn.Module):
    """conv -> BatchNorm -> relu -> conv -> mean -> linear, and a bare scale that the model reads, with a head that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, 1)
        self.gate = nn.Module()
        self.gate.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.pair = nn.Module()
        self.pair.left, self.pair.right = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        self.body = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = (self.second(x) * self.gate.scale).mean((2, 3)) * self.pair.left * self.pair.right
        return self.head(self.body(x))


IMAGE = (torch.zeros(2, 3, 8, 8),)


@pytest.fixture(scope="module")
def small() -> DependencyGraph:
    return analyze(Small(), IMAGE)


def test_a_channel_and_everything_that_goes_with_it(small: DependencyGraph) -> None:
    found = small.explain("first", 0, 3)
    assert found == small.explain("first.weight", 0, 3)
    assert (found.tensor, found.family, found.group, found.unit, found.size) == ("first.weight", "first", 3, "channels", 6)
    assert found.prunable and found.reason == found.suggestion == "" and found.chain == ()
    assert found.slices == (
        Slice("first.weight", 0, (3,), "producer", True),
        Slice("norm.weight", 0, (3,), "producer", True),
        Slice("norm.bias", 0, (3,), "producer", True),
        Slice("second.weight", 1, (3,), "consumer", False),
        Slice("norm.running_mean", 0, (3,), "buffer", False),
        Slice("norm.running_var", 0, (3,), "buffer", False),
    )
    assert found.parameters == 3 * 9 + 1 + 1 + 4
    assert found.modules == ("norm", "second")
    assert str(found) == (
        "Removing row 3 of first.weight removes group 3 of the 6 channels of 'first':\n"
        "  row 3 of first.weight (has to be zero)\n"
        "  row 3 of norm.weight (has to be zero)\n"
        "  row 3 of norm.bias (has to be zero)\n"
        "  column 3 of second.weight\n"
        "  row 3 of norm.running_mean\n"
        "  row 3 of norm.running_var\n"
        "33 parameters in all; other modules that shrink: norm, second"
    )


def test_a_reader_and_a_buffer_lead_to_the_same_group(small: DependencyGraph) -> None:
    made = small.explain("first", 0, 5)
    for name, dim in (("second", 1), ("norm", 0), ("norm.running_var", 0)):
        read = small.explain(name, dim, 5)
        assert (read.family, read.group, read.slices, read.parameters) == (made.family, made.group, made.slices, made.parameters)
    assert small.explain("second", 1, 5).modules == ("first", "norm")


def test_why_an_output_stays(small: DependencyGraph) -> None:
    found = small.explain("head", 0, 1)
    assert not found.prunable and found.reason == "reaches the model output" and found.suggestion == ""
    assert found.chain == ("head.weight", "linear at head", "the model's output")
    assert found.parameters == 6 and found.modules == ()
    assert str(found).startswith(
        "Row 1 of head.weight can't be removed: it reaches the model output.\n"
        "how that came about: head.weight -> linear at head -> the model's output\n"
    )


def test_the_number_of_parameters_is_what_compact_removes() -> None:
    model, args, kwargs = nets.NETS["resnet20_conv"]()
    graph = analyze(model, args, kwargs)
    found = graph.explain("layer2.0.conv2", 0, 7)  # the residual stream: rows and columns of many tensors
    assert found.family == "layer2.0.conv2" and "layer3.0.down.0" in found.modules
    family = next(one for one in graph.families if one.name == found.family)
    remove = torch.zeros(family.size, dtype=torch.bool)
    remove[found.group] = True
    cut = compact(model, graph, {family.name: remove})
    before, after = (sum(p.numel() for p in net.parameters()) for net in (model, cut))
    assert found.parameters == before - after > 0


def test_a_tensor_that_loses_rows_and_columns_counts_the_crossing_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.inner, self.leave = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
            self.twin = nn.Linear(6, 6, bias=False)
            self.twin.weight = self.inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.leave(self.twin(self.inner(self.enter(x))))

    found = analyze(Tied(), (torch.zeros(2, 4),)).explain("twin", 0, 2)
    assert found.tensor == "inner.weight"  # the first name of the tied tensor
    assert [(one.tensor, one.dim) for one in found.slices] == [
        ("enter.weight", 0),
        ("enter.bias", 0),
        ("inner.weight", 0),
        ("inner.weight", 1),
        ("leave.weight", 1),
    ]
    assert found.parameters == 4 + 1 + (6 + 6 - 1) + 2


def test_heads_and_the_way_through_a_residual_stream() -> None:
    model, args, kwargs = nets.NETS["bert"]()
    graph = analyze(model, args, kwargs)
    heads = graph.explain("bert.encoder.layer.0.attention.self.query", 0, 11)
    assert (heads.unit, heads.group, heads.slices[0].rows) == ("heads", 1, tuple(range(8, 16)))
    assert "rows 8-15 of bert.encoder.layer.0.attention.self.query.weight (has to be zero)" in str(heads)
    stream = graph.explain("bert.encoder.layer.0.attention.self.query", 1, 3)
    assert stream.reason == "crosses layer_norm at bert.embeddings.LayerNorm"
    assert stream.suggestion == "would become prunable with exact=False"
    assert stream.chain == (
        "bert.encoder.layer.0.attention.self.query.weight",
        "linear at bert.encoder.layer.0.attention.self.query",
        "dropout at bert.embeddings.dropout",
        "layer_norm at bert.embeddings.LayerNorm",
    )
    far = graph.explain("bert.pooler.dense", 1, 3)
    assert far.chain[0] == "bert.pooler.dense.weight" and far.chain[-1] == stream.chain[-1] and len(far.chain) > 9
    assert " more) -> " in str(far) and "\n  ... and 6 more\n" in str(far)
    rows = graph.explain("bert.embeddings.word_embeddings", 0, 1)
    assert rows.chain == ("bert.embeddings.word_embeddings.weight", "embedding at bert.embeddings.word_embeddings")


def test_inexact_families_say_so() -> None:
    model, args, kwargs = nets.NETS["vit"]()
    found = analyze(model, args, kwargs, exact=False).explain("vit.layers.0.mlp.fc1", 1, 0)
    assert found.prunable and found.inexact == "crosses layer_norm at vit.layers.0.layernorm_before"
    assert str(found).endswith("the result changes a little, because it crosses layer_norm at vit.layers.0.layernorm_before")


def test_a_wish_is_the_end_of_the_way() -> None:
    graph = analyze(Small(), IMAGE, protect=["norm"], prune=["channels"])
    found = graph.explain("first", 0, 0)
    assert found.reason == "was protected by protect='norm'" and found.suggestion == "take 'norm' out of protect"
    assert found.chain[:3] == ("first.weight", "conv2d at first", "batch_norm at norm") and found.chain[3].startswith("norm.")
    excluded = graph.explain("body.0", 0, 0)
    assert (excluded.reason, excluded.chain) == ("was excluded by prune='channels'", ())


def test_what_belongs_to_no_family(small: DependencyGraph) -> None:
    kernel = small.explain("first", 2, 1)
    assert (kernel.family, kernel.group, kernel.reason) == ("", None, "belongs to a spatial kernel")
    assert kernel.slices == (Slice("first.weight", 2, (1,), "consumer", False),) and kernel.parameters == 6 * 3 * 3
    assert str(kernel).startswith("Index 1 of dimension 2 of first.weight can't be removed: it belongs to a spatial kernel.")
    single = small.explain("gate.scale", 1, 0)
    assert single.reason == "is the only index of that dimension: removing it would remove the whole tensor"
    counter = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    counter.register_buffer("unread", torch.zeros(3))
    found = analyze(counter, (torch.zeros(2, 4),)).explain("unread", 0, 1)
    assert not found.prunable and found.family == "" and found.reason == "is never used in forward"


@pytest.mark.parametrize(
    ("name", "dim", "index", "message"),
    [
        ("frist", 0, 0, r"'frist' is no tensor and no module of the model; did you mean 'first'"),
        ("body", 0, 0, r"module 'body' has no weight of its own; name a tensor: body.0.weight, body.0.bias"),
        ("pair", 0, 0, r"module 'pair' has no weight of its own; name a tensor: pair.left, pair.right"),
        ("body.1", 0, 0, r"module 'body.1' has no weight of its own; name a tensor, it has none"),
        ("first", 4, 0, r"'first.weight' has shape \(6, 3, 3, 3\), so it has no dimension 4: dim counts from 0 to 3"),
        ("first", -1, 0, r"has no dimension -1"),
        ("first", 0, 6, r"dimension 0 of 'first.weight' has size 6: index counts from 0 to 5, got 6"),
        ("first", 0, -1, r"got -1"),
    ],
)
def test_wrong_questions(small: DependencyGraph, name: str, dim: int, index: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small.explain(name, dim, index)


def test_a_module_with_one_tensor_stands_for_it(small: DependencyGraph) -> None:
    assert small.explain("gate", 0, 2).tensor == "gate.scale"
    assert small.explain("gate", 0, 2).family == small.explain("second", 0, 2).family


def test_json_holds_every_field(small: DependencyGraph) -> None:
    found = small.explain("head", 0, 1)
    record = json.loads(found.to_json())
    assert record["chain"] == list(found.chain) and record["slices"][0] == {
        "tensor": "head.weight",
        "dim": 0,
        "rows": [1],
        "role": "producer",
        "zero": True,
    }
    assert set(record) == set(found.__dataclass_fields__)


def test_the_question_can_be_asked_of_a_quantized_model() -> None:
    model = Small().eval()
    graph = analyze(model, IMAGE)
    before = graph.explain("head", 0, 1), graph.explain("first", 0, 1)
    quantize(model, weights=Bits(8, 8), activations=None, exclude=())
    again = analyze(model, IMAGE)
    assert again.explain("first", 0, 1).parameters == before[1].parameters
    assert again.explain("first.parametrizations.weight.original", 0, 1).family == "first"
    assert again.explain("head", 0, 1).chain[-1] == before[0].chain[-1]


def factory() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Small(), IMAGE


def test_the_command_line_asks_and_restricts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "factory_of_the_test", sys.modules[__name__])
    options = ["--protect", "second", "--protect", "norm", "--only", "neurons", "--granularity", "first=channel", "--inexact"]
    assert main(["analyze", "factory_of_the_test:factory", *options, "--explain", "first:0:3", "--explain", "body.0:0:1"]) == 0
    printed = capsys.readouterr().out
    assert "5 groups in 1 families can be removed" in printed
    assert "suggestion for first (6 groups): take 'second' out of protect" in printed or "take 'norm' out of protect" in printed
    assert "note: granularity 'channel' for 'first' decided nothing" in printed
    assert "Row 3 of first.weight can't be removed: it was protected" in printed
    assert "Removing row 1 of body.0.weight removes group 1 of the 5 neurons of 'body.0':" in printed
    for wrong, message in (("first", "is no question"), ("first:0:9", "got 9")):
        assert main(["analyze", "factory_of_the_test:factory", "--explain", wrong]) == 2
        assert message in capsys.readouterr().err


def test_texts_of_the_command_line() -> None:
    assert parse_question("layer1.0.conv1:0:3") == ("layer1.0.conv1", 0, 3)
    for wrong in ("conv1", "conv1:0", ":0:1", "conv1:x:1", "conv1:0:1:2", "conv1:0:-1"):
        with pytest.raises(ConfigError, match="is no question"):
            parse_question(wrong)
    assert parse_granularity([]) is None
    assert parse_granularity(["head_dim"]) == {"*": "head_dim"}
    assert list((parse_granularity(["head", "*.attn=head_dim"]) or {}).items()) == [("*.attn", "head_dim"), ("*", "head")]
    with pytest.raises(ConfigError, match="as head and as head_dim"):
        parse_granularity(["head", "head_dim"])
