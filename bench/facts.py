"""What the reports of the benches share: versions, the machine, tables, quantiles, records of runs."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from geta.report.files import prepare_folder, write_atomically, write_json

RESULTS = Path(__file__).resolve().parent / "results"


def results_folder(text: str) -> Path:
    """What `--out` names, there and writable before anything is measured."""
    folder = Path(text)
    prepare_folder(folder)
    return folder


def dated(stem: str, suffix: str = ".md", folder: Path = RESULTS) -> Path:
    """folder/stem_<today, UTC><suffix>."""
    return folder / f"{stem}_{datetime.now(UTC):%Y-%m-%d}{suffix}"


def written(stem: str, lines: Sequence[str], folder: Path = RESULTS) -> Path:
    """Print a report, write it to its dated file, and say where that is."""
    path = dated(stem, folder=folder)
    write_atomically(path, "\n".join([*lines, ""]).encode())
    print("\n".join(lines))
    print(path)
    return path


def recorded(path: Path, run: Callable[[], dict[str, Any]], *, fresh: bool = False) -> dict[str, Any]:
    """The record of a run, from its file if it is there; otherwise the run is made now and its record written."""
    if path.exists() and not fresh:
        known: dict[str, Any] = json.loads(path.read_text())
        return known
    found = run()
    write_json(path, found)
    return found


def spread(values: Sequence[float]) -> str:
    """Mean +- sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def versions(*packages: str) -> str:
    """Python and the packages with their installed versions, as one phrase."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Number of cores and name of the processor; the architecture where the system doesn't tell the name."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    names = re.findall(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return f"{os.cpu_count()} cores of {names[0].strip() if names else platform.machine()}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Lines of a Markdown table; columns are right-aligned but those numbered in `left`.

    Raises ValueError for a row of another length than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells and the header {len(header)}: {list(row)}")
    marks = ["---" if column in left else "---:" for column in range(len(header))]
    lines = [[one_line(cell) for cell in row] for row in (header, *rows)]
    return [f"| {' | '.join(line)} |" for line in (lines[0], marks, *lines[1:])]


def one_line(text: str, most: int = 240) -> str:
    """What a table cell can hold."""
    short = " ".join(text.split()).replace("|", "\\|")
    return short if len(short) <= most else short[: most - 3] + "..."


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body after `seconds`; main thread only, and only between two Python instructions."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"no result within {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
