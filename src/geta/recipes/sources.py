"""Where models come from: factories of one's own, timm, transformers.

What is named is resolved alike for recipes (real weights) and for `geta analyze` (shapes only).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from geta.errors import BadModelError, CheckpointError, ConfigError
from geta.hints import did_you_mean
from geta.recipes.recipe import ModelSettings

_TIMM_FACTS = {"classes": "num_classes", "channels": "in_chans"}


def build_model(settings: ModelSettings, facts: Mapping[str, Any]) -> nn.Module:
    """The network that a recipe names, with its weights.

    facts: what the data says (`classes`, `channels` ...): a factory gets those that it has parameters for; timm gets classes and channels.
           `options` come first.

    Raises ConfigError for a source that can't be found or arguments that it doesn't have, BadModelError for one that gives no model,
    CheckpointError when `weights` can't be read or belong to another network.
    """
    kind, _, rest = settings.source.partition(":")
    if kind == "timm":
        model = _from_timm(rest, settings.options, facts)
    elif kind == "hf":
        model = _from_transformers(rest, settings.options)
    else:
        model = _from_factory(settings.source, settings.options, facts)
    if settings.weights is not None:
        load_weights(model, Path(settings.weights))
    return model


def find_factory(text: str, what: str) -> Callable[..., Any]:
    """The function or class that `package.module:name` names. what: how messages call it, e.g. "model.source 'a.b:c'".

    Raises ConfigError when the module can't be imported or has nothing callable of that name.
    """
    module_name, _, name = text.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)  # as `python -m` does: a factory usually lies in the folder the command is run from
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        hint = did_you_mean(module_name, ("timm", "hf"))
        raise ConfigError(f"{what}: the module '{module_name}' can't be imported: {error}{hint}") from error
    except Exception as error:
        raise BadModelError(f"{what}: importing '{module_name}' failed with {type(error).__name__}: {error}; correct it") from error
    finally:
        if added:
            sys.path.remove(here)
    factory = getattr(module, name, None)
    if not callable(factory):
        hint = did_you_mean(name, [known for known, value in vars(module).items() if callable(value)])
        raise ConfigError(f"{what}: the module '{module_name}' has no function or class '{name}'{hint}")
    found: Callable[..., Any] = factory
    return found


def timm_of(name: str, what: str) -> Any:
    """The module timm, which has a model of this name. Raises ConfigError otherwise."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch raises RuntimeError
        raise ConfigError(f"{what} needs timm, which can't be imported here ({error}): pip install timm") from error
    if not timm.is_model(name):
        raise ConfigError(f"{what}: timm knows no model of that name, timm.list_models() has them{did_you_mean(name, timm.list_models())}")
    return timm


def transformers_of(what: str) -> Any:
    """The module transformers. Raises ConfigError when it can't be imported."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"{what} needs transformers, which can't be imported here ({error}): pip install 'geta[hf]'") from error
    return transformers


def transformers_config(transformers: Any, name: str, what: str, **options: Any) -> Any:
    """The configuration of a model type, a file, a folder or a name on the hub, without a cache among the outputs.

    Raises ConfigError for a path where there is nothing, which isn't worth a search on the hub.
    """
    if (name.startswith(("/", ".", "~")) or name.endswith(".json")) and not Path(name).exists():
        raise ConfigError(f"{what}: there is no file or folder '{name}' (here is {Path.cwd()}); correct the path")
    if name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name, **options)
    else:
        config = transformers.AutoConfig.from_pretrained(name, **options)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache object among the outputs is no part of the network
    return config


def transformers_class(transformers: Any, config: Any) -> Any:
    """The class that the configuration names in `architectures` (a checkpoint's does, with its head); None = the bare network."""
    return getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into the model. Raises CheckpointError unless its tensors are exactly the model's."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"model.weights = '{path}' can't be read as safetensors: {error}") from error
    own = model.state_dict()
    wrong = sorted(set(state) ^ set(own)) or [name for name, tensor in state.items() if tensor.shape != own[name].shape]
    if wrong:
        where = (
            "both have, in other shapes"
            if wrong[0] in state and wrong[0] in own
            else f"only the {'file' if wrong[0] in state else 'model'} has"
        )
        raise CheckpointError(
            f"model.weights = '{path}' is of another network: {len(wrong)} tensors differ (first: '{wrong[0]}', which {where})"
        )
    model.load_state_dict(state)


def _from_factory(source: str, options: Mapping[str, Any], facts: Mapping[str, Any]) -> nn.Module:
    what = f"model.source '{source}'"
    factory = find_factory(source, what)
    parameters = inspect.signature(factory).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in options if name not in parameters and not open_ended]
    if unknown:
        known = f"it takes {', '.join(parameters) or 'none'}{did_you_mean(unknown[0], parameters)}"
        raise ConfigError(f"model.options.{unknown[0]}: {source} has no such argument; {known}")
    arguments = {name: value for name, value in facts.items() if name in parameters} | dict(options)
    try:
        made = factory(**arguments)
    except Exception as error:
        raise BadModelError(f"{what}: calling it with {arguments} failed with {type(error).__name__}: {error}") from error
    model = made[0] if isinstance(made, tuple) and made else made  # a factory for `geta analyze` brings its inputs along
    if not isinstance(model, nn.Module):
        raise BadModelError(f"{what} returned an object of type {type(made).__name__}: a factory returns a torch.nn.Module")
    return model


def _from_timm(name: str, options: Mapping[str, Any], facts: Mapping[str, Any]) -> nn.Module:
    what = f"model.source 'timm:{name}'"
    timm = timm_of(name, what)
    arguments = {_TIMM_FACTS[fact]: value for fact, value in facts.items() if fact in _TIMM_FACTS} | dict(options)
    try:
        model: nn.Module = timm.create_model(name, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{what}: timm.create_model with {arguments} failed: {error}") from error
    return model


def _from_transformers(name: str, options: Mapping[str, Any]) -> nn.Module:
    what = f"model.source 'hf:{name}'"
    transformers = transformers_of(what)
    settings = dict(options)
    wanted = settings.pop("class", None)
    try:
        config = transformers_config(transformers, name, what, **settings)
        cls = transformers_class(transformers, config) if wanted is None else getattr(transformers, str(wanted), None)
        if cls is None and wanted is not None:
            raise ConfigError(
                f"model.options.class = {wanted!r}: transformers has no such class{did_you_mean(str(wanted), dir(transformers))}"
            )
        cls = cls or transformers.AutoModel
        if name in transformers.CONFIG_MAPPING or Path(name).is_file() or (Path(name).is_dir() and not _has_weights(Path(name))):
            model = cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
        else:
            model = cls.from_pretrained(name, config=config, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{what}: no configuration or weights of that name can be read (a file, a folder with safetensors, a hub name, a model type): "
            f"{error}{did_you_mean(name, transformers.CONFIG_MAPPING)}"
        ) from error
    found: nn.Module = model.float()
    return found


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
