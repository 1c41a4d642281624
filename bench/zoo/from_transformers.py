"""Models of `transformers` built from small configurations: a few layers, narrow, a small vocabulary."""

from __future__ import annotations

from .entry import Entry
from .hf import named
from .hf_decoders import DECODERS
from .hf_encoders import ENCODERS
from .hf_multimodal import MULTIMODAL
from .hf_vision import VISION


def entries() -> list[Entry]:
    return named({**DECODERS, **ENCODERS, **VISION, **MULTIMODAL})
