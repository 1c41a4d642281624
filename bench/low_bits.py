"""Gradients of the rounding at 2, 3 and 4 bits: straight-through, StableQAT's Fourier surrogate, DSQ: `python -m bench.low_bits`.

The mean slope of a surrogate is below 1, so with SGD it takes shorter steps on everything that is quantized at the same learning rate. Two
comparisons therefore: at the same learning rate, and at the same learning rate times mean slope, where the quantized weights' rate is
divided by the slope. Steps of Adam don't depend on the scale of gradients: there the first comparison is the matched one. Weights are
quantized by LSQ with learned scales per tensor, activations are not; all seeds start from the same networks. Results:
bench/results/low_bits_<date>.md and a record per run in bench/results/low_bits/, which a later call reuses.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch

import geta
from geta.quant.surrogate import Surrogate
from geta.report.files import prepare_folder

from .facts import machine, recorded, spread, table, versions, written
from .tasks import quantized, task_named, task_options, train

BITS = (2, 3, 4)
STEPS = {"digits": 500, "text": 500}
SURROGATES: dict[str, Surrogate] = {"STE": geta.STE(), "Fourier (StableQAT)": geta.Fourier((0.21,)), "DSQ": geta.DSQ(), "DGE": geta.DGE()}


Case = tuple[str, int | None, bool]
"""Which surrogate, bits (None = not quantized), whether the learning rate makes up for its slope."""


def run(name: str, case: Case, seed: int, steps: int) -> dict[str, Any]:
    """Train one network."""
    surrogate, bits, matched = case
    torch.set_num_threads(1)
    task = task_named(name)
    geta.seed_everything(seed)
    model = task.build()
    slope = 1.0
    if bits is not None:
        chosen = SURROGATES[surrogate]
        quantized(task, model, seed, weights=geta.FixedBits(bits), activations=None, surrogate=chosen)
        slope = chosen.mean_slope if matched else 1.0
    weights = [p for n, p in model.named_parameters() if "parametrizations" in n and n.endswith("original")]
    mine = {id(p) for p in weights}
    others = [p for p in model.parameters() if id(p) not in mine]
    base = task.optimizer([{"params": others}, *([{"params": weights}] if weights else [])])
    if weights:
        base.param_groups[1]["lr"] /= slope
    train(task, model, base, steps, seed=seed)
    return {"score": task.score(model), "slope": slope}


def record(name: str, case: Case, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """The record of a run, from its file if it is there."""
    surrogate, bits, matched = case
    path = folder / f"{name}-{surrogate.split()[0]}-{bits or 32}-{'matched' if matched else 'same'}-{steps}-{seed}.json"
    return recorded(path, lambda: run(name, case, seed, steps))


def _of_slope_one(surrogate: str) -> bool:
    return SURROGATES[surrogate].mean_slope == 1.0


def main() -> None:
    options = task_options(__doc__, sorted(STEPS)).parse_args()
    folder = options.out / "low_bits"
    prepare_folder(folder)
    lines = ["# Gradients of the rounding at low bit widths", "", f"{versions('torch', 'transformers', 'geta')}; {machine()}."]
    with ProcessPoolExecutor(options.jobs) as pool:
        for name in options.tasks:
            steps, seeds = options.steps or STEPS[name], range(options.seeds)
            kinds = (False,) if task_named(name).scale_free else (False, True)
            cases: list[Case] = [("float", None, False), *product(SURROGATES, BITS, kinds)]
            cases = [case for case in cases if not (case[2] and _of_slope_one(case[0]))]  # both comparisons are the same run
            waiting = {case: [pool.submit(record, name, case, seed, steps, folder) for seed in seeds] for case in cases}
            found = {case: [future.result()["score"] for future in futures] for case, futures in waiting.items()}
            rows = [["not quantized", "", spread(found["float", None, False]), "", ""]]
            for matched, surrogate in product(kinds, SURROGATES):
                kind = "equal rate times slope" if matched else "equal rate"
                columns = [spread(found[surrogate, bits, matched and not _of_slope_one(surrogate)]) for bits in BITS]
                rows.append([surrogate, kind, *columns])
            header = ("gradient", "compared at", *(f"{bits} bits" for bits in BITS))
            unit = task_named(name).unit
            lines += ["", f"## {name}: {unit}, {steps} steps, {len(seeds)} seeds", "", *table(header, rows, left=(0, 1))]
            print(f"{name}: done", flush=True)
    written("low_bits", lines, options.out)


if __name__ == "__main__":
    main()
