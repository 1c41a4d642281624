"""The step benchmark's pure parts, and that every candidate of a network is in the stage that it is named after."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.step_candidates import PEERS, PLAIN, STAGES, Candidate, names
from bench.step_nets import TASKS
from bench.step_overhead import Times, candidates_of, measured, ratio, row, section

import geta
from bench import step_candidates, step_memory

ROOT = Path(__file__).resolve().parents[2]


def test_every_network_trains_one_step_with_its_own_loss() -> None:
    for task in TASKS.values():
        torch.manual_seed(0)
        model, inputs = task.build(), task.inputs(0.1)
        loss = task.loss(step_candidates.call(model, task, inputs))
        loss.backward()
        assert loss.dim() == 0
        assert loss.isfinite()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        task.optimizer(model.parameters()).step()
        assert not all(map(torch.equal, before, model.parameters()))


def test_the_resnet50_is_the_published_one() -> None:
    assert sum(parameter.numel() for parameter in TASKS["resnet50"].build().parameters()) == 25_557_032


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["w", "wa"])
def test_candidates_are_in_their_stage(kind: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[geta.QASSO] = []
    make = step_candidates._geta

    def noting(*arguments: object) -> geta.QASSO:
        made.append(make(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(step_candidates, "_geta", noting)
    candidate = step_candidates.build(f"geta {kind}, {stage}", TASKS["vgg7"], 0.05)
    candidate.whole()
    (optimizer,) = made
    now = optimizer.progress()
    assert now["stage"] == stage.partition(",")[0]
    assert (now["mean_activation_bits"] is not None) == (kind == "wa")
    groups, target = now["groups"], now["target_groups"]
    assert target == groups // 2
    expected = {
        "joint": (target * 4 // 5, target - target * 4 // 5),
        "joint, all at once": (0, target),
        "cool-down": (target, 0),
    }.get(stage, (0, 0))
    assert (now["pruned_groups"], now["redundant_groups"]) == expected


def test_peers_take_part_where_they_do_the_same() -> None:
    assert "torchao QAT w" in names(TASKS["bert"])
    assert "torchao QAT w" not in names(TASKS["vgg7"])
    assert "torchao pt2e QAT wa" in names(TASKS["vgg7"])
    assert "torchao pt2e QAT wa" not in names(TASKS["llama"])
    assert names(TASKS["llama"])[0] == PLAIN
    assert len(set(names(TASKS["llama"]))) == 1 + 2 * len(STAGES) + 4


def test_a_peer_that_is_absent_has_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, *_arguments: object) -> object:
        if step_candidates.is_peer(name):
            raise ImportError("broken")
        return object()

    monkeypatch.setattr(step_candidates, "build", build)
    monkeypatch.setattr(step_candidates.importlib.util, "find_spec", lambda module: None if module == "nncf" else object())
    assert [peer.name for peer in PEERS if step_candidates.missing(peer.name)] == ["nncf wa"]
    found, absent = candidates_of(TASKS["vgg7"], 0.05)
    assert absent == {
        "torchao pt2e QAT wa": "failed: ImportError: broken",
        "brevitas wa": "failed: ImportError: broken",
        "nncf wa": "not installed",
    }
    assert len(found) == 1 + 2 * len(STAGES)
    assert row("nncf wa", {}, {}, absent)[:2] == ["nncf wa", "not installed"]


def test_ratios_are_taken_within_rounds() -> None:
    assert ratio([2.0, 30.0, 5.0], [1.0, 10.0, 1.0]) == 3.0
    times = {PLAIN: Times([10.0, 20.0], [1.0, 1.0], [1.0, 1.0]), "geta w, joint": Times([12.0, 24.0], [1.1, 1.1], [1.0, 1.0])}
    lines = section(TASKS["vgg7"], times, {PLAIN: 2**20, "geta w, joint": 2**21}, dict.fromkeys(names(TASKS["vgg7"]), "absent"))
    assert lines[0] == "## VGG7, 64 x 1x8x8, SGD with momentum"
    joint = next(line for line in lines if line.startswith("| geta w, joint |"))
    assert joint == "| geta w, joint | 12.0 / 18.0 / 24.0 | **1.20** | 1.1 / 1.1 / 1.1 | 1.10 | 1.10 | 2 | **2.00** |"
    assert "| plain | 10.0 / 15.0 / 20.0 | 1.00 | 1.0 / 1.0 / 1.0 | 1.00 |  | 1 | 1.00 |" in lines


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    candidates = {name: Candidate(lambda name=name: calls.append(name), int, int) for name in "abc"}  # type: ignore[misc]
    times = measured(candidates, rounds=2, warmup=1)
    assert calls == [*"bca", *"cab", *"abc"]
    assert all(len(kept) == 2 for found in times.values() for kept in (found.whole, found.update, found.base))


def test_fields_of_a_process_status() -> None:
    assert step_memory.status("VmHWM", "Name:\tpython\nVmPeak:\t  99 kB\nVmHWM:\t    2048 kB\n") == 2 * 2**20


def test_the_quick_benchmark_runs(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "bench.step_overhead",
        "--quick",
        "--no-memory",
        "--only",
        "vgg7",
        "--rounds",
        "1",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = tmp_path.iterdir()
    assert "| geta wa, cool-down |" in report.read_text()
    refused = subprocess.run([*command[:3], "--only", "nothing"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "matches none of vgg7, resnet20" in refused.stderr


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    found = step_memory.peaks(TASKS["vgg7"], [PLAIN], 0.1, 1)
    parameters = 4 * sum(parameter.numel() for parameter in TASKS["vgg7"].build().parameters())
    assert 3 * parameters < found[PLAIN] < 30 * parameters
