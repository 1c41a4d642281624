"""Quantizers with learned and with fixed bit widths: the operators, the modules, and how they get into a model."""

from __future__ import annotations

from geta.quant.annealing import Annealing, anneal
from geta.quant.attach import quantize, quantizers
from geta.quant.bits import Bits, BitsLike
from geta.quant.ends import end_layers
from geta.quant.fixed import FixedBits, FixedQuantizer, fixed_quantizers
from geta.quant.fixed_ops import lsq_codes, lsq_quantize
from geta.quant.native import native_status
from geta.quant.native_build import NativeStatus
from geta.quant.ops import bit_width, dequantize, fake_quantize, quantize_codes, step_size
from geta.quant.quantizer import Quantizer
from geta.quant.surrogate import DGE, DSQ, STE, Fourier, Surrogate

__all__ = [
    "DGE",
    "DSQ",
    "STE",
    "Annealing",
    "Bits",
    "BitsLike",
    "FixedBits",
    "FixedQuantizer",
    "Fourier",
    "NativeStatus",
    "Quantizer",
    "Surrogate",
    "anneal",
    "bit_width",
    "dequantize",
    "end_layers",
    "fake_quantize",
    "fixed_quantizers",
    "lsq_codes",
    "lsq_quantize",
    "native_status",
    "quantize",
    "quantize_codes",
    "quantizers",
    "step_size",
]
