"""Check many models, one process each: `python -m bench.zoo.run [--only GLOB] [--jobs 2]`.

Resumable: a model whose record exists in bench/results/zoo/ is not checked again. `--fresh` checks all, `--failed` those
whose record is not ok. Every process has a time limit; one that runs out of it, or dies, gets a record that says so.
Processes are forked from one that has imported the libraries (see server.py); `--isolated` starts each from nothing.
Models marked heavy run one at a time.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geta.report.files import prepare_folder, write_json

from .catalogue import catalogue
from .entry import Entry
from .server import Target, forked

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
RECORDS = RESULTS / "zoo"
_LAST = 600


@dataclass(frozen=True)
class Run:
    """How to run: records in `folder`, `jobs` processes of `threads` threads each, `limit` seconds per model.

    target: what each forked process does; None = the checks of the zoo.
    """

    folder: Path
    jobs: int = 2
    threads: int = 1
    limit: float = 600.0
    isolated: bool = False
    target: Target | None = None

    def path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '__')}.json"

    def record(self, name: str) -> dict[str, Any] | None:
        """What is known about a model; None if it was never checked."""
        path = self.path(name)
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def command(self, name: str) -> list[str]:
        return [sys.executable, "-m", "bench.zoo.check", name, "--json", "--threads", str(self.threads)]


def due(run: Run, entries: Iterable[Entry], *, fresh: bool = False, failed: bool = False) -> list[Entry]:
    """The entries that need a check."""
    found = []
    for entry in entries:
        record = run.record(entry.name)
        if fresh or record is None or (failed and not record["ok"]):
            found.append(entry)
    return found


def check_one(run: Run, name: str) -> dict[str, Any]:
    """Check one model in a process of its own; the record of a crash or a timeout looks like any other."""
    started = time.perf_counter()
    record = _isolated(run, name) if run.isolated else _forked(run, name)
    record["seconds"] = round(time.perf_counter() - started, 1)
    return record


def _forked(run: Run, name: str) -> dict[str, Any]:
    ended, answer = forked(name, threads=run.threads, limit=run.limit, target=run.target)
    if answer is not None:
        return answer
    return _lost(name, f"no result within {run.limit:.0f} seconds" if ended is None else f"the process ended with code {ended}")


def _isolated(run: Run, name: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(run.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            run.command(name), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=run.limit, check=False
        )
    except subprocess.TimeoutExpired:
        return _lost(name, f"no result within {run.limit:.0f} seconds")
    lines = done.stdout.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        return _lost(name, f"the process ended with code {done.returncode}: {_tail(done.stderr)}")
    return found


def _lost(name: str, error: str) -> dict[str, Any]:
    return {"name": name, "ok": False, "parts": {"process": {"ok": False, "seconds": 0.0, "error": error}}}


def _tail(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][-_LAST:] if lines else "no message"


def run_all(run: Run, entries: Iterable[Entry], *, say: Callable[[str], None] = print) -> None:
    """Check the entries, `run.jobs` at a time and heavy ones one at a time; each record is written as soon as it is known."""
    prepare_folder(run.folder)
    todo = sorted(entries, key=lambda entry: entry.heavy)  # light ones first: a table that is mostly there is worth more
    heavy = threading.Lock()
    count = 0

    def work(entry: Entry) -> None:
        nonlocal count
        if entry.heavy:
            with heavy:
                record = check_one(run, entry.name)
        else:
            record = check_one(run, entry.name)
        write_json(run.path(entry.name), record)
        count += 1
        say(f"{count}/{len(todo)}  {entry.name}  {record['seconds']:.0f} s  {summary(record)}")

    with ThreadPoolExecutor(run.jobs) as pool:
        for _ in pool.map(work, todo):
            pass


def summary(record: dict[str, Any]) -> str:
    """One line: ok, or what failed."""
    failed = [f"{part}: {found['error']}" for part, found in record["parts"].items() if not found["ok"]]
    return "ok" if not failed else f"FAILED {failed[0]}" + (f" (and {len(failed) - 1} more)" if len(failed) > 1 else "")


def main() -> int:
    from .report import write_report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="names to check, e.g. 'timm/*'")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per model")
    parser.add_argument("--fresh", action="store_true", help="check again what has a record")
    parser.add_argument("--failed", action="store_true", help="check again what has a record of a failure")
    parser.add_argument("--isolated", action="store_true", help="a new interpreter for each model: slower, nothing shared")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report; records go into its zoo/")
    options = parser.parse_args()
    run = Run(options.out / "zoo", options.jobs, options.threads, options.limit, options.isolated)
    chosen = [entry for name, entry in catalogue().items() if fnmatch.fnmatchcase(name, options.only)]
    if not chosen:
        parser.error(f"no model of the zoo is called '{options.only}'; python -m bench.zoo.catalogue lists them")
    todo = due(run, chosen, fresh=options.fresh, failed=options.failed)
    print(f"{len(todo)} of {len(chosen)} models to check")
    run_all(run, todo)
    path, failures = write_report(run, list(catalogue()))
    print(f"{path}: {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
