"""Run a model without leaving a trace in it: modes, tensors, attributes and hooks are as before, whatever happens."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn


@contextlib.contextmanager
def mode_of(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model into train or eval mode and give every submodule its own mode back afterwards."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """No garbage collection meanwhile.

    A capture makes millions of small objects that live on, and the collector would walk all of them, and the whole process, again
    and again: a tenth of the time of a capture, more where many libraries are loaded.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes back, as the same objects; lists and dicts directly in a module get their entries back.

    Tracing may leave traced tensors behind: in buffers, in caches, in the attributes that weight and spectral norm set.
    """
    before = [(module, dict(module.__dict__), _contents(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in contents.items():
                _refill(attributes[name], content)
        _forget_cached(model)


def _forget_cached(model: nn.Module) -> None:
    """Empty the `functools.lru_cache`s of the code that the model is made of: the traced tensors in them would come back as results."""
    spaces: dict[str, dict[str, Any]] = {}
    for kind in {kind: None for module in model.modules() for kind in type(module).__mro__}:
        if kind.__module__.partition(".")[0] in ("torch", "builtins", "typing"):
            continue
        home = sys.modules.get(kind.__module__)
        spaces[kind.__module__] = dict(vars(home)) if home is not None else {}
        spaces[f"{kind.__module__}:{kind.__qualname__}"] = dict(vars(kind))
    for space in spaces.values():
        for value in space.values():
            bare = getattr(value, "__func__", value)  # a static method
            hidden = [_content(cell) for cell in getattr(bare, "__closure__", None) or ()]  # behind a decorator of the user's own
            for cached in (value, *hidden):
                if isinstance(cached, functools._lru_cache_wrapper):
                    cached.cache_clear()


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that was never given a value
        return None


def _contents(module: nn.Module) -> dict[str, Any]:
    return {name: value.copy() for name, value in module.__dict__.items() if isinstance(value, (dict, list))}


def _refill(container: Any, content: Any) -> None:
    same = len(container) == len(content)
    if isinstance(container, list):
        if not (same and all(a is b for a, b in zip(container, content, strict=True))):
            container[:] = content
    elif not (same and all(container.get(key, ...) is value for key, value in content.items())):
        container.clear()
        container.update(content)


@contextlib.contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Let a model of transformers not return the keys and values that generation keeps: no part of what the network computes.

    Only what its configuration asks for is held back, a `use_cache=True` in the call is not. The library is not imported for that.
    """
    library = sys.modules.get("transformers.configuration_utils")
    if library is None:
        yield
        return
    kind = getattr(library, "PreTrainedConfig", None) or library.PretrainedConfig  # the name before version 5
    configs = [vars(module).get("config") for module in model.modules()]
    asking = {id(one): one for one in configs if isinstance(one, kind) and vars(one).get("use_cache") is True}
    try:
        for config in asking.values():
            config.use_cache = False
        yield
    finally:
        for config in asking.values():
            config.use_cache = True


@contextlib.contextmanager
def known_dataclasses(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Tell torch how to look into the dataclasses that the model takes and returns; otherwise they could not be captured."""
    _register_all(inputs)
    hook = model.register_forward_hook(lambda _module, _args, output: _register_all(output))
    try:
        yield
    finally:
        hook.remove()


def _register_all(tree: Any) -> None:
    for leaf in pytree.tree_leaves(tree):
        kind = type(leaf)
        if dataclasses.is_dataclass(kind):
            torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
            _register_all(leaf)
