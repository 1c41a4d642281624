"""Where in the user's own code something happens: for messages, which should name the user's line and not ours."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.fx.config
from torch import fx

# Whole folders, not parts of paths: a user's own project may well lie in a folder called "torch" or "geta".
_OURS = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parents[1]) + os.sep)
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep


def is_user_file(name: str) -> bool:
    """Neither torch's nor geta's nor Python's own, nor code made at run time."""
    if name.startswith(("<", *_OURS)):
        return False
    return not name.startswith(_STANDARD) or "site-packages" in name


class LineWantedError(Exception):
    """A message has to name the line of an operator, but the lines of operators weren't recorded."""


@contextlib.contextmanager
def lines_recorded(wanted: bool) -> Iterator[None]:
    """Whether captures keep the line of every operator, which few messages need and which takes a tenth of their time."""
    before = torch.fx.config.do_not_emit_stack_traces
    torch.fx.config.do_not_emit_stack_traces = not wanted
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


def line_of(node: fx.Node) -> str:
    """Where an operator of a captured graph is called, as " (at file:line in function)"; "" if the capture can't know.

    Raises LineWantedError while `lines_recorded` is off.
    """
    if torch.fx.config.do_not_emit_stack_traces and "stack_trace" not in node.meta:
        raise LineWantedError
    found = ""
    for text in (node.meta.get("stack_trace") or "").splitlines():
        parts = text.strip().split('"')
        if len(parts) == 3 and parts[0] == "File " and is_user_file(parts[1]):
            found = f" (at {parts[1]}:{parts[2].removeprefix(', line ').replace(', in ', ' in ')})"
    return found


def line_of_error(error: BaseException) -> str:
    """Where an exception passed through the user's code last, in the same form."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if is_user_file(code.co_filename):
            found = f" (at {code.co_filename}:{trace.tb_lineno} in {code.co_name})"
        trace = trace.tb_next
    return found


def line_now() -> str:
    """The innermost line of the user's code that is being run: "file:line"."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if is_user_file(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


def first_line(error: BaseException) -> str:
    """What an exception says, without the pages that may follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")
