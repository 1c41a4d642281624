"""Live progress: one bar on a terminal, plain lines elsewhere, and the same lines in a log file either way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Track:
    """The progress of one run of known length; give it to whoever does the steps."""

    def __init__(self, log: RunLog, title: str, bar: Progress | None, total: int) -> None:
        self._log = log
        self._title = title
        self._bar = bar
        self._task = bar.add_task(title, total=total, details="") if bar is not None else None

    def advance(self, fields: Mapping[str, str]) -> None:
        """Count one step and show what `fields` say now (terminal only)."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, details=_join(fields))

    def milestone(self, fields: Mapping[str, str]) -> None:
        """Write one line that stays: to the log file, and to the output where there is no bar."""
        self._log.note(f"{self._title}  {_join(fields)}", quiet=self._bar is not None)


class RunLog:
    """The output of one run: a console for people and a log file that keeps everything, flushed line by line."""

    def __init__(self, path: Path, console: Console | None = None) -> None:
        self.console = console or Console()
        self._path = path
        self._stream: IO[str] | None = None
        self._start = time.monotonic()

    def __enter__(self) -> RunLog:
        self._stream = self._path.open("w", encoding="utf-8")
        self._start = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._stream is not None:
            if error is not None:
                self.note(f"stopped: {kind.__name__ if kind else ''}: {error}", quiet=True)
            self._stream.close()
            self._stream = None

    def note(self, text: str, *, quiet: bool = False) -> None:
        """Write one line to the log file with the seconds since the start, and to the console unless `quiet`."""
        if self._stream is not None:
            self._stream.write(f"{time.monotonic() - self._start:8.1f}  {text}\n")
            self._stream.flush()
        if not quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or panel, and write the same as plain text to the log file."""
        self.console.print(renderable)
        if self._stream is not None:
            Console(file=self._stream, width=100, color_system=None).print(renderable)
            self._stream.flush()

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Track]:
        """Show the progress of `total` steps while the block runs."""
        if not self.console.is_terminal:
            yield Track(self, title, None, total)
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[details]}"), console=self.console) as bar:
            yield Track(self, title, bar, total)


def _join(fields: Mapping[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in fields.items())
