"""What pruning and quantizing would leave, counted before either: equal to the costs of the compact model afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import geta
from geta.cost.outlook import outlook
from geta.errors import ConfigError


class Tied(nn.Module):
    """Token ids in, with a tied table, attention and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.attend, self.up, self.down = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head(x + self.down(torch.relu(self.up(x))))


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 10)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(("make", "x"), [(convolutions, torch.randn(2, 3, 8, 8)), (Tied, torch.arange(6).view(2, 3))])
def test_the_outlook_is_the_cost_of_the_compact_model(make, x):
    torch.manual_seed(0)
    model = make().eval()
    graph = geta.analyze(model, (x,))
    found = outlook(graph)
    assert found.input_shapes == (tuple(x.shape),)
    plain, half = geta.cost(model, (x,)), graph.random_selection(0.5)
    rows = list(found.rows.values())
    assert rows[0] == {"macs": plain.macs, "bops": plain.bops, "params": plain.params, "bytes": plain.weight_bytes}
    for bits, row in ((None, rows[1]), (8, rows[2]), (4, rows[3])):
        trained = copy.deepcopy(model)
        if bits is not None:
            geta.quantize(trained, weights=bits, activations=8, calibration=[x], exclude=())
            for quantizer in geta.quant.quantizers(trained).values():
                quantizer.round_bits_()
        again = geta.analyze(trained, (x,))
        again.zero_(trained, half)
        cost = geta.compact(trained, again, half).cost
        assert (row["macs"], row["bops"], row["params"]) == (cost.macs, cost.bops, cost.params)
        assert row["bytes"] == cost.weight_bytes


def test_a_quantized_model_is_counted_with_its_own_quantizers():
    torch.manual_seed(0)
    model, x = convolutions(), torch.randn(2, 3, 8, 8)
    before = outlook(geta.analyze(model, (x,)))
    geta.quantize(model, weights=(4, 8), activations=(8, 8), calibration=[x])
    after = outlook(geta.analyze(model, (x,)))
    assert list(after.rows) == [name for name in before.rows if name != "50% of the groups removed"]
    for name, row in after.rows.items():
        assert dict(row) == dict(before.rows[name])


def test_models_without_weights_are_counted():
    with torch.device("meta"):
        model, ids = Tied().to(torch.bfloat16), torch.zeros(2, 3, dtype=torch.int64)
    found, other = outlook(geta.analyze(model, (ids,))), outlook(geta.analyze(Tied(), (torch.zeros(2, 3, dtype=torch.int64),)))
    for name, row in found.rows.items():
        assert (row["macs"], row["bops"], row["params"]) == tuple(other.rows[name][kind] for kind in ("macs", "bops", "params"))
    dense, half = list(found.rows.values())[:2]
    assert dense["bytes"] == 2 * dense["params"]
    assert half["bytes"] == 2 * half["params"]


def test_a_graph_that_names_the_meta_device_is_counted():
    """Positions made inside the model are on its device, which a graph captured without weights writes down."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.relu(self.one(x + torch.arange(4, device=x.device, dtype=x.dtype))))

    with torch.device("meta"):
        model, x = Positions(), torch.zeros(3, 4)
    assert geta.cost(model, (x,)).macs == 3 * (4 * 6 + 6 * 2)
    assert list(outlook(geta.analyze(model, (x,))).rows.values())[1]["macs"] == 3 * (4 * 3 + 3 * 2)


def test_the_table_shows_shares_and_refuses_nonsense():
    graph = geta.analyze(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(2, 4),))
    lines = str(outlook(graph, 0.25, (2,))).splitlines()
    assert lines[0] == "costs for inputs [2, 4]:"
    assert lines[2].split()[:3] == ["dense", "112", "114,688"]
    assert lines[3].startswith("25% of the groups removed ")
    assert "84 (75.00%)" in lines[3]
    assert "weights 2 bits" in lines[4]
    for sparsity, bits in ((1.0, (8,)), (0.5, (1,))):
        with pytest.raises(ConfigError):
            outlook(graph, sparsity, bits)
