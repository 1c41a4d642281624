"""What to write instead: the known word that looks most like an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from geta.errors import ConfigError


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean 'onnx'?`, or "" when nothing known looks like `given`; a word that differs only in case always does."""
    by_lower = {word.lower(): word for word in known}
    close = difflib.get_close_matches(given.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[close[0]]}'?" if close else ""


def choose(option: str, given: str, known: Iterable[str]) -> str:
    """Return `given`, the value of `option`, if it is one of `known`.

    Raises ConfigError that lists them and names the nearest one.
    """
    words = list(known)
    if given not in words:
        raise ConfigError(f"{option} '{given}' is unknown: write one of {', '.join(words)}{did_you_mean(given, words)}")
    return given
