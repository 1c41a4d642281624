"""The benches' pure parts: tables, the least-squares line, reports of records, resuming, and what zeroing removed channels means."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.zoo import timing
from bench.zoo.entry import Built, Entry
from bench.zoo.run import Run, due
from torch import Tensor, nn

from bench import clock, facts, latency, peers, predictions, scale
from bench import versus_torch_pruning as versus
from geta.errors import GetaError
from geta.report.files import write_json


def test_a_table_keeps_its_shape() -> None:
    lines = facts.table(("model", "s"), [["a|b", "1"], ["c\nd", "2"]])
    assert lines == ["| model | s |", "| --- | ---: |", "| a\\|b | 1 |", "| c d | 2 |"]
    with pytest.raises(ValueError, match="a row has 1 cells and the header 2"):
        facts.table(("model", "s"), [["a"]])
    assert facts.one_line("x" * 300, 10) == "xxxxxxx..."


def test_a_folder_for_results_is_there_before_anything_is_measured(tmp_path: Path) -> None:
    assert facts.results_folder(str(tmp_path / "new" / "results")).is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(GetaError, match=r"'.*file' can't be written"):
        facts.results_folder(str(tmp_path / "file"))


def test_predictions_stand_beside_measurements_of_other_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))

    tiny = latency.Net("tiny", "tiny", build, lambda batch: {"input": torch.randn(batch, 8)})
    monkeypatch.setattr(predictions, "NETS", (tiny,))
    found = predictions.run("tiny", "integers", 0.01)
    assert set(found["fitted"]) == {"uncut", "half"}
    assert len(found["predictions"]) == len(found["shares"]) == 3
    assert all(one["predicted"] > 0 and one["measured"] > 0 and one["pace"] > 0 for one in found["predictions"])


def test_quantiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(20, 0, -1)]
    assert [facts.quantile(values, share) for share in (0.5, 0.95, 0.99, 1.0)] == [10, 19, 20, 20]
    assert facts.quantile([3.0], 0.01) == 3.0


def test_the_machine_and_versions_are_named(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast CPU\nprocessor\t: 1\nmodel name\t: Fast CPU\n")
    assert facts.machine(cpuinfo).endswith(" cores of Fast CPU")
    assert " cores of " in facts.machine(tmp_path / "missing")
    assert f"torch {torch.__version__}" in facts.versions("torch")
    assert facts.dated("scale", ".svg", tmp_path).name.startswith("scale_2")


def test_a_deadline_ends_the_body_and_nothing_after_it() -> None:
    with pytest.raises(TimeoutError, match="no result within"), facts.deadline(0.05):
        time.sleep(5)
    with facts.deadline(0.05):
        pass
    time.sleep(0.1)


def test_least_squares_finds_a_line_and_how_well_it_fits() -> None:
    exact = scale.least_squares([2, 4, 8], [5.0, 9.0, 17.0])
    assert (exact.slope, exact.offset, exact.r2) == pytest.approx((2, 1, 1))
    bent = scale.least_squares([0, 1, 2], [0.0, 0.0, 3.0])
    assert (bent.slope, bent.offset, bent.r2) == pytest.approx((1.5, -0.5, 0.75))
    assert scale.least_squares([1, 2], [3.0, 3.0]).r2 == 1.0
    for x, y in (([1.0, 1.0], [2.0, 3.0]), ([1.0], [2.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="two different x"):
            scale.least_squares(x, y)


def _scaled(name: str, layers: int, seconds: float) -> dict[str, Any]:
    figures = {
        "costs": 2.5,
        "processor": 8.0,
        "plan": 3.5,
        "plan_peak_bytes": 1e9,
        "shown": name == "llama-70b",
        "outlook": "the costs",
        "memory": "the plan",
    }
    figures |= {"build": 1.0, "capture": seconds / 2, "analysis": seconds / 2, "whole": 9.0, "parameters": 7e9, "peak_bytes": 5e8}
    return {"name": name, "layers": layers, **figures, "nodes": 2000, "groups": 12345, "prunable_families": 4, "families": 7}


def test_the_scale_report_plots_growth_only_over_equal_widths() -> None:
    records = [_scaled("llama-7b", 32, 17.0), _scaled("llama-7b-wide-2-layers", 2, 2.0), _scaled("llama-70b", 80, 99.0)]
    records.append({"name": "mixtral-8x7b", "layers": 32, "error": "KeyError: | boom", "whole": 1.0})
    points = scale.growth(records)
    assert points == [(2, 2.0), (32, 17.0)]
    line = scale.least_squares(*zip(*points, strict=True))
    text = scale.render(records, "facts", "scale.svg", line)
    assert (
        "| llama-70b | 80 | 7.00 G | 1.00 | 49.50 | 49.50 | 99.00 | 2.50 | 8.00 | 3.50 | 9.00 | 0.50 | 1.00 | 2,000 | 12,345 | 4 | 7 |"
        in text
    )
    assert "**failed**: KeyError: \\| boom" in text
    assert text.endswith("## Costs and memory of llama-70b\n\n```\nthe costs\n\nthe plan\n```\n")
    assert text.count("\nthe plan\n") == 1
    assert "at 2, 32 layers: least-squares line 0.500 s per layer + 1.00 s, R² = 1.0000." in text
    picture = scale.draw(points, line)
    assert picture == scale.draw(points, line)
    assert b"<svg" in picture
    assert "Growth" not in scale.render(records, "facts", None, None)


def test_the_scale_models_have_the_layers_they_say() -> None:
    assert [config.layers for config in scale.MODELS] == [2, 4, 8, 16, 32, 32, 36, 32, 80]
    assert len({config.name for config in scale.MODELS}) == len(scale.MODELS)


def test_peak_memory_is_read_in_bytes(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t  99 kB\nVmHWM:\t    2048 kB\n")
    assert scale.peak_bytes(status) == 2 * 1024 * 1024


class Twice(nn.Module):
    """A convolution whose channels a norm follows, and a linear layer that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.up = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 1)
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.bn(self.conv(x))) * self.scale
        return out


def test_removals_count_the_channels_that_are_left() -> None:
    model = Twice()
    nn.init.ones_(model.bn.bias)
    removals = [peers.Removal("conv", (0, 2)), peers.Removal("bn", (0, 2)), peers.Removal("bn", (1,)), peers.Removal("up", (3,))]
    peers.zero_removed(model, [*removals, peers.Removal("scale", (0,), parameter=True, dim=1)])
    assert model.bn.weight.tolist() == model.bn.bias.tolist() == [0, 1, 0, 0, 1, 1]
    assert (model.conv.weight.flatten(1) == 0).all(1).tolist() == [True, False, True, False, False, False]
    assert (model.up.weight == 0).all((0, 2, 3)).tolist() == [False, False, False, True]
    assert model.scale.flatten().tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="'bn' has 3 channels left"):
        peers.zero_removed(model, [*removals, peers.Removal("bn", (3,))])
    with pytest.raises(TypeError, match="'' is a Twice"):
        peers.zero_removed(model, [peers.Removal("", (0,))])


def test_attention_and_embedding_rows_are_zeroed() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "table": nn.Embedding(3, 4), "norm": nn.LayerNorm(4)})
    peers.zero_removed(model, [peers.Removal(name, (1,)) for name in model])
    attention = model["attention"]
    assert isinstance(attention, nn.MultiheadAttention)
    assert attention.in_proj_weight is not None
    assert (attention.in_proj_weight == 0).all(1).nonzero().flatten().tolist() == [1, 5, 9]
    assert (attention.out_proj.weight == 0).all(1).nonzero().flatten().tolist() == [1]
    assert (model.get_parameter("table.weight") == 0).all(0).tolist() == [False, True, False, False]
    assert model.get_parameter("norm.weight").tolist() == [1, 0, 1, 1]


def _compared(name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = {"build": {"ok": True, "seconds": 1.0, "parameters": 100}}
    for tool in versus.TOOLS:
        parts[f"{tool} analyze"] = {"ok": True, "seconds": 0.25}
        parts[f"{tool} prune"] = {"ok": True, "seconds": 0.5, "parameters": 30}
        parts[f"{tool} compare"] = {"ok": True, "seconds": 0.1, "difference": 1e-7}
    for part, change in changes.items():
        parts[part.replace("_", " ")] = change
    return {"name": name, "ok": all(part["ok"] for part in parts.values()), "parts": parts}


def _without(record: dict[str, Any], *parts: str) -> dict[str, Any]:
    return {**record, "parts": {name: part for name, part in record["parts"].items() if name not in parts}}


def test_the_comparison_tells_failures_from_differences() -> None:
    failure = {"ok": False, "seconds": 0.1, "error": "KeyError: a | b"}
    wrong = {"ok": True, "seconds": 0.1, "difference": 0.5, "difference64": 0.4}
    rounding = {"ok": True, "seconds": 0.1, "difference": 2e-4, "difference64": 1e-14}
    crashed = _without(_compared("torchvision/c", **{"torch-pruning analyze": failure}), "torch-pruning prune", "torch-pruning compare")
    lost = {"name": "torchvision/d", "ok": False, "parts": {"process": {"ok": False, "seconds": 0.0, "error": "the process ended"}}}
    records = [
        _compared("torchvision/a"),
        _compared("torchvision/b", **{"torch-pruning compare": wrong, "geta compare": rounding}),
        crashed,
        lost,
        _compared("torchvision/e", **{"torch-pruning compare": failure}),
    ]
    text = versus.render(records, ["torchvision/f"], ["facts"])
    assert "| torch-pruning | 3 of 5 | 1 | 1 | 1 | 0.25 | 0.25 | 0.50 | 0.50 |" in text
    assert "| geta | 4 of 5 | 4 | 0 | 0 |" in text
    assert "| a | ok | 0.25 | 0.50 | 30% | 1.0e-07 | ok | 0.25 | 0.50 | 30% | 1.0e-07 |  |" in text
    assert "| b | ok | 0.25 | 0.50 | 30% | **4.0e-01** | ok | 0.25 | 0.50 | 30% | 1.0e-14 |  |" in text
    assert "| c | **analyze failed** |  |  |  |  | ok |" in text
    assert "torch-pruning analyze: KeyError: a \\| b |" in text
    assert "| d | **process failed** |  |  |  |  | **process failed** |  |  |  |  | process: the process ended |" in text
    assert "Not measured yet: 1 (torchvision/f)." in text


def test_a_difference_that_is_not_a_number_is_not_equal() -> None:
    record = _compared("torchvision/a", **{"geta compare": {"ok": True, "seconds": 0.1, "difference": "inf", "difference64": "nan"}})
    gap = versus.difference(record, "geta")
    assert gap is not None
    assert math.isnan(gap[0])
    assert not gap[1]


def test_the_comparison_resumes(tmp_path: Path) -> None:
    run = Run(tmp_path / "tp", target=peers.in_child)
    entries = versus.classifiers()[:2]
    assert len(versus.classifiers()) == 80
    run.folder.mkdir()
    write_json(run.path(entries[0].name), _compared(entries[0].name))
    assert [entry.name for entry in due(run, entries)] == [entries[1].name]
    assert len(due(run, entries, fresh=True)) == 2


def test_timing_counts_fails_and_lists_the_slow() -> None:
    found = [
        timing.Timing("own/a", "meta", 0.5, 0.25, 20, 8),
        timing.Timing("own/b", "cpu", 4.0, 3.0, 900, 64, "not on the meta device: RuntimeError: no"),
        timing.Timing("own/c", note="not on the cpu device: ImportError: none"),
    ]
    text = timing.render(found, 5, "facts")
    assert "3 of 5 models, one after another in one process: 1 on the meta device, 1 with real weights, 1 failed." in text
    assert "50.0% take at most 5 s" in text
    assert "| capture + analysis, s | 0.75 | 7.00 | 7.00 | 7.00 | 7.00 | 3.88 | 7.00 |" in text
    assert text.count("| own/b | cpu | 4.00 | 3.00 | 7.00 | 900 | 64 |") == 2
    assert text.count("| own/a |") == 1
    assert "- `own/c`: not on the cpu device: ImportError: none" in text
    assert "None." in timing.render(found[:1], 5, "facts")


def _linear() -> Built:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4),), {}


def _needs_values() -> Built:
    width = int(torch.full((), 8).item())
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2)), (torch.randn(2, 4),), {}


def _broken() -> Built:
    raise RuntimeError("no such model\nsecond line")


def test_a_model_is_timed_on_the_meta_device_or_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_EVERY", 2)
    entries = [Entry("own/plain", _linear), Entry("own/values", _needs_values), Entry("own/broken", _broken)]
    plain, values, broken = timing.time_all(entries, tmp_path / "time.md", "facts")
    assert (plain.device, plain.groups, plain.note) == ("meta", 8, "")
    assert plain.capture > 0 < plain.analysis
    assert values.device == "cpu"
    assert values.note.startswith("not on the meta device: RuntimeError: ")
    assert (broken.device, broken.note) == ("", "not on the cpu device: RuntimeError: no such model")
    assert "3 of 3 models" in (tmp_path / "time.md").read_text()


def test_the_parts_of_a_timing_add_up() -> None:
    model, args, _ = _linear()
    started = time.perf_counter()
    graph, capture, analysis = clock.timed_analysis(model, args)
    assert 0 < capture + analysis <= time.perf_counter() - started
    assert graph.num_groups == 8
