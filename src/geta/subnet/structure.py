"""The nesting of a model's inputs and outputs, as plain JSON, without importing the user's classes when it is read back."""

from __future__ import annotations

import json
from collections import OrderedDict
from typing import Any

import torch.utils._pytree as pytree

from geta.errors import CheckpointError

_PLAIN = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict}


class Outputs(OrderedDict[str, Any]):
    """Stands for a result class (a Hugging Face ModelOutput, a dataclass) of a model that was read from disk.

    Fields are reachable as attributes and as items.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model's result has no field '{name}'; it has {list(self)}") from None


pytree.register_pytree_node(
    Outputs,
    lambda outputs: (list(outputs.values()), list(outputs)),
    lambda values, names: Outputs(zip(names, values, strict=True)),
    serialized_type_name="geta.Outputs",
    flatten_with_keys_fn=lambda outputs: ([(pytree.MappingKey(name), value) for name, value in outputs.items()], list(outputs)),
)


def describe(spec: pytree.TreeSpec) -> str:
    """A pytree structure as JSON; classes other than tuples, lists and dicts are described by their field names."""
    return json.dumps(_describe(spec), separators=(",", ":"))


def _describe(spec: pytree.TreeSpec) -> Any:
    if spec.is_leaf():
        return "*"
    children = [_describe(child) for child in spec.children()]
    name = spec.type.__name__ if spec.type in _PLAIN.values() else ""
    if name in ("tuple", "list"):
        return [name, children]
    if name in ("dict", "OrderedDict"):
        return [name, list(spec.context), children]
    fields = (
        spec.context[0] if isinstance(spec.context, (list, tuple)) and spec.context and isinstance(spec.context[0], list) else spec.context
    )
    if not (isinstance(fields, (list, tuple)) and len(fields) == len(children) and all(isinstance(f, str) for f in fields)):
        fields = [str(place) for place in range(len(children))]
    return ["object", list(fields), children]


def rebuild(text: str) -> pytree.TreeSpec:
    """The structure that `describe` wrote; objects come back as `Outputs`. Raises CheckpointError if it is malformed."""
    try:
        skeleton = _skeleton(json.loads(text))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise CheckpointError(f"the description of the model's inputs or outputs is malformed: {error}") from None
    return pytree.tree_structure(skeleton)


def _skeleton(node: Any) -> Any:
    if node == "*":
        return 0
    kind = node[0]
    if kind in ("tuple", "list"):
        return _PLAIN[kind](_skeleton(child) for child in node[1])
    if kind not in ("dict", "OrderedDict", "object"):
        raise ValueError(f"unknown kind '{kind}'")
    pairs = [(str(name), _skeleton(child)) for name, child in zip(node[1], node[2], strict=True)]
    return Outputs(pairs) if kind == "object" else _PLAIN[kind](pairs)
