"""geta and torch-pruning side by side on the classifiers of torchvision: `python -m bench.versus_torch_pruning [--only GLOB]`.

One forked process per model runs both tools (see peers.py). Resumable like the zoo: a model whose record exists in
bench/results/tp/ is not measured again unless `--fresh` says so. Writes bench/results/versus_torch_pruning_<date>.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from geta.report.files import write_atomically

from .facts import RESULTS, dated, machine, results_folder, table, versions
from .peers import CLASSES, LIMIT, RATIO, in_child
from .zoo import from_torchvision
from .zoo.entry import Entry
from .zoo.run import Run, due, run_all

TOOLS = ("torch-pruning", "geta")
STEPS = ("analyze", "prune", "run", "compare")
TOLERANCE, TOLERANCE_64 = 1e-4, 1e-9
_BOTH = 2
_HEADER = (
    "model",
    *(f"{tool}: {what}" for tool in TOOLS for what in ("ok", "analysis, s", "pruning, s", "parameters left", "difference")),
    "notes",
)
_METHOD = f"""
Both tools get the same weights (random, then perturbed so that no layer is invisible) and the same inputs, batch 2 at the size the
architecture is trained on, in one process per model, one thread, after a warm-up on a tiny network. Each is asked to remove
{RATIO:.0%} of the channels at random.

- **torch-pruning**: `BasePruner`, `RandomImportance`, `pruning_ratio={RATIO}`, everything with {CLASSES} outputs ignored as its README
  tells; as its own script for torchvision does, the output projections of `nn.MultiheadAttention` ignored, the width of a ViT
  rounded to its heads and its `hidden_dim` updated, and a batch of 1 to trace with. *Analysis* is the constructor (trace and
  dependency graph), *pruning* is choosing and cutting all groups.
- **geta**: `analyze` (capture and coupling), then `random_selection({RATIO})` of every prunable family and `compact(verify=False)`,
  which also captures and cuts the training graph. Defaults otherwise, so attention goes by whole heads and residual widths under a
  LayerNorm stay.
- *ok*: no exception in analysis, in pruning, or in the forward of the pruned model; a step that fails is named. A tool gets
  {LIMIT:.0f} s per step.
- *Difference*: the pruned model against the dense model with that tool's own removed channels zeroed, max |a - b| / max |a| of the
  outputs on fresh inputs in evaluation mode. Zeroed for torch-pruning are, for every (layer, pruning function, indices) in its groups
  that removes output channels, the rows of weight and bias of convolutions, linear and attention layers, weight and bias of
  normalizations, and parameters that it prunes directly; indices are counted as the pruner counts them, in what earlier groups left.
  Above {TOLERANCE:g} both models are compared again in float64, and that number is shown; *equal* means at most {TOLERANCE:g}, or
  {TOLERANCE_64:g} in float64. A difference in **bold** is not equal.
- A pruned LayerNorm averages over fewer channels than the zeroed one, so the width of a residual stream can't be cut exactly by
  anybody; torch-pruning cuts it, and its difference there says how far the result is from masking, not that a layer was wired wrongly.
- The tools don't remove the same channels: *parameters left* tells how much each took away.
""".strip()


def classifiers() -> list[Entry]:
    """The classification models among torchvision's entries of the zoo."""
    names = {f"torchvision/{name}" for name in from_torchvision._CLASSIFIERS}
    return [entry for entry in from_torchvision.entries() if entry.name in names]


def failed_step(record: Mapping[str, Any], tool: str) -> str | None:
    """The first step of a tool that raised; "process" if the model never got that far; None if all went well."""
    parts = record["parts"]
    for step in STEPS:
        if not parts.get(f"{tool} {step}", {"ok": True})["ok"]:
            return step
    if f"{tool} prune" in parts:
        return None
    return next((name for name, part in parts.items() if not part["ok"]), "process")


def succeeded(record: Mapping[str, Any], tool: str) -> bool:
    """Analysis, pruning and the pruned forward worked; the comparison is judged by `difference`."""
    return failed_step(record, tool) in (None, "compare")


def difference(record: Mapping[str, Any], tool: str) -> tuple[float, bool] | None:
    """(relative difference, whether it counts as equal); None where nothing was compared."""
    part = record["parts"].get(f"{tool} compare", {})
    if "difference64" in part:
        return float(part["difference64"]), float(part["difference64"]) <= TOLERANCE_64
    return (float(part["difference"]), float(part["difference"]) <= TOLERANCE) if "difference" in part else None


def render(records: Sequence[Mapping[str, Any]], missing: Sequence[str], facts: Sequence[str]) -> str:
    """The whole report."""
    lines = ["# geta and torch-pruning on torchvision's classifiers", "", *facts, ""]
    if missing:
        lines += [f"Not measured yet: {len(missing)} ({', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}).", ""]
    lines += [*_summary(records), "", _METHOD, "", *table(_HEADER, [_cells(record) for record in records], left=(0, 1, 6, 11))]
    return "\n".join(lines) + "\n"


def _summary(records: Sequence[Mapping[str, Any]]) -> list[str]:
    header = (
        *("", "no exception", "pruned = zeroed", "differs", "not compared"),
        *("median analysis, s", "longest", "median pruning, s", "longest"),
    )
    rows = []
    for tool in TOOLS:
        good = [record for record in records if succeeded(record, tool)]
        found = [gap for record in good if (gap := difference(record, tool)) is not None]
        equal = sum(same for _, same in found)
        cells = [tool, f"{len(good)} of {len(records)}", str(equal), str(len(found) - equal), str(len(good) - len(found))]
        analysis = [float(record["parts"][f"{tool} analyze"]["seconds"]) for record in good]
        pruning = [_pruning(record, tool) for record in good]
        rows.append(
            [*cells, *(f"{summarize(seconds):.2f}" if good else "" for seconds in (analysis, pruning) for summarize in (_median, max))]
        )
    return table(header, rows)


def _median(seconds: Sequence[float]) -> float:
    return float(statistics.median(seconds))


def _pruning(record: Mapping[str, Any], tool: str) -> float:
    part = record["parts"][f"{tool} prune"]
    return float(part.get("pruning_seconds", part["seconds"]))


def _cells(record: Mapping[str, Any]) -> list[str]:
    return [record["name"].removeprefix("torchvision/"), *(cell for tool in TOOLS for cell in _tool_cells(record, tool)), _notes(record)]


def _tool_cells(record: Mapping[str, Any], tool: str) -> list[str]:
    parts, failed = record["parts"], failed_step(record, tool)
    analyzed, pruned = parts.get(f"{tool} analyze", {}), parts.get(f"{tool} prune", {})
    gap = difference(record, tool)
    return [
        "ok" if succeeded(record, tool) else f"**{failed} failed**",
        f"{analyzed['seconds']:.2f}" if analyzed.get("ok") else "",
        f"{_pruning(record, tool):.2f}" if pruned.get("ok") else "",
        f"{pruned['parameters'] / parts['build']['parameters']:.0%}" if pruned.get("ok") else "",
        "" if gap is None else f"{gap[0]:.1e}" if gap[1] else f"**{gap[0]:.1e}**",
    ]


def _notes(record: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {part['error']}" for name, part in record["parts"].items() if not part["ok"])


def write_report(run: Run, names: Iterable[str]) -> Path:
    """Write versus_torch_pruning_<date>.md beside the folder of records."""
    found = {name: run.record(name) for name in names}
    facts = [f"Measured on {machine()}, one thread per model; {versions('torch', 'torchvision', 'torch-pruning', 'geta')}."]
    path = dated("versus_torch_pruning", folder=run.folder.parent)
    missing = [name for name, record in found.items() if record is None]
    write_atomically(path, render([record for record in found.values() if record is not None], missing, facts).encode())
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="names to compare, e.g. 'torchvision/resnet*'")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; more than the cores allow spoils the timings")
    parser.add_argument("--fresh", action="store_true", help="measure again what has a record")
    parser.add_argument("--out", type=results_folder, default=RESULTS, help="folder of the report; records go into its tp/")
    options = parser.parse_args()
    run = Run(options.out / "tp", options.jobs, limit=_BOTH * len(STEPS) * LIMIT, target=in_child)
    entries = classifiers()
    chosen = [entry for entry in entries if fnmatch.fnmatchcase(entry.name, options.only)]
    if not chosen:
        parser.error(f"no classifier is called '{options.only}'; python -m bench.zoo.catalogue 'torchvision/*' lists them")
    todo = due(run, chosen, fresh=options.fresh)
    print(f"{len(todo)} of {len(chosen)} models to compare")
    run_all(run, todo)
    print(write_report(run, [entry.name for entry in entries]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
