"""The zoo's own machinery: a good model passes, a wrong cut is recorded, the runner resumes, the report counts."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.zoo import from_timm, own_nets, parts
from bench.zoo.catalogue import catalogue, find
from bench.zoo.check import check, excuse_rounding
from bench.zoo.dropout import Dropout
from bench.zoo.entry import Built, Entry
from bench.zoo.perturb import fresh_inputs, perturb
from bench.zoo.report import render, write_report
from bench.zoo.run import Run, due, run_all
from torch import Tensor, nn

import geta
import zoo_nets

PARTS = {
    "build",
    "analyze",
    "compact 1",
    "eval 1",
    "train 1",
    "gradients",
    "export",
    "again",
    "quantized",
    "compact 8",
    "eval 8",
    "train 8",
}


class Gated(nn.Module):
    """A residual branch behind a gate of zero: what is cut inside it can't be seen unless the gate is redrawn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 3, 1)
        self.gate = nn.Parameter(torch.zeros(3, 1, 1))
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        inner = self.conv2(self.drop(torch.relu(self.bn(self.conv1(x)))))
        return {"scores": self.fc((x + self.gate * inner).mean((2, 3)))}


def tiny() -> Built:
    return Gated(), (torch.randn(2, 3, 8, 8),), {}


TINY = Entry("own/tiny", tiny)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return check(TINY)


def test_a_good_model_passes_every_part(record: dict[str, Any]) -> None:
    assert record["ok"], record
    assert set(record["parts"]) == PARTS | {"gradients with dropout"}
    analyzed = record["parts"]["analyze"]
    assert analyzed["groups"] == 16
    assert "reaches the model output" in [reason for reason, _ in analyzed["reasons"]]
    for part in ("eval 1", "train 1", "eval 8", "train 8", "again"):
        assert record["parts"][part]["difference"] <= 1e-5
        assert record["parts"][part]["effect"] > 1e-2, "zeroing changed nothing: the comparison would be empty"
    json.dumps(record, allow_nan=False)


def test_a_wrong_cut_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    real = geta.compact

    def wrong(*args: Any, **options: Any) -> nn.Module:
        small = real(*args, **options)
        with torch.no_grad():
            small.net.get_parameter("conv2.weight")[0, 0].add_(0.5)
        return small

    monkeypatch.setattr(geta, "compact", wrong)
    found = check(TINY)
    assert not found["ok"]
    failed = {name: part for name, part in found["parts"].items() if not part["ok"]}
    assert {"eval 1", "train 1", "eval 8", "train 8"} <= set(failed)
    assert failed["eval 1"]["difference"] > 1e-3
    assert "differs" in failed["eval 1"]["error"]
    assert not found["float64"]["eval 1"]["ok"], "more digits must not turn a wrong cut into rounding"


def test_an_exception_is_recorded_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> nn.Module:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(geta, "compact", broken)
    found = check(TINY)
    assert found["parts"]["compact 1"]["error"] == "RuntimeError: no such thing"
    assert not found["parts"]["compact 8"]["ok"]
    assert found["parts"]["analyze"]["ok"]
    assert not found["ok"]


def test_a_lost_gradient_is_noticed() -> None:
    class Cut(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net[2](self.net[1](self.net[0](x)).detach())

    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = geta.analyze(net, (torch.randn(2, 4),))
    with pytest.raises(parts.WrongError, match="2 parameters lost their gradient"):
        parts.gradients(net, graph, Cut(net))


def test_perturbing_opens_gates_and_is_deterministic() -> None:
    models = [tiny()[0] for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    inputs = torch.randn(2, 3, 8, 8)
    for model in models:
        perturb(model, (inputs,), {})
    assert bool((models[0].gate != 0).all())
    assert models[0].bn.running_mean.abs().min() > 0
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert models[0].bn.momentum == 0.1


def test_fresh_inputs_keep_kinds() -> None:
    ids = torch.tensor([[5, 6, 7, 9, 9], [1, 2, 3, 4, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    x = torch.randn(2, 6)
    (new_x,), new = fresh_inputs((x,), {"ids": ids, "mask": mask}, seed=1)
    assert torch.equal(new["mask"], mask)
    assert not torch.equal(new["ids"], ids)
    assert torch.equal(new["ids"].sort(1).values, ids.sort(1).values)
    assert not torch.equal(new_x, x)
    assert new_x.abs().max() <= x.abs().max()


def test_dropout_is_switched_off_and_on_again() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3)
    found = Dropout(model)
    found.off()
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.0}
    assert model.self_attn.dropout == 0.0
    found.on()
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {model.self_attn.dropout} == {0.3}
    assert not Dropout(nn.Linear(2, 2)).found


def test_the_catalogue_is_complete() -> None:
    names = list(catalogue())
    assert sum(name.startswith("timm/") for name in names) == len(from_timm.entries())
    assert {"timm/resnet50", "timm/vit_small_patch16_224"} <= set(names)  # of shipped recipes, beside the 98 families
    assert len(from_timm.entries()) >= 98
    assert {name.removeprefix("own/") for name in names if name.startswith("own/")} >= set(zoo_nets.ZOO_NETS)
    assert {entry.name for entry in own_nets.entries()} <= set(names)
    assert find("torchvision/regnet_y_128gf").heavy
    with pytest.raises(KeyError, match="torchvision/resnet18"):
        find("timm/resnet18")


@pytest.mark.parametrize("name", list(zoo_nets.ZOO_NETS))
def test_own_nets_run_and_are_repeatable(name: str) -> None:
    first, second = (Entry(name, zoo_nets.ZOO_NETS[name]).build() for _ in range(2))
    outputs = [parts.outputs(model, (args, kwargs)) for model, args, kwargs in (first, second)]
    assert outputs[0]
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
        assert bool(a.isfinite().all())


@dataclass(frozen=True)
class FakeRun(Run):
    """Every check is a line of Python; a file in the folder counts how often a model was checked."""

    def command(self, name: str) -> list[str]:
        source, _, model = name.partition("/")
        code = {
            "good": f"print('noise'); print({json.dumps(_record(name))!r})",
            "wrong": f"print({json.dumps(_record(name, ok=False))!r})",
            "crash": "import sys; sys.exit('out of luck')",
            "slow": "import time; time.sleep(60)",
        }[source]
        return [sys.executable, "-c", f"open({str(self.folder / f'{model}.count')!r}, 'a').write('x'); {code}"]

    def counts(self) -> dict[str, int]:
        return {path.stem: len(path.read_text()) for path in sorted(self.folder.glob("*.count"))}


def _record(name: str, *, ok: bool = True) -> dict[str, Any]:
    analyzed = {"ok": True, "analysis_seconds": 0.5, "captured": "open batch", "groups": 7, "covered": 0.75, "reasons": [], "seconds": 1}
    compared = {"ok": ok, "difference": 1e-7 if ok else 0.3, "seconds": 1} | ({} if ok else {"error": "compact differs by 0.3 | of it"})
    return {"name": name, "ok": ok, "versions": {"torch": "2"}, "parts": {"analyze": analyzed, "eval 1": compared}}


def _entries(*names: str) -> list[Entry]:
    return [Entry(name, tiny, heavy=name.endswith("big")) for name in names]


def test_the_runner_resumes(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "zoo", limit=20, isolated=True)
    entries = _entries("good/a", "good/big", "wrong/b", "crash/c")
    lines: list[str] = []
    run_all(run, due(run, entries[:2]), say=lines.append)
    assert run.counts() == {"a": 1, "big": 1}
    run_all(run, due(run, entries), say=lines.append)
    assert run.counts() == {"a": 1, "b": 1, "big": 1, "c": 1}
    assert due(run, entries) == []
    assert [entry.name for entry in due(run, entries, failed=True)] == ["wrong/b", "crash/c"]
    assert len(due(run, entries, fresh=True)) == 4
    crash = run.record("crash/c")
    assert crash is not None
    assert crash["parts"]["process"]["error"] == "the process ended with code 1: out of luck"
    assert any("good/a" in line and line.endswith("ok") for line in lines)
    assert any("wrong/b" in line and "FAILED eval 1" in line for line in lines)


def test_a_model_that_takes_too_long_is_a_failure(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "zoo", limit=1, isolated=True)
    run_all(run, _entries("slow/a"), say=lambda line: None)
    record = run.record("slow/a")
    assert record is not None
    assert not record["ok"]
    assert "no result within 1 seconds" in record["parts"]["process"]["error"]


def test_the_report_counts_and_lists_failures(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "zoo", limit=20, isolated=True)
    run_all(run, _entries("good/a", "wrong/b", "crash/c"), say=lambda line: None)
    path, failures = write_report(run, ["good/a", "wrong/b", "crash/c", "good/later"])
    text = path.read_text()
    assert failures == 2
    assert path.parent == tmp_path
    assert "3 models checked, 1 without a failure, 2 with one. Not checked yet: 1 (good/later)." in text
    assert "| good/a | open batch | 0.5 |" in text
    assert "| wrong/b | open batch | 0.5 |  | 7 | 75% | 3.0e-01 | **failed**: eval 1 |" in text
    assert "- `crash/c`, process: the process ended with code 1: out of luck" in text
    assert "in 2 of 2 models (100%)" in text


def test_a_failure_that_only_rounding_explains_says_so() -> None:
    record = {**_record("x/y", ok=False), "float64": {"eval 1": {"ok": True, "difference": 1e-14}}}
    assert "**failed**: eval 1; exact in float64, so rounding" in render([record])


@pytest.mark.parametrize(("rounding", "exact", "fine"), [(2e-4, True, True), (1e-4, True, False), (2e-4, False, False)])
def test_rounding_is_excused_only_when_the_model_itself_rounds_as_much(rounding: float, exact: bool, fine: bool) -> None:
    part = {"ok": False, "error": "compact differs", "difference": 4e-4, "rounding": rounding}
    record: dict[str, Any] = {"ok": False, "parts": {"train 1": part}, "float64": {"train 1": {"ok": exact}}}
    excuse_rounding(record)
    assert record["ok"] is fine and part["ok"] is fine
    assert ("note" in part) is fine


@pytest.mark.parametrize("checked", [True, False])
def test_a_second_cut_may_round_like_the_first_if_float64_says_that_it_is_exact(checked: bool) -> None:
    again = {"ok": False, "error": "compact differs", "difference": 1.2e-4, "rounding": 0.0}
    wide = {"eval 1": {"ok": True}} | ({"again": {"ok": True}} if checked else {})
    record: dict[str, Any] = {"ok": False, "parts": {"eval 1": {"ok": True, "rounding": 2e-4}, "again": again}, "float64": wide}
    excuse_rounding(record)
    assert record["ok"] is checked
