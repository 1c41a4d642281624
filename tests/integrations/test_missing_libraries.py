"""Integrations without the library that they are for: one message that says what to install."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

import geta.integrations
from geta.errors import ConfigError


@pytest.mark.parametrize(
    ("module", "library", "extra"), [("trainer", "transformers", "trainer"), ("lightning", "lightning.pytorch", "lightning")]
)
def test_the_missing_library_is_named(module, library, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    path = Path(geta.integrations.__file__).parent / f"{module}.py"
    with pytest.raises(ConfigError, match=rf"geta\.integrations\.{module} needs .*pip install 'geta\[{extra}\]'"):
        runpy.run_path(str(path))
