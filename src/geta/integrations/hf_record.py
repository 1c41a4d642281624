"""What a configuration of `transformers` can't say about a cut model, as checked data: sizes of tensors, and numbers in modules.

The record stands in `config.json` under "geta":

    {"format": 1, "model_type": "llama", "class": "LlamaForCausalLM",
     "shapes": {"model.layers.0.mlp.up_proj.weight": [24, null]},
     "attributes": {"model.layers.0.self_attn": {"num_heads": 2}}}

A size that is null is the one that the base class gives the tensor. Nothing in a record is code: names are looked up, numbers are set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from geta.errors import CheckpointError
from geta.subnet.attributes import Change, apply

KEY, FORMAT = "geta", 1
_LARGEST = 2**31 - 1
_Number = int | list[int]


@dataclass(frozen=True)
class Record:
    """Where a cut model differs from what its class builds.

    model_type: of the base configuration. base: name of the class in `transformers`.
    shapes:     {tensor: its sizes, None = as built}. attributes: {module: {attribute, with dots where it is in an object: number(s)}}.
    """

    model_type: str
    base: str
    shapes: Mapping[str, Sequence[int | None]]
    attributes: Mapping[str, Mapping[str, _Number]]

    def to_json(self) -> dict[str, Any]:
        """As it stands in `config.json`."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        attributes = {path: dict(own) for path, own in self.attributes.items()}
        return {"format": FORMAT, "model_type": self.model_type, "class": self.base, "shapes": shapes, "attributes": attributes}

    @classmethod
    def from_json(cls, stored: object) -> Record:
        """Read what `to_json` returned. Raises CheckpointError that says which entry is malformed."""
        if not isinstance(stored, dict):
            raise CheckpointError(f"config.json has model_type 'geta', but its entry '{KEY}' is {stored!r}: the folder is damaged")
        if stored.get("format") != FORMAT:
            raise CheckpointError(f"config.json: {KEY}.format is {stored.get('format')!r}, this geta reads {FORMAT}: update geta")
        unknown = sorted(set(stored) - {"format", "model_type", "class", "shapes", "attributes"})
        if unknown:
            raise CheckpointError(f"config.json: {KEY} has unknown entries: {', '.join(map(repr, unknown))}")
        for key in ("model_type", "class"):
            if not isinstance(stored.get(key), str):
                raise CheckpointError(f"config.json: {KEY}.{key} is {stored.get(key)!r}: it must be a name")
        shapes, attributes = (_table(stored, key) for key in ("shapes", "attributes"))
        for name, shape in shapes.items():
            if not isinstance(shape, list) or not shape or not all(size is None or _is_number(size) for size in shape):
                raise CheckpointError(f"config.json: {KEY}.shapes['{name}'] is {shape!r}: it must be a list of sizes, null = as built")
        for path, own in attributes.items():
            for name, value in _table(attributes, path, f"{KEY}.attributes").items():
                numbers = value if isinstance(value, list) else [value]
                if not all(map(_is_number, numbers)) or not all(part.isidentifier() and part[0] != "_" for part in name.split(".")):
                    raise CheckpointError(f"config.json: {KEY}.attributes['{path}']['{name}'] is {own[name]!r}: only sizes can be set")
        return cls(stored["model_type"], stored["class"], shapes, attributes)

    def apply(self, model: nn.Module, *, prefix: str = "", strict: bool = True) -> None:
        """Give a freshly built model these sizes and numbers; what it holds of a tensor is cut to its first rows and columns.

        strict: every entry must fit the model. Otherwise the model is another class over the same base (a classifier, say): names count
        with and without `prefix`, and what it hasn't got is left out.
        Raises CheckpointError for what doesn't fit.
        """
        names = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))}
        for name, shape in self.shapes.items():
            found = _resolved(name, names, "" if strict else prefix)
            if found is None and strict:
                raise CheckpointError(f"config.json: {KEY}.shapes names a tensor '{name}' that {self.base} does not have")
            if found is not None:
                _resize(model, found, shape)
        modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
        for path, own in self.attributes.items():
            place = _resolved(path, modules, "" if strict else prefix)
            if place is None and strict:
                raise CheckpointError(f"config.json: {KEY}.attributes names a module '{path}' that {self.base} does not have")
            for name, value in own.items() if place is not None else ():
                assert place is not None
                apply(model, _change(model, place, name, value))


def attributes_of(places: Iterable[tuple[str, tuple[str, ...]]], model: nn.Module, built: nn.Module) -> dict[str, dict[str, _Number]]:
    """The numbers of `model` at these places (module, attribute) that a freshly `built` one has not got by itself, for a record.

    Raises CheckpointError for a place that a record can't say (an attribute that isn't there, or no number).
    """
    found: dict[str, dict[str, _Number]] = {}
    for module, path in places:
        name = ".".join(path)
        value = _present(model, module, path)
        now = _change(built, module, name, list(value) if isinstance(value, tuple) else value)
        if now.before != now.after:
            found.setdefault(module, {})[name] = list(value) if isinstance(value, tuple) else value
    return found


def _table(stored: Mapping[str, Any], key: str, where: str = KEY) -> dict[str, Any]:
    table = stored.get(key)
    if not isinstance(table, dict):
        raise CheckpointError(f"config.json: {where}.{key} is {table!r}: it must be an object")
    return table


def _is_number(value: object) -> bool:
    return type(value) is int and 0 < value <= _LARGEST


def _resolved(name: str, known: set[str], prefix: str) -> str | None:
    """The name as the model has it: as it is, without or with the prefix of its base model."""
    outer = f"{prefix}." if prefix else ""
    tries = [name, name.removeprefix(outer), outer + name] if prefix else [name]
    return next((one for one in tries if one in known), None)


def _resize(model: nn.Module, name: str, shape: Sequence[int | None]) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    old = owner._parameters.get(leaf)
    tensor: Any = owner._buffers.get(leaf) if old is None else old
    sizes = [size if want is None else want for want, size in zip(shape, tensor.shape, strict=False)]
    if len(shape) != tensor.dim() or any(size > had for size, had in zip(sizes, tensor.shape, strict=True)):
        raise CheckpointError(
            f"config.json: {KEY}.shapes['{name}'] is {list(shape)}, which is no part of the {list(tensor.shape)} that the class builds"
        )
    cut = tensor.detach()
    for dim, size in enumerate(sizes):
        cut = cut.narrow(dim, 0, size)
    cut = cut.clone(memory_format=torch.contiguous_format)
    if old is None:
        owner._buffers[leaf] = cut
        return
    new = nn.Parameter(cut, requires_grad=old.requires_grad)
    for module in model.modules():  # tied tensors stay tied
        for key, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[key] = new


def _change(model: nn.Module, path: str, name: str, value: _Number) -> Change:
    """One attribute to set; its present value must be a size, or as many sizes."""
    parts = tuple(name.split("."))
    now = _present(model, path, parts)
    if type(now) is int and type(value) is int:
        return Change(path, parts, now, value)
    if isinstance(now, tuple | list) and isinstance(value, list) and len(now) == len(value) and all(type(item) is int for item in now):
        return Change(path, parts, now, tuple(value) if isinstance(now, tuple) else value)
    raise CheckpointError(
        f"config.json: {KEY}.attributes['{path}'] sets '{name}' to {value!r}, but it is {now!r}: only sizes can be set, by sizes"
    )


def _present(model: nn.Module, path: str, parts: tuple[str, ...]) -> Any:
    """The value of an attribute; CheckpointError when module or attribute isn't there."""
    where = f"config.json: {KEY}.attributes['{path}']"
    try:
        now: Any = model.get_submodule(path)
    except AttributeError as error:
        raise CheckpointError(f"{where} names a module that the model does not have") from error
    for part in parts:
        own = getattr(now, "__dict__", {})
        if isinstance(now, torch.Tensor | type) or part not in own:
            raise CheckpointError(f"{where} sets '{'.'.join(parts)}', which {type(now).__name__} does not have")
        now = own[part]
    return now
