"""Pruning and quantizing in one run against doing one after the other, at equal BOPs: `python -m bench.methods`.

QASSO            bits and groups together, within a budget of BOPs
prune, quantize  HESSO in the first half of the steps, then the compact network is trained with quantizers
quantize, prune  trained with quantizers in the first half, then groups are removed
HESSO + PTQ      HESSO all the time, quantizers attached afterwards and not trained

All get the same number of steps, the same data and learning rate, weights of 4 bits (QASSO: 4 to 8, its own choice) and activations of 8.
Where groups go before there are quantizers, MACs are aimed at with which 4-bit weights should meet the BOPs; the estimate errs where
groups are few and large. The other two methods get what "prune, quantize" then really needed with the same seed as their budget. Real
BOPs of each are in the table; `--bops` aims at others.
Results: bench/results/methods_<date>.md and a record per run in bench/results/methods/, which a later call reuses.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import geta
from geta.quant import quantizers
from geta.report.files import prepare_folder

from .facts import machine, recorded, spread, table, versions, written
from .tasks import Task, quantized, task_named, task_options, train

METHODS = ("dense", "QASSO", "prune, quantize", "quantize, prune", "HESSO + PTQ")
_FIRST = "prune, quantize"
_BUDGETED = ("QASSO", "quantize, prune")
"""These get as many BOPs as `_FIRST` needed."""
STEPS = {"digits": 900, "text": 900}
BOPS = {"digits": 0.010, "text": 0.150}
_LOW = geta.Bits(4, 4)
_ACTIVATIONS = geta.Bits(8, 8)
_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
_EQUAL = 1.02
"""Up to which ratio BOPs count as equal."""


@dataclass(frozen=True)
class Run:
    """One network by one method. bops: the share of the dense network's that is aimed at."""

    method: str
    task: str
    seed: int
    steps: int
    bops: float

    @property
    def file(self) -> str:
        """Name of its record."""
        aim = "" if self.bops == BOPS[self.task] else f"-{self.bops:.4g}"
        return f"{self.task}-{self.method.replace(', ', '-').replace(' + ', '-')}-{self.steps}{aim}-{self.seed}.json"


def run(one: Run) -> dict[str, Any]:
    """Train it."""
    method, name, seed, steps, bops = one.method, one.task, one.seed, one.steps, one.bops
    torch.set_num_threads(1)
    task = task_named(name)
    geta.seed_everything(seed)
    model = task.build()
    if method == "dense":
        train(task, model, task.optimizer(model.parameters()), steps, seed=seed)
        return {"score": task.score(model), "bops": 1.0, "removed": 0.0}
    graph = geta.analyze(model, task.example)
    budget = geta.Budget(bops=bops)
    if method == "QASSO":
        quantized(task, model, seed, weights=geta.Bits(4, 8), activations=_ACTIVATIONS)
        optimizer = geta.QASSO(task.optimizer(model.parameters()), graph, target=budget, schedule=steps)
        train(task, model, optimizer, steps, seed=seed)
        return _result(task, geta.compact(model.eval(), graph), optimizer)
    if method == "quantize, prune":
        quantized(task, model, seed, weights=_LOW, activations=_ACTIVATIONS)
        first = geta.QASSO(task.optimizer(model.parameters()), graph, sparsity=0.0, schedule=steps // 2)
        train(task, model, first, steps // 2, seed=seed)
        schedule = geta.Schedule(steps - steps // 2, warmup=0.1, projection=1, joint=0.5, initial_bits=8)
        second = geta.QASSO(task.optimizer(_trained(model)), graph, target=budget, schedule=schedule)
        train(task, model, second, steps - steps // 2, seed=seed + 1)
        return _result(task, geta.compact(model.eval(), graph), second)
    pruning = steps if method == "HESSO + PTQ" else steps // 2
    hesso = geta.HESSO(task.optimizer(model.parameters()), graph, target=geta.Budget(macs=macs_for(name, bops)), schedule=pruning)
    train(task, model, hesso, pruning, seed=seed)
    small = geta.compact(model.eval(), graph, product="eager")
    small_graph = geta.analyze(small, task.example)
    quantized(task, small, seed, weights=_LOW, activations=_ACTIVATIONS)
    if method == "HESSO + PTQ":
        _round(small)
    else:
        qat = geta.QASSO(task.optimizer(small.parameters()), small_graph, sparsity=0.0, schedule=steps - pruning)
        train(task, small, qat, steps - pruning, seed=seed + 1)
    return _result(task, geta.compact(small.eval(), small_graph), hesso)


def _round(model: nn.Module) -> None:
    """Quantizers start wide, for training to narrow them: take them to their final widths at once, with the same ranges."""
    for quantizer in quantizers(model).values():
        quantizer.round_bits_()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _result(task: Task, small: geta.CompactModel, optimizer: Any) -> dict[str, Any]:
    share = small.cost.relative_to(geta.cost(task.build(), task.example))["bops"]
    done = optimizer.progress()
    return {"score": task.score(small), "bops": share, "removed": done["pruned_groups"] / done["groups"], "notes": optimizer.notes}


@functools.cache
def macs_for(name: str, bops: float) -> float:
    """The share of MACs with which a network of 4-bit weights and 8-bit activations has this share of the dense network's BOPs.

    Found on networks that lost the same share of every family: BOPs per MAC hardly depend on which groups go.
    """
    task = task_named(name)
    dense = geta.cost(task.build(), task.example)
    known = []
    for share in _SHARES:
        model = task.build()
        graph = geta.analyze(model, task.example)
        quantized(task, model, 0, weights=_LOW, activations=_ACTIVATIONS)
        _round(model)
        small = geta.compact(model.eval(), graph, graph.random_selection(share), verify=False)
        found = small.cost.relative_to(dense)
        known.append((found["bops"], found["macs"]))
    known.sort()
    for (low, low_macs), (high, high_macs) in pairwise(known):
        if low <= bops <= high:
            return low_macs + (high_macs - low_macs) * (bops - low) / (high - low)
    raise SystemExit(f"{task.name}: {bops:.2%} of the BOPs lie outside of what was tried, {known[0][0]:.2%} to {known[-1][0]:.2%}")


def record(one: Run, folder: Path) -> dict[str, Any]:
    """The record of a run, from its file if it is there."""
    return recorded(folder / one.file, lambda: run(one))


def render(name: str, records: dict[str, list[dict[str, Any]]]) -> list[str]:
    task = task_named(name)
    rows = []
    for method, found in records.items():
        columns = [[record["score"] for record in found], *([100.0 * record[key] for record in found] for key in ("bops", "removed"))]
        rows.append([method, *(spread(column) for column in columns)])
    shown = table(("method", task.unit, "BOPs, %", "groups removed, %"), rows)
    compared = {method: found for method, found in records.items() if method != "dense"}
    scores, bops = ({name: statistics.mean(one[key] for one in found) for name, found in compared.items()} for key in ("score", "bops"))
    if max(bops.values(), default=1.0) > _EQUAL * min(bops.values(), default=1.0):
        return [*shown, "", "The networks differ in BOPs: scores alone don't rank the methods."]
    best = max if task.higher else min
    return [*shown, "", *([f"Best mean: {best(scores, key=scores.__getitem__)}."] if len(scores) > 1 else [])]


def main() -> None:
    parser = task_options(__doc__, sorted(STEPS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--bops", type=float, default=0.0, help="share of the BOPs to aim at; 0 = the task's own")
    options = parser.parse_args()
    folder = options.out / "methods"
    prepare_folder(folder)
    lines = ["# One run, or one after the other", "", f"{versions('torch', 'transformers', 'geta')}; {machine()}."]
    with ProcessPoolExecutor(options.jobs) as pool:
        for name in options.tasks:
            steps, bops = options.steps or STEPS[name], options.bops or BOPS[name]
            seeds = range(options.seeds)
            waiting = {
                (method, seed): pool.submit(record, Run(method, name, seed, steps, bops), folder)
                for method in sorted(options.methods, key=_FIRST.__ne__)
                for seed in seeds
                if method not in _BUDGETED
            }
            for seed in seeds:
                spent = waiting[_FIRST, seed].result()["bops"] if _FIRST in options.methods else bops
                for method in set(_BUDGETED).intersection(options.methods):
                    waiting[method, seed] = pool.submit(record, Run(method, name, seed, steps, spent), folder)
            records: dict[str, list[dict[str, Any]]] = {method: [] for method in options.methods}
            for method, seed in itertools.product(options.methods, seeds):
                records[method].append(waiting[method, seed].result())
                print(f"{name}  {method}  {seed}  {records[method][-1]['score']:.3f}", flush=True)
            title = f"## {name}: {bops:.2%} of the BOPs aimed at, {steps} steps, {options.seeds} seeds, mean ± standard deviation"
            lines += ["", title, "", *render(name, records)]
    written("methods", lines, options.out)


if __name__ == "__main__":
    main()
