"""What does training with geta cost per step? Plain training, geta in each stage and other tools' quantizers: `make bench-step`.

All candidates of a network take turns in one process, in another order each round, so that a drift of the machine's speed meets
all of them alike; a ratio is the median of the ratios within a round. Peak memory is measured afterwards, each candidate in a
process of its own (`bench.step_memory`). Results: bench/results/step_overhead_<date>.md.

`--only 'res*'` chooses networks, `--rounds N` and `--threads N` change the measurement, `--no-memory` leaves memory out, `--quick`
is a small version that shows whether everything runs.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from bench import step_candidates, step_memory
from bench.facts import RESULTS, dated, machine, results_folder, table, versions
from bench.step_candidates import PLAIN, Candidate
from bench.step_nets import TASKS, Task
from geta.quant import native_status
from geta.report.files import write_atomically

LIMITS = {"w": 1.10, "wa": 1.35}
OPTIMIZER_LIMIT, MEMORY_LIMIT = 1.20, 1.25
_HEADER = ("", "step, ms", "ratio", "optimizer, ms", "ratio", "of its base", "peak, MiB", "ratio")
_QUICK_SHARE, _QUICK_ROUNDS = 0.1, 2


@dataclass(frozen=True)
class Times:
    """Milliseconds of each round: a whole training step, the optimizer's part of it, the base optimizer's part alone."""

    whole: list[float]
    update: list[float]
    base: list[float]


def measured(candidates: Mapping[str, Candidate], rounds: int, warmup: int = 1) -> dict[str, Times]:
    """Time the candidates in turns; `warmup` untimed rounds come before."""
    times = {name: Times([], [], []) for name in candidates}
    order = list(candidates)
    gc.collect()
    gc.disable()
    try:
        for number in range(warmup + rounds):
            order = [*order[1:], order[0]]
            for name in order:
                one, found = candidates[name], times[name]
                for call, kept in ((one.whole, found.whole), (one.update, found.update), (one.base, found.base)):
                    milliseconds = _timed(call)
                    if number >= warmup:
                        kept.append(milliseconds)
    finally:
        gc.enable()
    return times


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Median over the rounds of one / other within a round."""
    return statistics.median(mine / theirs for mine, theirs in zip(one, other, strict=True))


def spread(values: Sequence[float]) -> str:
    """min / median / max."""
    return f"{min(values):.1f} / {statistics.median(values):.1f} / {max(values):.1f}"


def row(name: str, times: Mapping[str, Times], memory: Mapping[str, int], absent: Mapping[str, str]) -> list[str]:
    """One line of a network's table; ratios above their limit are bold. absent: why a tool was not measured."""
    if name not in times:
        return [name, absent[name], *[""] * (len(_HEADER) - 2)]
    mine, plain, is_ours = times[name], times[PLAIN], name.startswith("geta ")
    limit = LIMITS[name.removeprefix("geta ").partition(",")[0]] if is_ours else None
    cells = [name, spread(mine.whole), _marked(ratio(mine.whole, plain.whole), limit)]
    cells += [spread(mine.update), _marked(ratio(mine.update, plain.update), OPTIMIZER_LIMIT if is_ours else None)]
    cells.append(f"{ratio(mine.update, mine.base):.2f}" if is_ours else "")
    if name not in memory:
        return [*cells, "", ""]
    share = memory[name] / memory[PLAIN]
    return [*cells, f"{memory[name] / 2**20:.0f}", _marked(share, MEMORY_LIMIT if name.startswith("geta w,") else None)]


def _marked(value: float, limit: float | None) -> str:
    return f"**{value:.2f}**" if limit is not None and value > limit else f"{value:.2f}"


def section(task: Task, times: Mapping[str, Times], memory: Mapping[str, int], absent: Mapping[str, str]) -> list[str]:
    """A network's heading and table."""
    rows = [row(name, times, memory, absent) for name in step_candidates.names(task)]
    return [f"## {task.words}", "", *table(_HEADER, rows), ""]


def heading(options: argparse.Namespace) -> list[str]:
    """What was measured, on what, and how to read it."""
    installed = [peer.module for peer in step_candidates.PEERS if peer.installed]
    packages = ("torch", "geta", "transformers", *dict.fromkeys(installed))
    return [
        "# Time and memory of a training step",
        "",
        f"{versions(*packages)}; {machine()}, {options.threads} threads, {options.rounds} rounds"
        + (", quick: small batches, the numbers mean nothing." if options.quick else "."),
        f"Quantizers' kernels: {'compiled' if native_status().used else native_status()}.",
        "",
        "Weights of 4 to 8 bits (`w`), with 8-bit activations (`wa`), half of all groups removed. `joint` is the last of five periods:",
        "two fifths of all groups are zero, a tenth is being forgotten; `joint, all at once` forgets half of them in a single period.",
        "`ratio` is to plain training; `of its base`: the optimizer's step over that of its base optimizer on the same parameters, those",
        f"of the quantizers included. Limits: steps {LIMITS['w']:.2f} and {LIMITS['wa']:.2f}, optimizers {OPTIMIZER_LIMIT:.2f}, memory of "
        f"weight-only training {MEMORY_LIMIT:.2f};",
        "ratios above them are bold. Peers have 8-bit quantizers and no pruning.",
        f"Memory: {step_memory.METHOD}.",
        "",
    ]


def candidates_of(task: Task, share: float) -> tuple[dict[str, Candidate], dict[str, str]]:
    """All candidates that can be made here, and why other tools are absent: not installed, or they failed on this network."""
    found, absent = {}, {}
    for name in step_candidates.names(task):
        if step_candidates.missing(name):
            absent[name] = "not installed"
            continue
        try:
            found[name] = step_candidates.build(name, task, share)
        except Exception as error:
            if not step_candidates.is_peer(name):
                raise
            absent[name] = f"failed: {type(error).__name__}: {error}"
    return found, absent


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="*", help="pattern of network names: " + ", ".join(TASKS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=results_folder, default=RESULTS, help="folder of the report")
    options = parser.parse_args()
    tasks = [task for name, task in TASKS.items() if fnmatchcase(name, options.only)]
    if not tasks:
        parser.error(f"--only {options.only} matches none of {', '.join(TASKS)}")
    torch.set_num_threads(options.threads)
    share = _QUICK_SHARE if options.quick else 1.0
    options.rounds = min(options.rounds, _QUICK_ROUNDS) if options.quick else options.rounds
    lines = heading(options)
    print("\n".join(lines), flush=True)
    for task in tasks:
        candidates, absent = candidates_of(task, share)
        times = measured(candidates, options.rounds)
        del candidates
        memory = step_memory.peaks(task, list(times), share, options.threads) if options.memory else {}
        found = section(task, times, memory, absent)
        print("\n".join(found), flush=True)
        lines += found
    path = dated("step_overhead", folder=options.out)
    write_atomically(path, "\n".join(lines).encode())
    print(path)


if __name__ == "__main__":
    main()
