"""Quantizers with learned bit widths: the operators, the module, and how they get into a model."""

from __future__ import annotations

from geta.quant.attach import quantize, quantizers
from geta.quant.bits import Bits
from geta.quant.ops import bit_width, dequantize, fake_quantize, quantize_codes, step_size
from geta.quant.quantizer import Quantizer
from geta.quant.surrogate import STE, Fourier, Surrogate

__all__ = [
    "STE",
    "Bits",
    "Fourier",
    "Quantizer",
    "Surrogate",
    "bit_width",
    "dequantize",
    "fake_quantize",
    "quantize",
    "quantize_codes",
    "quantizers",
    "step_size",
]
