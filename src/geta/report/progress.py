"""Live progress: a bar with the run's numbers below it on a terminal, plain lines elsewhere, and the same lines in a log file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Track:
    """The progress of one run of known length; give it to whoever does the steps."""

    def __init__(self, log: RunLog, title: str, bar: Progress | None, total: int, done: int = 0) -> None:
        self._log = log
        self._title = title
        self._bar = bar
        self._task = bar.add_task(title, total=total, completed=done) if bar is not None else None
        self._fields: dict[str, str] = {}

    def advance(self, fields: Mapping[str, str]) -> None:
        """Count one step and show what `fields` say now (terminal only); what they don't name stays as it was."""
        if self._bar is not None and self._task is not None:
            self._fields.update(fields)
            self._bar.update(self._task, advance=1)

    def milestone(self, fields: Mapping[str, str]) -> None:
        """Write one line that stays: to the log file, and to the output where there is no bar."""
        self._fields.update(fields)
        self._log.note(f"{self._title}  {_join(fields)}", quiet=self._bar is not None)

    def __rich__(self) -> RenderableType:
        """The bar, and below it the latest numbers side by side, each under its name."""
        assert self._bar is not None
        numbers = Table.grid(padding=(0, 3))
        if self._fields:
            for _ in self._fields:
                numbers.add_column(justify="left")
            numbers.add_row(*(f"[dim]{name}[/dim]" for name in self._fields))
            numbers.add_row(*(escape(value) for value in self._fields.values()))
        return Group(self._bar.get_renderable(), Padding(numbers, (0, 0, 0, 2)))


class RunLog:
    """The output of one run: a console for people and a log file that keeps everything, flushed line by line."""

    def __init__(self, path: Path | None, console: Console | None = None, *, append: bool = False) -> None:
        """path: of the log file; None = there is none. append: go on in a file that is there."""
        self.console = console or Console()
        self._path = path
        self._mode = "a" if append else "w"
        self._stream: IO[str] | None = None
        self._start = time.monotonic()

    def __enter__(self) -> RunLog:
        self._stream = None if self._path is None else self._path.open(self._mode, encoding="utf-8")
        self._start = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._stream is not None:
            try:
                if error is not None:
                    self.note(f"stopped: {kind.__name__ if kind else ''}: {error}", quiet=True)
                self._stream.close()
            except OSError:
                if error is None:
                    raise  # otherwise the run has ended for a better reason, perhaps the same full disk
            finally:
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
    def track(self, title: str, total: int, done: int = 0) -> Iterator[Track]:
        """Show the progress of `total` steps, `done` of them before, while the block runs."""
        if not self.console.is_terminal:
            yield Track(self, title, None, total, done)
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=40), MofNCompleteColumn(), TextColumn("steps, left"))
        track = Track(self, title, Progress(*columns, TimeRemainingColumn(compact=True), console=self.console), total, done)
        with Live(track, console=self.console, refresh_per_second=4):
            yield track


def _join(fields: Mapping[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in fields.items())
