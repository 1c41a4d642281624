"""What a capture depends on besides the values of parameters: tells whether an earlier one still describes the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OWN = frozenset(vars(nn.Module()))


class _Same:
    """Equal to itself alone. Keeps the object alive: the address of a dead one may be given to another."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Names, shapes and dtypes of all tensors, the module tree with its hooks, and every plain attribute of every module.

    Equal fingerprints of one model: nothing was attached, replaced, moved or reconfigured in between. Whatever hides from it
    (a closure, a global) shows in the comparison of outputs that follows a compaction.
    """
    parts: list[Any] = []
    for path, module in model.named_modules():
        parts.append((path, type(module), _hooks(module), tuple(_plain(vars(module)))))
        parts += [(name, tuple(p.shape), p.dtype, p.device, p.requires_grad) for name, p in module._parameters.items() if p is not None]
        parts += [(name, tuple(b.shape), b.dtype, b.device) for name, b in module._buffers.items() if b is not None]
    return tuple(parts)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return (*module._forward_hooks, None, *module._forward_pre_hooks)


def _plain(attributes: dict[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Plain values, and those one level down in settings objects (a Hugging Face config); other objects by identity."""
    for name, value in attributes.items():
        if depth == 0 and name in _OWN:
            continue
        if isinstance(value, _PLAIN):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield name, tuple(_value(item) for item in value)
        elif isinstance(value, dict):
            yield name, tuple((repr(key), _value(item)) for key, item in value.items())
        else:
            yield name, _Same(value)
            if depth == 0 and hasattr(value, "__dict__") and not isinstance(value, nn.Module):
                yield name, tuple(_plain(vars(value), 1))


def _value(item: Any) -> Any:
    return item if isinstance(item, _PLAIN) else _Same(item)
