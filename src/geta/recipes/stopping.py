"""Ctrl-C and SIGTERM: the step at hand is finished and a checkpoint written; outside of steps the run ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from geta import ranks


class Interrupted(BaseException):
    """A run was stopped from outside.

    signal: SIGINT or SIGTERM. exit_code: 130 or 143, 128 + the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.signal = number
        self.exit_code = 128 + number


class Stop:
    """Whether someone asked the run to end. Inside `held` the request waits for whoever asks `agreed`; a second one doesn't wait."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._held = False

    def request(self, number: int) -> None:
        """What a signal does. Raises Interrupted outside of `held`, and at the second request."""
        again = self.requested is not None
        self.requested = number
        if again or not self._held:
            raise Interrupted(number)

    def agreed(self, device: torch.device) -> bool:
        """Whether one of the processes was asked to stop; all of them have to ask this, in the same step."""
        if ranks.count() > 1:
            self.requested = int(ranks.largest(torch.tensor(self.requested or 0, device=device))) or None
        return self.requested is not None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a request wait while the block runs."""
        self._held = True
        try:
            yield
        finally:
            self._held = False


@contextmanager
def stoppable() -> Iterator[Stop]:
    """A `Stop` that SIGINT and SIGTERM ask while the block runs; only the main thread of a process gets signals."""
    stop = Stop()

    def handle(number: int, _: FrameType | None) -> None:
        stop.request(number)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
