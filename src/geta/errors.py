"""Every error that geta raises on purpose.

A message says what was found, where (the user's own module path or config key) and what to do about it.
"""

from __future__ import annotations


class GetaError(Exception):
    """Base of all errors that geta raises on purpose; the command line prints it without a traceback."""


class BadModelError(GetaError, ValueError):
    """The model, or its example inputs, can't be captured or doesn't behave as the operation needs."""


class UnsupportedOpError(GetaError, ValueError):
    """An operator that the requested operation can't handle; names the operator and the module that calls it."""


class ConfigError(GetaError, ValueError):
    """A setting is impossible or contradicts another one; names the setting, the rule and the remedy."""


class CheckpointError(GetaError, ValueError):
    """A file that was to be loaded is missing, damaged, altered or of an unknown version; nothing was loaded."""
