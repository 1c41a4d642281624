"""The records of the zoo as a Markdown table: `python -m bench.zoo.report`."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geta.report.files import write_atomically

if TYPE_CHECKING:
    from .run import Run

_HALF = 0.5
_SLOW = 5.0
_METHOD = (
    "What each model went through: half of all groups removed at random (groups kept in multiples of 1 and of 8), outputs of the",
    "compact model compared with those of the zeroed one on fresh inputs in evaluation and training mode (tolerance 1e-4 of the",
    "largest output), gradients, re-export, and a second prune. *Seconds* is capture plus analysis; *prunable* is the share of",
    "parameters in tensors that some prunable family shrinks; *relative error* is the largest over all comparisons.",
)


def write_report(run: Run, names: Iterable[str]) -> tuple[Path, int]:
    """Write coverage_<date>.md beside the folder of records; return its path and the number of models that failed."""
    found = [(name, run.record(name)) for name in names]
    records = [record for _, record in found if record is not None]
    missing = [name for name, record in found if record is None]
    path = run.folder.parent / f"coverage_{datetime.now(UTC):%Y-%m-%d}.md"
    write_atomically(path, render(records, missing).encode())
    return path, sum(not record["ok"] for record in records)


def render(records: Sequence[dict[str, Any]], missing: Sequence[str] = ()) -> str:
    """The whole report."""
    header = "| model | captured by | seconds | nodes | groups | prunable | relative error | note |\n|---|---|---:|---:|---:|---:|---:|---|"
    rows = [f"| {' | '.join(_cells(record))} |" for record in records]
    lines = ["# Coverage of the zoo", "", *_summary(records, missing), "", header, *rows]
    failures = [record for record in records if not record["ok"]]
    if failures:
        lines += ["", "## Failures", ""]
        lines += [f"- `{record['name']}`, {part}: {_plain(found['error'])}" for record in failures for part, found in _failed(record)]
    return "\n".join(lines) + "\n"


def _summary(records: Sequence[dict[str, Any]], missing: Sequence[str]) -> list[str]:
    analyzed = [record["parts"]["analyze"] for record in records if record["parts"].get("analyze", {}).get("ok")]
    seconds = sorted(part["analysis_seconds"] for part in analyzed)
    failed = sum(not record["ok"] for record in records)
    lines = [
        f"{len(records)} models checked, {len(records) - failed} without a failure, {failed} with one."
        + (f" Not checked yet: {len(missing)} ({', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''})." if missing else ""),
    ]
    versions: dict[str, str] = next((record["versions"] for record in records if "versions" in record), {})
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines.append(f"Measured on {os.cpu_count()} cores ({platform.machine()}), one thread per model; {shown}.")
    if analyzed:
        over = sum(part["covered"] > _HALF for part in analyzed)
        quick = sum(s <= _SLOW for s in seconds)
        lines += [
            f"More than half of the parameters lie in prunable families in {over} of {len(analyzed)} models ({over / len(analyzed):.0%}).",
            f"Capture and analysis: median {statistics.median(seconds):.1f} s, 90 % within {_quantile(seconds, 0.9):.1f} s, "
            f"95 % within {_quantile(seconds, 0.95):.1f} s, longest {seconds[-1]:.1f} s; "
            f"{quick / len(seconds):.0%} take at most {_SLOW:.0f} s.",
        ]
    return [*lines, "", *_METHOD]


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def _cells(record: dict[str, Any]) -> list[str]:
    analyzed = record["parts"].get("analyze", {})
    done = analyzed.get("ok", False)
    return [
        record["name"],
        _captured(analyzed.get("captured", "")) if done else "",
        f"{analyzed['analysis_seconds']:.1f}" if done else "",
        str(record["parts"].get("compact 1", {}).get("nodes", "")),
        str(analyzed["groups"]) if done else "",
        f"{analyzed['covered']:.0%}" if done else "",
        _error(record),
        _note(record, analyzed),
    ]


def _captured(words: str) -> str:
    return words.partition(",")[0] or words


def _error(record: dict[str, Any]) -> str:
    """The largest relative difference of all comparisons that were made."""
    found = [float(part["difference"]) for part in record["parts"].values() if part.get("difference") is not None]
    return f"{max(found):.1e}" if found else ""


def _note(record: dict[str, Any], analyzed: dict[str, Any]) -> str:
    failed = list(_failed(record))
    if failed:
        verdict = ", ".join(part for part, _ in failed)
        exact = record.get("float64", {})
        rounding = bool(exact) and all(part["ok"] for part in exact.values())
        return f"**failed**: {verdict}" + ("; exact in float64, so rounding" if rounding else "")
    notes = [part["note"] for part in record["parts"].values() if "note" in part][:1]
    if analyzed.get("covered", 1.0) <= _HALF:
        notes += [f"{share:.0%}: {reason}" for reason, share in analyzed.get("reasons", [])]
    return _plain("; ".join(notes))


def _failed(record: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    return ((name, part) for name, part in record["parts"].items() if not part["ok"])


def _plain(text: str, most: int = 300) -> str:
    """One line that a table cell can hold."""
    short = " ".join(text.split()).replace("|", "\\|")
    return short if len(short) <= most else short[: most - 3] + "..."


def main() -> None:
    from .catalogue import catalogue
    from .run import RECORDS, Run

    path, failures = write_report(Run(RECORDS), catalogue())
    print(f"{path}: {failures} failed")


if __name__ == "__main__":
    main()
