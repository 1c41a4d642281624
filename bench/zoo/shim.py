"""Let torchvision import beside a CPU build of torch.

The wheel's C++ operators are linked against CUDA and don't load there, and `import torchvision` fails because it registers
fake kernels for operators that don't exist. No model of the zoo calls one of them, so declaring their names is enough.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    **{
        f"{prefix}{name}{suffix}": "(Tensor input) -> Tensor"
        for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
        for prefix, suffix in (("", ""), ("_", "_backward"))
    },
}


@functools.cache
def declare_torchvision_operators() -> torch.library.Library | None:
    """Declare the operators if torchvision is there but can't load its own; call it before anything that imports torchvision."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    try:
        for library in sorted(Path(found.origin).parent.glob("_C*.so")):
            torch.ops.load_library(library)
    except OSError:  # linked against CUDA libraries that this torch doesn't bring
        declared = torch.library.Library("torchvision", "DEF")
        for name, schema in _SCHEMAS.items():
            declared.define(name + schema)
        return declared
    return None
