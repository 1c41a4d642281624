"""Subnet construction: cut the removed groups out and hand back an equivalent smaller module."""

from geta.subnet.compact import compact
from geta.subnet.eager import EagerProduct, compact_eager
from geta.subnet.model import CompactInfo, CompactModel
from geta.subnet.program import Program

__all__ = ["CompactInfo", "CompactModel", "EagerProduct", "Program", "compact", "compact_eager"]
