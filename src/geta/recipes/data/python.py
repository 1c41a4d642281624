"""Data that a function of the user's makes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from geta.errors import ConfigError, GetaError
from geta.recipes.batches import Data
from geta.recipes.settings import Settings


class PythonData(Settings):
    """`factory: package.module:function`, called with `options`, returns `geta.recipes.batches.Data`."""

    source: Literal["python"]
    factory: str = Field(pattern=r"^[\w.]+:\w+$")
    options: dict[str, Any] = Field(default_factory=dict)

    def load(self) -> Data:
        """Call the function. Raises ConfigError when it isn't there, GetaError when it fails or returns something else."""
        module_name, _, name = self.factory.partition(":")
        here = str(Path.cwd())
        added = here not in sys.path
        if added:
            sys.path.insert(0, here)  # as `python -m` does: the function usually lies in the folder the command is run from
        try:
            function = getattr(importlib.import_module(module_name), name, None)
        except ImportError as error:
            raise ConfigError(f"data.factory: the module '{module_name}' can't be imported: {error}") from error
        finally:
            if added:
                sys.path.remove(here)
        if not callable(function):
            raise ConfigError(f"data.factory: the module '{module_name}' has no function '{name}'")
        try:
            made = function(**self.options)
        except Exception as error:
            raise GetaError(f"data.factory: calling {self.factory} failed with {type(error).__name__}: {error}") from error
        if not isinstance(made, Data):
            raise GetaError(f"data.factory: {self.factory} returned {type(made).__name__}; it must return geta.recipes.batches.Data")
        return made
