"""How an error becomes one block of text on standard error, and which exit code it ends with.

A block says what was found, where, and what to do. Exit codes: 1 the job failed, 2 bad arguments or settings, 130 interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from geta.errors import ConfigError, GetaError
from geta.hints import did_you_mean

FAILED, BAD_ARGUMENTS, INTERRUPTED = 1, 2, 130

# The class of all errors of usage. Older versions of typer take it from click, newer ones bring their own; both export BadParameter only.
_Usage: type = typer.BadParameter.__mro__[1]


def block(error: Exception) -> tuple[str, int]:
    """(text, exit code) for anything that a command can raise."""
    if isinstance(error, _Usage):
        return _usage_block(error), BAD_ARGUMENTS
    if isinstance(error, GetaError):
        return f"geta: {error}", BAD_ARGUMENTS if isinstance(error, ConfigError) and not _refused(error.__cause__) else FAILED
    if _refused(error):
        return _system_block(error), FAILED
    if isinstance(error, MemoryError):
        return "geta: there is not enough memory; nothing half-written was left: use a smaller batch or model, or a larger machine", FAILED
    return f"geta: unexpected {type(error).__name__}: {error}\nRun the same command with --debug for the traceback.", FAILED


def _refused(error: BaseException | None) -> bool:
    """Whether the operating system said no: a full disk, a folder that may not be written. Others raise OSError too, without its number."""
    return isinstance(error, OSError) and error.errno is not None


def _system_block(error: Exception) -> str:
    assert isinstance(error, OSError)
    where = "" if error.filename is None else f" at '{error.filename}'"
    return (
        f"geta: the system refused{where}: {error.strerror}. Files are written whole or not at all: "
        "remove the cause, or choose another place, and run the command again"
    )


def _usage_block(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    if context is None:
        return f"geta: {_message(error, ())}"
    path = context.command_path
    known = [name for parameter in context.command.params for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("--")]
    usage = " ".join(["usage:", path, *context.command.collect_usage_pieces(context)])
    return f"geta: {_message(error, [*known, '--help'])}\n{usage}\nhelp:  {path} --help"


def _message(error: Any, known: Sequence[str]) -> str:
    """Typer's own words, but for options that don't exist, where the nearest one is named as everywhere else."""
    option = getattr(error, "option_name", None)
    text = str(error.format_message())
    if option is None or not text.startswith("No such option"):
        return text[:1].lower() + text[1:] if text else "a command is missing"
    return f"there is no option '{option}'{did_you_mean(option, known)}"
