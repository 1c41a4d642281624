"""Capture and analysis of all models of the zoo, one after another in one process: `python -m bench.zoo.timing [--only GLOB]`.

On the meta device where a model can be built and analysed there, else with real weights. The table is written every 20 models
and at the end, to bench/results/analysis_time_<date>.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from bench.clock import timed_analysis
from bench.facts import RESULTS, dated, deadline, machine, quantile, results_folder, table, versions
from geta.report.files import write_atomically

from .catalogue import catalogue
from .check import first_line
from .entry import Entry

_EVERY = 20
_SLOW = 5.0
_SHARES = (0.5, 0.75, 0.9, 0.95, 0.99)
_LIMIT = 600.0
_HEADER = ("model", "device", "capture, s", "analysis, s", "sum, s", "nodes", "groups", "note")


@dataclass(frozen=True)
class Timing:
    """One model. device: "meta", "cpu", or "" when nothing worked; note: the error, or why it was not the meta device.

    loop: seconds of a million additions in Python just before, which tell how fast the machine was at that time.
    """

    name: str
    device: str = ""
    capture: float = 0.0
    analysis: float = 0.0
    nodes: int = 0
    groups: int = 0
    note: str = ""
    loop: float = 0.0

    @property
    def seconds(self) -> float:
        return self.capture + self.analysis


def measure(entry: Entry, limit: float = _LIMIT) -> Timing:
    """Time one model; its last error when it can be analysed neither on the meta device nor on the CPU."""
    reason, loop = "", _loop()
    for device in ("meta", "cpu"):
        try:
            with deadline(limit):
                return replace(_timed(entry, device, reason), loop=loop)
        except Exception as error:  # noqa: BLE001 - whatever a model raises belongs into the table
            reason = f"not on the {device} device: {type(error).__name__}: {first_line(error)}"
        gc.collect()
    return Timing(entry.name, note=reason, loop=loop)


def _loop(additions: int = 1_000_000) -> float:
    start, total = time.perf_counter(), 0
    for number in range(additions):
        total += number
    return time.perf_counter() - start


def _timed(entry: Entry, device: str, note: str) -> Timing:
    with torch.device(device):
        model, args, kwargs = entry.build()
    gc.collect()
    graph, capture, analysis = timed_analysis(model, args, kwargs)
    return Timing(entry.name, device, capture, analysis, len(graph.analysis.capture.graph.nodes), graph.num_groups, note)


def render(found: Sequence[Timing], total: int, facts: str) -> str:
    """The report, also of a part of the models."""
    good = [timing for timing in found if timing.device]
    slow = sorted((timing for timing in good if timing.seconds > _SLOW), key=lambda timing: -timing.seconds)
    failed = [timing for timing in found if not timing.device]
    lines = ["# Time of the analysis", "", facts, ""]
    lines += [f"{len(found)} of {total} models, one after another in one process: {_devices(good)}, {len(failed)} failed."]
    loops = [1000 * timing.loop for timing in found]
    fastest, usual, slowest = min(loops), statistics.median(loops), max(loops)
    lines += [f"A million additions in Python, made before every model, took {fastest:.0f} to {slowest:.0f} ms, {usual:.0f} in the median."]
    if good:
        seconds = [timing.seconds for timing in good]
        within = sum(second <= _SLOW for second in seconds)
        shares = [f"{quantile(seconds, share):.2f}" for share in _SHARES]
        lines += [f"{within / len(good):.1%} take at most {_SLOW:.0f} s for capture and analysis.", ""]
        lines += table(
            ("", *(f"{share:.0%}" for share in _SHARES), "mean", "longest"),
            [["capture + analysis, s", *shares, f"{statistics.fmean(seconds):.2f}", f"{max(seconds):.2f}"]],
        )
    lines += ["", f"## Above {_SLOW:.0f} s", "", *(table(_HEADER, [_cells(t) for t in slow], left=(0, 1, 7)) if slow else ["None."])]
    if failed:
        lines += ["", "## Failed", "", *(f"- `{timing.name}`: {timing.note}" for timing in failed)]
    lines += ["", "## All", "", *table(_HEADER, [_cells(timing) for timing in found], left=(0, 1, 7))]
    return "\n".join(lines) + "\n"


def _devices(good: Iterable[Timing]) -> str:
    names = [timing.device for timing in good]
    return f"{names.count('meta')} on the meta device, {names.count('cpu')} with real weights"


def _cells(timing: Timing) -> list[str]:
    if not timing.device:
        return [timing.name, "**failed**", "", "", "", "", "", timing.note]
    seconds = [f"{value:.2f}" for value in (timing.capture, timing.analysis, timing.seconds)]
    return [timing.name, timing.device, *seconds, str(timing.nodes), str(timing.groups), timing.note]


def time_all(entries: Sequence[Entry], path: Path, facts: str, *, limit: float = _LIMIT) -> list[Timing]:
    """Time the entries in order; the report is written after every 20 and at the end."""
    found: list[Timing] = []
    for entry in entries:
        found.append(measure(entry, limit))
        gc.collect()
        print(f"{len(found)}/{len(entries)}  " + "  ".join(cell for cell in _cells(found[-1]) if cell), flush=True)
        if len(found) % _EVERY == 0 or len(found) == len(entries):
            write_atomically(path, render(found, len(entries), facts).encode())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="names to time, e.g. 'timm/*'")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=_LIMIT, help="seconds per model and device")
    parser.add_argument("--out", type=results_folder, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = [entry for name, entry in catalogue().items() if fnmatch.fnmatchcase(name, options.only)]
    if not chosen:
        parser.error(f"no model of the zoo is called '{options.only}'; python -m bench.zoo.catalogue lists them")
    timed_analysis(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), (torch.randn(2, 4),))  # what is loaded at first use
    packages = versions("torch", "torchvision", "timm", "transformers", "diffusers", "geta")
    path = dated("analysis_time", folder=options.out)
    found = time_all(chosen, path, f"Measured on {machine()}, {options.threads} threads; {packages}.", limit=options.limit)
    print(path)
    return 0 if all(timing.device for timing in found) else 1


if __name__ == "__main__":
    sys.exit(main())
