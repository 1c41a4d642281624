"""What leaves the library: saved compact models, bit-packed and without pickle."""

from __future__ import annotations

from geta.export.storage import load, save

__all__ = ["load", "save"]
