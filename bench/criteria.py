"""Which groups should go? Criteria of `geta.Saliency` at equal MACs, in training: `python -m bench.criteria`.

HESSO prunes a VGG7 on digits and a small Llama on Python's own text down to the same share of the MACs (`geta.Budget(macs=)`: which groups
of which family, decided from the criterion's scores), in one run from scratch; only the criterion differs. "random" draws the scores.
Results: bench/results/criteria_<date>.md and a record per run in bench/results/criteria/, which a later call reuses.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import geta
from geta.optim.saliency import GroupStatistics
from geta.report.files import prepare_folder

from .facts import machine, recorded, spread, table, versions, written
from .tasks import task_named, task_options, train

STEPS = {"digits": 500, "text": 500}
MACS = {"digits": 0.03, "text": 0.5}


def draw(groups: GroupStatistics) -> Tensor:
    """Numbers that say nothing."""
    return torch.rand_like(groups.norm)


CRITERIA: dict[str, geta.Saliency] = {
    "the default five": geta.Saliency(),
    "the default five, within families": geta.Saliency(normalise="family"),
    "magnitude": geta.Saliency("magnitude"),
    "average magnitude": geta.Saliency("average_magnitude"),
    "cosine": geta.Saliency("cosine"),
    "Taylor, 1st order": geta.Saliency("taylor_first"),
    "Taylor, 1st order, and 0.2 average magnitude": geta.Saliency({"taylor_first": 1.0, "average_magnitude": 0.2}),
    "Taylor, 2nd order": geta.Saliency("taylor_second"),
    "relative magnitude": geta.Saliency("relative_magnitude"),
    "relative Taylor": geta.Saliency("relative_taylor"),
    "Fisher": geta.Saliency("fisher"),
    "activation": geta.Saliency("activation"),
    "random": geta.Saliency(draw),
}


def run(name: str, criterion: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one network."""
    torch.set_num_threads(1)
    task = task_named(name)
    geta.seed_everything(seed)
    model = task.build()
    graph = geta.analyze(model, task.example)
    base = task.optimizer(model.parameters())
    optimizer = geta.HESSO(base, graph, target=geta.Budget(macs=MACS[name]), schedule=steps, saliency=CRITERIA[criterion])
    train(task, model, optimizer, steps, seed=seed)
    small = geta.compact(model.eval(), graph)
    relative, done = small.cost.relative_to(geta.cost(task.build(), task.example)), optimizer.progress()
    share = done["pruned_groups"] / done["groups"]
    return {"score": task.score(small), "macs": relative["macs"], "params": relative["params"], "removed": share, "notes": optimizer.notes}


def record(name: str, criterion: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """The record of a run, from its file if it is there."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in criterion)
    return recorded(folder / f"{name}-{plain}-{steps}-{MACS[name]}-{seed}.json", lambda: run(name, criterion, seed, steps))


def main() -> None:
    options = task_options(__doc__, sorted(STEPS)).parse_args()
    folder = options.out / "criteria"
    prepare_folder(folder)
    lines = ["# Criteria for groups, at equal MACs", "", f"{versions('torch', 'transformers', 'geta')}; {machine()}."]
    with ProcessPoolExecutor(options.jobs) as pool:
        for name in options.tasks:
            steps, seeds = options.steps or STEPS[name], range(options.seeds)
            waiting = {key: pool.submit(record, name, *key, steps, folder) for key in product(CRITERIA, seeds)}
            rows = []
            for criterion in CRITERIA:
                found = [waiting[criterion, seed].result() for seed in seeds]
                shares = (spread([100.0 * one[key] for one in found]) for key in ("macs", "params", "removed"))
                rows.append([criterion, spread([one["score"] for one in found]), *shares])
                print(f"{name}  {criterion}  {rows[-1][1]}", flush=True)
            header = ("criterion", task_named(name).unit, "MACs, %", "parameters, %", "groups removed, %")
            title = f"## {name}: {MACS[name]:.0%} of the MACs, {steps} steps, {len(seeds)} seeds, mean ± standard deviation"
            lines += ["", title, "", *table(header, rows)]
    written("criteria", lines, options.out)


if __name__ == "__main__":
    main()
