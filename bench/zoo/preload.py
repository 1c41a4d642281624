"""What nearly every check imports; loaded once by the process that the others are forked from."""

from __future__ import annotations

import contextlib
import importlib

from .shim import declare_torchvision_operators

declare_torchvision_operators()
for _name in (
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
    "torchvision.models",
    "timm",
    "transformers",
    "transformers.modeling_utils",
    "geta.subnet.compact",
    "bench.zoo.check",
):
    with contextlib.suppress(ImportError):  # a zoo without timm still checks the rest; the models that need it say so
        importlib.import_module(_name)
