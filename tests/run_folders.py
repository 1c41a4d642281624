"""Run folders as `geta compress` leaves them, made without training: tiny networks, a random selection, made-up curves."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import geta
from geta.report.run_files import analysis_files

HOSTILE = "</script><img src=x onerror=alert(1)>"

RECIPE = """\
version: 1
name: {name}
provenance:
  source: GETA (arXiv 2502.16638), table 2
  setting: made up for a test
  published: {{accuracy: 91.42, relative_bops: 0.045}}
model: {{source: "tests:net"}}
compress:
  sparsity: {sparsity}
  weight_bits: [4, 8]
train: {{epochs: 20, seed: 0}}
"""


class Net(nn.Module):
    """Two prunable families, one that stays, a residual sum; [B, 3, 8, 8] -> [B, 4]."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(width, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, width, 3, padding=1))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.body(x)
        return self.head(x.mean((2, 3)))


def hostile_net() -> nn.Sequential:
    """A module whose name would end a script element if it were written as it is."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(HOSTILE, nn.Linear(4, 8))
    model.add_module("last", nn.Linear(8, 3))
    return model


def small_run(folder: Path, **settings: Any) -> Path:
    """The folder of a run over `Net`."""
    torch.manual_seed(0)
    return write_run(folder, Net(), (torch.randn(2, 3, 8, 8),), **settings)


def write_run(
    folder: Path,
    model: nn.Module,
    args: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    name: str = "small",
    sparsity: float = 0.5,
    score: float = 98.61,
    baseline: bool = True,
    examples: int = 2,
    saved: bool = True,
) -> Path:
    """Write a complete run folder: all files of the contract, the network cut and saved, the rest made up. Returns `folder`.

    saved: False for networks with names that `CompactModel.save` refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graph = geta.analyze(model, args, kwargs or {})
    for file, text in analysis_files(graph).items():
        (folder / file).write_text(text, encoding="utf-8")
    dense = geta.cost(model, args, kwargs or {})
    geta.quantize(model, weights=geta.Bits(4, 8), activations=geta.Bits(8, 8), calibration=[args] if not kwargs else [kwargs])
    graph.zero_(model, graph.random_selection(sparsity))
    compact = geta.compact(model, graph)
    if saved:
        compact.save(folder / "compact")
    write_records(folder, graph, (dense, compact), name=name, sparsity=sparsity, score=score, baseline=baseline, examples=examples)
    return folder


def write_records(folder: Path, graph: Any, networks: tuple[Any, Any], **settings: Any) -> None:
    """Everything but the compact model and the analysis."""
    dense, compact = networks
    cost, examples, baseline = compact.cost, settings["examples"], settings["baseline"]
    score, name = settings["score"], settings["name"]
    costs = {
        key: {"operations": [{**row, "macs": row["macs"] / examples, "bops": row["bops"] / examples} for row in each.to_json()["per_op"]]}
        for key, each in (("dense", dense), ("compact", cost))
    }
    (folder / "costs.json").write_text(json.dumps(costs))
    kept = {family: len(indices) for family, indices in compact.kept.items()}
    pruned = sum(compact.info.family_sizes.values()) - sum(kept.values())
    result = {
        "format": 1,
        "name": name,
        "task": "classification",
        "metric": {
            "name": "accuracy",
            "unit": "%",
            "higher_is_better": True,
            "dense": 98.89 if baseline else None,
            "compact": score,
            "difference": score - 98.89 if baseline else None,
        },
        "params": {"dense": dense.params, "compact": cost.params},
        "macs": {"dense": dense.macs / examples, "compact": cost.macs / examples},
        "bops": {"dense": dense.bops / examples, "compact": cost.bops / examples},
        "bytes": {"dense_state_dict": dense.weight_bytes, "compact_weights": cost.weight_bytes, "compact_folder": cost.weight_bytes + 4000},
        "relative": cost.relative_to(dense),
        "groups": {"groups": graph.num_groups, "target_groups": pruned, "pruned_groups": pruned},
        "notes": ["a note with <b>markup</b> in it"],
        "bits": {tensor: 4 + number % 5 if ":" not in tensor else 8 for number, tensor in enumerate(compact.bits)},
        "kept": kept,
        "latency_ms": {
            batch: {
                "dense": {"minimum": 0.9 * n, "median": 1.0 * n, "p95": 1.2 * n, "maximum": 1.5 * n},
                "compact": {"minimum": 1.9 * n, "median": 2.0 * n, "p95": 2.2 * n, "maximum": 2.5 * n},
            }
            for n, batch in enumerate(("1", "64"), 1)
        },
        "max_rel_difference": 3.4e-16,
        "max_rel_difference_float32": 2e-7,
        "reloaded_equal": True,
        "seconds": 101.5,
        "versions": {"geta": geta.__version__, "torch": torch.__version__},
        "seed": 0,
    }
    (folder / "recipe.yaml").write_text(RECIPE.format(name=json.dumps(name), sparsity=settings["sparsity"]))
    environment = {
        "versions": {"geta": geta.__version__, "torch": torch.__version__},
        "python": "3.11.0",
        "platform": "Linux-x86_64",
        "threads": 1,
        "device": "cpu",
        "command": ["geta", "compress", "recipe.yaml", "train.seed=0"],
        "started": "2026-01-01T00:00:00+00:00",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "history.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in history(settings["sparsity"], score, baseline=baseline))
    )
    (folder / "log.txt").write_text("made for a test\n")
    (folder / "result.json").write_text(json.dumps(result))


def history(sparsity: float = 0.5, score: float = 98.61, *, baseline: bool = True, epochs: int = 20) -> list[dict[str, Any]]:
    """Rows that look like a run: a plain network, and one that goes through the four stages."""
    rows = []
    for epoch in range(1, epochs + 1):
        done = epoch / epochs
        rate = 0.05 * (1 + math.cos(math.pi * done))
        if baseline:
            value = 98.89 - 40 * math.exp(-8 * done) + 0.6 * math.sin(epoch)
            rows.append(_row("dense", epoch, "", 2.3 * math.exp(-6 * done) + 0.004, value, 0.0, None, None, rate))
        stage = "warm-up" if done <= 0.1 else "projection" if done <= 0.25 else "joint" if done <= 0.6 else "cool-down"
        zero = sparsity * min(1.0, max(0.0, int((done - 0.25) / 0.07) / 5))
        bound = 16.0 if done <= 0.1 else max(8.0, 16 - 8 * (done - 0.1) / 0.15)
        bits = min(bound, 16 - 11.6 * min(1.0, done / 0.6))
        value = score if epoch == epochs else score - 45 * math.exp(-6 * done) - (9 * math.sin(epoch) ** 2 if stage == "joint" else 0.4)
        rows.append(_row("compact", epoch, stage, 2.3 * math.exp(-5 * done) + 0.01, value, zero, bits, bound, rate))
    return rows


def _row(run: str, epoch: int, stage: str, loss: float, score: float, *rest: Any) -> dict[str, Any]:
    zero, bits, bound, rate = rest
    return {
        "run": run,
        "step": 22 * epoch,
        "epoch": epoch,
        "stage": stage,
        "loss": loss,
        "score": score,
        "group_sparsity": zero,
        "mean_weight_bits": bits,
        "upper_bound": bound,
        "learning_rate": rate,
        "seconds": 2.5 * epoch,
    }


def sweep(folder: Path, values: tuple[float, ...] = (0.3, 0.5, 0.7)) -> Path:
    """A sweep over sparsities, one run each."""
    runs = [{"value": value, "folder": f"sparsity={value}"} for value in values]
    for run in runs:
        small_run(folder / run["folder"], name=f"sparsity {run['value']}", sparsity=run["value"], score=99.0 - 4 * run["value"] ** 3)
    (folder / "sweep.json").write_text(json.dumps({"key": "compress.sparsity", "runs": runs}))
    return folder
