"""Subnet construction: cut the removed groups out and hand back an equivalent smaller module."""

from geta.subnet.compact import compact
from geta.subnet.model import CompactInfo, CompactModel
from geta.subnet.program import Program

__all__ = ["CompactInfo", "CompactModel", "Program", "compact"]
