"""Our part of an optimizer's state as one string, for savers that keep nothing but `state` and `param_groups`.

`torch.distributed.checkpoint.state_dict` takes a state dict apart by these two keys and drops the rest, but carries what it finds in a
parameter group. Format: JSON; a tensor is {"tensor": [dtype, shape, base64 of its bytes in little-endian order]}, any other dictionary
{"items": [[key, value], ...]}, because JSON's own keys are strings only.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import torch
from torch import Tensor

from geta.errors import CheckpointError


def pack(section: Any) -> str:
    """Plain data and tensors as a string; tuples become lists."""
    return json.dumps(_encoded(section), separators=(",", ":"))


def unpack(text: str) -> Any:
    """What `pack` was given; tensors on the CPU. Raises CheckpointError when it isn't from there."""
    try:
        return _decoded(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the optimizer state's packed 'geta' part can't be read ({error}): it is damaged") from error


def _encoded(value: Any) -> Any:
    if isinstance(value, Tensor):
        raw = value.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), base64.b64encode(raw).decode()]}
    if isinstance(value, dict):
        return {"items": [[key, _encoded(inner)] for key, inner in value.items()]}
    return [_encoded(inner) for inner in value] if isinstance(value, list | tuple) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if "items" in value:
        return {key: _decoded(inner) for key, inner in value["items"]}
    name, shape, raw = value["tensor"]
    data = bytearray(base64.b64decode(raw))
    dtype = getattr(torch, name)
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.zeros(shape, dtype=dtype)
