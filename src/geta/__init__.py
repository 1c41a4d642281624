"""geta: train a network once and get it back smaller.

    graph = geta.analyze(model, (x,))                      which channels, heads and neurons live and die together
    geta.quantize(model, weights=geta.Bits(4, 8))          quantizers that learn their step size
    optimizer = geta.QASSO(base_optimizer, graph, ...)     an ordinary torch optimizer that prunes and narrows bits
    ...the training loop, unchanged...
    small = geta.compact(model, graph)                     the smaller network, verified against the trained one

Importing the package imports neither torch nor any other dependency: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geta.cost import Cost, cost
    from geta.cost.latency import LatencyTable
    from geta.devices import DeviceProfile, device_profile
    from geta.errors import BadModelError, CheckpointError, ConfigError, GetaError, UnsupportedOpError
    from geta.export.storage import load
    from geta.export.torchao import to_torchao
    from geta.graph import DependencyGraph, analyze
    from geta.graph.rules import rule
    from geta.integrations.compressor import Compressor
    from geta.integrations.distill import Distillation
    from geta.integrations.hf_save import save_pretrained
    from geta.optim import HESSO, HESSOCRIC, QASSO, Budget, Saliency, Schedule
    from geta.quant import DGE, DSQ, STE, Bits, FixedBits, Fourier, end_layers, quantize
    from geta.report.latency_table import measure_layers
    from geta.report.memory import MemoryPlan, memory_plan
    from geta.seeding import seed_everything
    from geta.subnet.compact import compact
    from geta.subnet.eager import EagerProduct, compact_eager
    from geta.subnet.model import CompactModel

__version__ = "0.1.0"

_HOME = {
    "BadModelError": "geta.errors",
    "Bits": "geta.quant",
    "Budget": "geta.optim",
    "CheckpointError": "geta.errors",
    "CompactModel": "geta.subnet",
    "Compressor": "geta.integrations.compressor",
    "ConfigError": "geta.errors",
    "Cost": "geta.cost",
    "DGE": "geta.quant",
    "DSQ": "geta.quant",
    "DependencyGraph": "geta.graph",
    "DeviceProfile": "geta.devices",
    "Distillation": "geta.integrations.distill",
    "EagerProduct": "geta.subnet",
    "FixedBits": "geta.quant",
    "Fourier": "geta.quant",
    "GetaError": "geta.errors",
    "HESSO": "geta.optim",
    "HESSOCRIC": "geta.optim",
    "LatencyTable": "geta.cost.latency",
    "MemoryPlan": "geta.report.memory",
    "QASSO": "geta.optim",
    "STE": "geta.quant",
    "Saliency": "geta.optim",
    "Schedule": "geta.optim",
    "UnsupportedOpError": "geta.errors",
    "analyze": "geta.graph",
    "compact": "geta.subnet",
    "compact_eager": "geta.subnet",
    "cost": "geta.cost",
    "device_profile": "geta.devices",
    "end_layers": "geta.quant",
    "load": "geta.export.storage",
    "measure_layers": "geta.report.latency_table",
    "memory_plan": "geta.report.memory",
    "quantize": "geta.quant",
    "rule": "geta.graph.rules",
    "save_pretrained": "geta.integrations.hf_save",
    "seed_everything": "geta.seeding",
    "to_torchao": "geta.export.torchao",
}

__all__ = [
    "DGE",
    "DSQ",
    "HESSO",
    "HESSOCRIC",
    "QASSO",
    "STE",
    "BadModelError",
    "Bits",
    "Budget",
    "CheckpointError",
    "CompactModel",
    "Compressor",
    "ConfigError",
    "Cost",
    "DependencyGraph",
    "DeviceProfile",
    "Distillation",
    "EagerProduct",
    "FixedBits",
    "Fourier",
    "GetaError",
    "LatencyTable",
    "MemoryPlan",
    "Saliency",
    "Schedule",
    "UnsupportedOpError",
    "__version__",
    "analyze",
    "compact",
    "compact_eager",
    "cost",
    "device_profile",
    "end_layers",
    "load",
    "measure_layers",
    "memory_plan",
    "quantize",
    "rule",
    "save_pretrained",
    "seed_everything",
    "to_torchao",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'geta' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)


class _Package(ModuleType):
    """The package object; `geta.cost` stays the public function when the subpackage of the same name has been imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "cost" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
