"""Check one model of the zoo and print a JSON record: `python -m bench.zoo.check timm/resnet10t`.

Parts of a check: build, analyze, and for 50 % of all groups removed at random (keeping multiples of 1 and of 8) compact, evaluation and
training outputs against the zeroed model, then gradients, re-export and a second prune. A part that fails is recorded with
the first line of its error; the others go on.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import nn

import geta
from geta.graph import DependencyGraph

from . import parts
from .catalogue import find
from .dropout import Dropout
from .entry import Entry
from .perturb import perturb

T = TypeVar("T")
MULTIPLES = (1, 8)
ROUNDINGS = 3.0
"""Two independent roundings of one result may differ by this many times the error of one."""


class Record:
    """Outcome of every part, in order: ok, seconds, figures, or the first line of the error."""

    def __init__(self, name: str, *, debug: bool = False) -> None:
        self.name = name
        self.debug = debug
        self.parts: dict[str, dict[str, Any]] = {}

    def run(self, part: str, work: Callable[[], T]) -> T | None:
        """Do one part; None when it failed. A part that returns figures has them recorded."""
        started = time.perf_counter()
        outcome: dict[str, Any] = {"ok": True}
        result = None
        try:
            result = work()
            figures = result[-1] if isinstance(result, tuple) else result
            outcome.update(figures if isinstance(figures, dict) else {})
        except parts.WrongError as wrong:
            outcome = {"ok": False, "error": str(wrong), **wrong.figures}
        except Exception as error:  # noqa: BLE001 - whatever a model raises is a finding, and belongs into the record
            if self.debug:
                traceback.print_exc()
            outcome = {"ok": False, "error": f"{type(error).__name__}: {first_line(error)}"}
        self.parts[part] = {"seconds": round(time.perf_counter() - started, 3), **outcome}
        gc.collect()
        return result

    def to_json(self) -> dict[str, Any]:
        """Plain data; `ok` only if every part is."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        whole: dict[str, Any] = {
            "name": self.name,
            "ok": all(part["ok"] for part in self.parts.values()),
            "peak_bytes": peak,
            "versions": {"torch": torch.__version__, "geta": geta.__version__},
            "parts": self.parts,
        }
        finite: dict[str, Any] = pytree.tree_map_only(float, lambda x: x if math.isfinite(x) else str(x), whole)
        return finite


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:600] if lines else "no message"


def check(entry: Entry, *, debug: bool = False, double: bool = False) -> dict[str, Any]:
    """All parts of one model.

    double: in float64, and only the comparisons; tells a wrong cut from the rounding of a network that amplifies it. Done
    by itself, under the key "float64", when a comparison in float32 fails.
    """
    record = Record(entry.name, debug=debug)

    def build() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], parts.Figures]:
        model, args, kwargs = entry.build()
        perturb(model, args, kwargs)
        if double:
            model.double()
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))
        return model, args, kwargs, {}

    built = record.run("build", build)
    if built is None:
        return record.to_json()
    model, args, kwargs, _ = built
    dropout = Dropout(model)
    dropout.off()

    def analyze() -> tuple[DependencyGraph, parts.Figures]:
        started = time.perf_counter()
        graph = geta.analyze(model, args, kwargs)
        seconds = round(time.perf_counter() - started, 3)
        return graph, {"analysis_seconds": seconds, **parts.describe(graph)}

    analyzed = record.run("analyze", analyze)
    if analyzed is None:
        return record.to_json()
    graph = analyzed[0]
    for multiple in MULTIPLES:
        _one_multiple(record, model, graph, multiple, more=multiple == MULTIPLES[0], double=double)
    if not double:
        record.run("quantized", lambda: parts.quantized(model, graph))
    if not double and dropout.found:
        dropout.on()
        record.run("gradients with dropout", lambda: _with_dropout(model, graph))
    result = record.to_json()
    if not double and any("differs" in part.get("error", "") for part in record.parts.values()):
        del model, graph, built, analyzed
        result["float64"] = check(entry, debug=debug, double=True)["parts"]
        excuse_rounding(result)
    return result


def excuse_rounding(record: dict[str, Any]) -> None:
    """Count a difference as rounding when float64 shows none and the zeroed model itself is as far from its float64 output.

    A deep network in training mode may amplify the rounding of float32 beyond any tolerance, in whatever order it adds. Where a compact
    model's own rounding can't be measured, because it casts to float32 inside, that of the model it was made from stands for it.
    """
    if not all(part["ok"] for part in record["float64"].values()):
        return
    largest = max(part.get("rounding", 0.0) for part in record["parts"].values())
    for name, part in record["parts"].items():
        rounding = part.get("rounding") or largest
        if not part["ok"] and name in record["float64"] and part.get("difference", math.inf) <= ROUNDINGS * rounding:
            part["ok"] = True
            part["note"] = (
                f"float32 rounds: {part['difference']:.1e} between zeroed and compact, {rounding:.1e} between the zeroed model and "
                f"itself in float64, where compact is exact"
            )
            del part["error"]
    record["ok"] = all(part["ok"] for part in record["parts"].values())


def _one_multiple(record: Record, model: nn.Module, graph: DependencyGraph, multiple: int, *, more: bool, double: bool) -> None:
    selection = graph.random_selection(0.5, seed=1, multiple_of=multiple)
    done = record.run(f"compact {multiple}", lambda: parts.compacted(model, graph, selection))
    if done is None:
        return
    small, figures = done
    record.run(f"eval {multiple}", lambda: parts.compare(model, graph, selection, small, train=False))
    if figures["train_graph"]:
        record.run(f"train {multiple}", lambda: parts.compare(model, graph, selection, small, train=True))
    if more and not double:
        if figures["train_graph"]:
            record.run("gradients", lambda: parts.gradients(model, graph, small))
        record.run("export", lambda: parts.exported(graph, small))
    if more:
        record.run("again", lambda: parts.pruned_again(graph, small))


def _with_dropout(model: nn.Module, graph: DependencyGraph) -> parts.Figures:
    """The training graph with its random operators runs and passes gradients on; values can't be compared."""
    small = geta.compact(model, graph, graph.random_selection(0.5, seed=3), verify=False)
    if "train" not in small.programs:
        return {"note": "no training graph"}
    return parts.gradients(model, graph, small)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="a name of the catalogue, e.g. timm/resnet10t")
    parser.add_argument("--json", action="store_true", help="one line instead of an indented record")
    parser.add_argument("--debug", action="store_true", help="print tracebacks to stderr")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = check(find(options.name), debug=options.debug)
    print(json.dumps(result, indent=None if options.json else 1))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
