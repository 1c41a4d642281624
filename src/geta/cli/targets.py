"""What `geta analyze TARGET` understands: a factory of your own, a timm model name, a transformers configuration."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from geta.errors import BadModelError, ConfigError
from geta.hints import did_you_mean

_TEXT_LENGTH = 16
_BATCH = 2


@dataclass(frozen=True)
class Target:
    """A model and the example inputs it is captured with: `model(*args, **kwargs)`."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def resolve_target(text: str, input_shape: tuple[int, ...] | None = None) -> Target:
    """Build the model that `text` names.

    text:        `package.module:factory` (the factory, called without arguments, returns a model, `(model, args)` or
                 `(model, args, kwargs)`), `timm:NAME`, or `hf:WHAT` with WHAT a configuration file or folder, a model type such as
                 `bert`, or a name on the hub.
    input_shape: the shape of one random float input, batch first; for models whose factory brings no inputs.

    Raises ConfigError for a target that can't be found or read, BadModelError for one that is no model.
    """
    kind, separator, rest = text.partition(":")
    if not separator or not rest:
        raise ConfigError(f"TARGET '{text}' has no ':'; write python.path:factory, timm:NAME or hf:CONFIG_OR_PATH")
    if kind == "timm":
        return _from_timm(rest, input_shape)
    if kind == "hf":
        if input_shape is not None:
            raise ConfigError(f"--input-shape has no effect on '{text}': the inputs follow from the configuration; leave it out")
        return _from_transformers(rest)
    return _from_factory(kind, rest, input_shape)


def resized(found: Target, batch: int | None, sequence: int | None) -> Target:
    """The same model with inputs of another size, made by repeating the first example and, of token ids [B, L], the first token.

    Raises ConfigError when there is nothing to which `sequence` applies.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((found.args, dict(found.kwargs))) if isinstance(leaf, torch.Tensor)]
    if sequence is not None and not any(_is_text(leaf) for leaf in tensors):
        raise ConfigError("--sequence has no effect: none of the model's inputs is a batch of token ids (integers, two dimensions)")

    def other(leaf: torch.Tensor) -> torch.Tensor:
        if not leaf.dim():
            return leaf
        size = [leaf.shape[0] if batch is None else batch, *leaf.shape[1:]]
        first = leaf if batch is None else leaf[:1]
        if sequence is not None and _is_text(leaf):
            size[1], first = sequence, first[:, :1]
        return first.expand(size).contiguous()

    args, kwargs = pytree.tree_map_only(torch.Tensor, other, (found.args, dict(found.kwargs)))
    return Target(found.model, args, kwargs)


def _is_text(leaf: torch.Tensor) -> bool:
    return leaf.dim() == 2 and not leaf.is_floating_point()


def _from_factory(module_name: str, factory_name: str, input_shape: tuple[int, ...] | None) -> Target:
    target = f"{module_name}:{factory_name}"
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)  # as `python -m` does: a factory usually lies in the folder the command is run from
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        hint = did_you_mean(module_name, ("timm", "hf"))
        raise ConfigError(f"TARGET '{target}': the module '{module_name}' can't be imported: {error}{hint}") from error
    except Exception as error:
        raise BadModelError(
            f"TARGET '{target}': importing '{module_name}' failed with {type(error).__name__}: {error}; correct it"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    factory: Callable[[], Any] | None = getattr(module, factory_name, None)
    if not callable(factory):
        hint = did_you_mean(factory_name, [name for name, value in vars(module).items() if callable(value)])
        raise ConfigError(f"TARGET '{target}': the module '{module_name}' has no function or class '{factory_name}'{hint}")
    try:
        made = factory()
    except Exception as error:
        raise BadModelError(
            f"TARGET '{target}': calling {factory_name}() failed with {type(error).__name__}: {error}; "
            "a factory takes no arguments and returns the model, or (model, args), or (model, args, kwargs)"
        ) from error
    return _as_target(made, target, input_shape)


def _as_target(found: object, target: str, input_shape: tuple[int, ...] | None) -> Target:
    parts = found if isinstance(found, tuple) else (found,)
    model = parts[0] if parts else None
    args = parts[1] if len(parts) > 1 else ()
    kwargs = parts[2] if len(parts) > 2 else {}
    if not isinstance(model, nn.Module) or len(parts) > 3 or not isinstance(args, tuple | list) or not isinstance(kwargs, Mapping):
        raise BadModelError(
            f"TARGET '{target}' returned {_describe(found)}; a factory returns a torch.nn.Module, (model, args) or (model, args, kwargs) "
            "with a tuple of positional inputs and a dict of named ones"
        )
    if len(parts) > 1 and input_shape is not None:
        raise ConfigError(f"--input-shape contradicts TARGET '{target}', which brings its own inputs; leave one of them out")
    if len(parts) == 1 and input_shape is None:
        raise ConfigError(f"TARGET '{target}' returns a model without inputs: add --input-shape, e.g. --input-shape 1,3,224,224")
    if input_shape is not None:
        args = (torch.randn(input_shape, generator=torch.Generator().manual_seed(0)),)
    return Target(model, tuple(args), kwargs)


def _describe(found: object) -> str:
    if isinstance(found, tuple):
        return f"a tuple ({', '.join(type(part).__name__ for part in found)})"
    return f"an object of type {type(found).__name__}"


def _from_timm(name: str, input_shape: tuple[int, ...] | None) -> Target:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch raises RuntimeError
        raise ConfigError(f"TARGET 'timm:{name}' needs timm, which can't be imported here ({error}): pip install timm") from error
    if not timm.is_model(name):
        raise ConfigError(
            f"TARGET 'timm:{name}': timm knows no model of that name, timm.list_models() has them{did_you_mean(name, timm.list_models())}"
        )
    model = timm.create_model(name, pretrained=False)
    shape = input_shape or (_BATCH, *model.default_cfg["input_size"])
    return Target(model, (torch.randn(shape, generator=torch.Generator().manual_seed(0)),))


def _from_transformers(what: str) -> Target:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"TARGET 'hf:{what}' needs transformers, which can't be imported here ({error}): pip install 'geta[hf]'"
        ) from error
    if what.startswith(("/", ".", "~")) or what.endswith(".json"):
        _check_file(what)
    try:
        if what in transformers.CONFIG_MAPPING:
            config = transformers.AutoConfig.for_model(what)
        else:
            config = transformers.AutoConfig.from_pretrained(what)
        if hasattr(config, "use_cache"):
            config.use_cache = False  # a cache object among the outputs is no part of the network
        with torch.device("meta"):  # the analysis needs shapes only, so a 70B configuration takes no memory
            model = _built(transformers, config)
            return Target(model, (), _transformers_inputs(model))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"TARGET 'hf:{what}' is neither a readable configuration (file, folder, hub name) nor a model type with a default one: {error}"
            f"{did_you_mean(what, transformers.CONFIG_MAPPING)}"
        ) from error


def _check_file(what: str) -> None:
    """What is a path and not there isn't worth a search on the hub."""
    if not Path(what).exists():
        raise ConfigError(f"TARGET 'hf:{what}': there is no file or folder '{what}' (here is {Path.cwd()}); correct the path")


def _built(transformers: Any, config: Any) -> Any:
    """The class that the configuration names in `architectures` (a checkpoint's does, with its head); otherwise the bare network."""
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    return transformers.AutoModel.from_config(config) if named is None else named._from_config(config)


def _transformers_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Make the smallest inputs that the model's own main input name calls for."""
    config, main = model.config, str(model.main_input_name)
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return {main: torch.zeros(_BATCH, getattr(config, "num_channels", 3), height, width)}
    if main == "input_ids":
        ids = torch.ones(_BATCH, _TEXT_LENGTH, dtype=torch.int64)
        return {main: ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {main: ids}
    raise ConfigError(
        f"TARGET hf:{config.model_type}: no example inputs are known for models whose main input is '{main}'; "
        "write a factory that returns (model, args, kwargs) and pass python.path:factory"
    )
