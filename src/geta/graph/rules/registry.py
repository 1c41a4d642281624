"""Where operator rules are registered and looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from geta.errors import ConfigError
from geta.graph.context import Rule

_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under operator names such as "aten::relu" (all overloads and the in-place twin included).

    Raises ConfigError when a name has no namespace or already has a rule.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if "::" not in name:
                raise ConfigError(f"rule name '{name}' has no namespace: write it as 'aten::relu' or 'mylib::op'")
            if name in _RULES:
                raise ConfigError(f"operator '{name}' already has a rule ({_RULES[name].__module__}.{_RULES[name].__name__})")
            _RULES[name] = function
        return function

    return register


def find_rule(target: Any) -> Rule | None:
    """The rule of an operator: by base name, in-place twins share the rule of the plain operator."""
    name = operator_name(target)
    return _RULES.get(name) or (_RULES.get(name[:-1]) if name.endswith("_") and not name.endswith("__") else None)


def operator_name(target: Any) -> str:
    """ "aten::add" for `torch.ops.aten.add.Tensor`; "python::mul" for a Python function on sizes."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    return f"python::{getattr(target, '__name__', target)}"
