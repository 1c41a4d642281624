"""The benches of exported networks on tiny nets: what they measure, and how they report it."""

from __future__ import annotations

import torch
from bench.zoo.entry import Built, Entry
from torch import nn

from bench import export_parity, latency


def tiny() -> nn.Sequential:
    """Two convolutions of 16 channels and a classifier."""
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 36, 3))


class Named(nn.Module):
    """Takes its input by name, as the nets of the table do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


NET = latency.Net("tiny", "a tiny net", Named, lambda batch: {"x": torch.randn(batch, 1, 8, 8)})


def test_latency_measures_all_five_and_the_bytes() -> None:
    threads = torch.get_num_threads()
    record = latency.run(NET, [1, 2], 1, 3)
    torch.set_num_threads(threads)
    assert record["missing"] == {}
    assert set(record["latency_ms"]) == {"1", "2"}
    assert record["macs"] < 0.5
    assert record["integer"] == 3
    assert record["floating"] == {}
    assert record["sizes"]["disk"] > record["sizes"]["bits"] > 16 * 16 * 9 / 4
    (one, two) = latency.render(NET, record)
    assert one[:2] == ["a tiny net", "1"]
    assert len(one) == len(two) == len(latency._HEADER)
    assert one[-1] == "0 of 3 layers"
    medians = record["latency_ms"]["1"]
    wanted = medians["dense, ONNX Runtime, floats"]["median"] / medians["compact, ONNX Runtime, integers"]["median"]
    assert f"{wanted:.2f}" in one


def test_parity_compares_every_format() -> None:
    def build() -> Built:
        return tiny(), (torch.randn(2, 1, 8, 8),), {}

    record = export_parity.compare(Entry("own/tiny", build))
    assert record["ok"], record
    assert list(record["parts"]) == ["compress", "integers", "codes", "alone", "floats", "pt2"]
    assert record["parts"]["codes"]["steps"] <= export_parity.STEPS
    assert record["parts"]["integers"]["integer"] == 3
    assert record["parts"]["pt2"]["gap"] < 1e-6
    text = "\n".join(export_parity.render([record], ["own/missing"]))
    assert "1 of 1 models without a failure" in text
    assert "Not measured yet: own/missing." in text
    assert "| own/tiny | 3 | 0 |" in text


def test_parity_notices_a_wrong_file(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def build() -> Built:
        return tiny(), (torch.randn(2, 1, 8, 8),), {}

    elsewhere = export_parity._elsewhere
    monkeypatch.setattr(export_parity, "_elsewhere", lambda code, folder: [one + 1e-3 for one in elsewhere(code, folder)])
    record = export_parity.compare(Entry("own/tiny", build))
    assert not record["ok"]
    assert "gave other numbers" in record["parts"]["alone"]["error"]
    assert "alone: a process with onnxruntime alone gave other numbers" in "\n".join(export_parity.render([record], []))
