"""What is written about each tensor and about the making of a model, as JSON, and the checks when it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from geta.cost import Cost
from geta.errors import CheckpointError
from geta.export.pack import MAX_BITS, MIN_BITS, code_range
from geta.subnet.model import CompactInfo

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}

SIGN_BITS = 1


@dataclass(frozen=True)
class TensorRecord:
    """How a tensor is stored.

    dtype, shape: of the tensor in the model. trainable: None for buffers, else whether the parameter has a gradient.
    bits, signed: width and kind of bit-packed integers, 1 bit for the codes -1 and +1; None for tensors stored as they are.
    """

    dtype: str
    shape: tuple[int, ...]
    trainable: bool | None
    bits: int | None = None
    signed: bool | None = None

    @classmethod
    def of(cls, tensor: Tensor, bits: int | None) -> TensorRecord:
        """Describe a tensor; `bits`: the width of integer codes, packed if it is one that can be."""
        trainable = tensor.requires_grad if isinstance(tensor, nn.Parameter) else None
        plain = cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), trainable)
        if bits == SIGN_BITS and tensor.dtype == torch.int8 and bool((tensor.abs() == 1).all()):
            return cls(plain.dtype, plain.shape, trainable, SIGN_BITS, True)
        if bits is None or not MIN_BITS <= bits <= MAX_BITS:
            return plain
        signed = tensor.dtype in (torch.int8, torch.int16) or bool((tensor < 0).any())
        return cls(plain.dtype, plain.shape, trainable, bits, signed)

    def to_json(self) -> dict[str, Any]:
        """Plain data without the entries that are None."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: list(value) if key == "shape" else value for key, value in data.items() if value is not None}

    @classmethod
    def from_json(cls, name: str, data: Any) -> TensorRecord:
        """Read `to_json` back; raise CheckpointError when it doesn't describe a tensor that can be stored."""
        known = [field.name for field in fields(cls)]
        good = (
            isinstance(data, dict)
            and all(key in known for key in data)
            and isinstance(data.get("dtype"), str)
            and data["dtype"] in DTYPES
            and isinstance(data.get("shape"), list)
            and all(type(size) is int and size >= 0 for size in data["shape"])
            and isinstance(data.get("trainable"), bool | None)
            and ("bits" in data) == ("signed" in data)
        )
        if good and "bits" in data:
            dtype = DTYPES[data["dtype"]]
            signs = data["bits"] == SIGN_BITS and data["signed"] is True and data["dtype"] == "int8"
            good = type(data["bits"]) is int and type(data["signed"]) is bool and (MIN_BITS <= data["bits"] <= MAX_BITS or signs)
            good = good and not dtype.is_floating_point and dtype != torch.bool and "trainable" not in data
            if good and not signs:
                low, high = code_range(data["bits"], data["signed"])
                good = torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max
        if not good:
            raise CheckpointError(f"the saved description of tensor '{name}' makes no sense: {str(data)[:80]}; the file is damaged")
        return cls(data["dtype"], tuple(data["shape"]), data.get("trainable"), data.get("bits"), data.get("signed"))


def info_to_json(info: CompactInfo) -> dict[str, Any]:
    """Plain data; a difference that is no number is written as a word, as JSON has none for it."""
    data = info.to_dict()
    if not math.isfinite(info.max_difference):
        data["max_difference"] = str(float(info.max_difference))
    return data


def info_from_json(data: Any) -> CompactInfo:
    """Read `info_to_json` back; raise CheckpointError when an entry is missing, unknown or of the wrong type."""
    if not isinstance(data, dict) or list(data) != list(_INFO):
        raise CheckpointError("the saved model doesn't tell how it was made: the file is damaged, or another version of geta wrote it")
    for name, check in _INFO.items():
        if not check(data[name]):
            raise CheckpointError(f"the saved model's '{name}' makes no sense: {str(data[name])[:80]}; the file is damaged")
    if data["dense_cost"] is not None:
        Cost.from_json(data["dense_cost"])
    return CompactInfo(**{**data, "max_difference": float(data["max_difference"])})


def _table(inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(isinstance(key, str) and inner(item) for key, item in value.items())


def _list(inner: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(inner(item) for item in value)


def _integer(value: Any) -> bool:
    return type(value) is int


_INFO: dict[str, Callable[[Any], bool]] = {
    "bits": _table(_integer),
    "signed": _table(lambda value: type(value) is bool),
    "kept": _table(_list(_integer)),
    "family_sizes": _table(_integer),
    "dense_cost": lambda value: value is None or isinstance(value, dict),
    "notes": _list(lambda value: isinstance(value, str)),
    "max_difference": lambda value: type(value) in (int, float) or value in ("nan", "inf", "-inf"),
    "precision": lambda value: isinstance(value, str),
}
assert list(_INFO) == [field.name for field in fields(CompactInfo)]
