"""Cut models of `transformers` with sizes that no configuration says: a configuration class, and model classes made from the base classes.

    import geta.integrations.hf
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)       # a folder of `geta.save_pretrained`

Importing this module registers the model type "geta" with the Auto classes of `transformers`. No code comes out of a folder: the base
class is looked up in `transformers`, built from its own configuration, and then cut as the record says (`geta.integrations.hf_record`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import transformers
from transformers.models.auto import auto_factory, configuration_auto, modeling_auto

from geta.errors import CheckpointError
from geta.integrations.hf_record import KEY, Record

MODEL_TYPE = "geta"
_MADE: dict[Any, Any] = {}
"""Base class -> the class made from it, once. No `lru_cache`: a capture empties those of the code that a model is made of."""


class GetaConfig(transformers.PreTrainedConfig):
    """The configuration of a cut model: all settings of its base configuration, and the record of what differs, in `geta`.

    Instances are of `GetaLlamaConfig` and the like (`config_class`), which are also configurations of the base class.
    Reading a folder raises CheckpointError when its values are malformed.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A configuration of the class that the record names."""
        record = Record.from_json(config_dict.get(KEY))
        own = config_class(base_config(record.model_type))
        if cls is GetaConfig:
            return own.from_dict(config_dict, **kwargs)
        if cls is not own:
            raise CheckpointError(f"config.json: {KEY}.model_type is '{record.model_type}', which is not read by {cls.__name__}")
        base_model(record)
        try:
            return super().from_dict(config_dict, **kwargs)
        except Exception as error:  # the base configuration checks its own settings, with errors of its own
            raise CheckpointError(f"config.json: {cls.__bases__[0].__name__} refuses its settings: {error}") from error

    @property
    def base_config(self) -> Any:
        """The settings alone, of the base class."""
        settings = {name: value for name, value in self.to_dict().items() if name not in (KEY, "model_type")}
        return type(self).__bases__[0](**settings)


def base_config(model_type: str) -> type:
    """The configuration class of a model type of `transformers`. Raises CheckpointError for others."""
    if model_type not in set(configuration_auto.CONFIG_MAPPING) - {MODEL_TYPE}:
        raise CheckpointError(
            f"config.json: {KEY}.model_type is '{model_type}', which transformers {transformers.__version__} does not know"
        )
    found: type = configuration_auto.CONFIG_MAPPING[model_type]
    if not found.__module__.startswith("transformers."):
        raise CheckpointError(f"config.json: {KEY}.model_type is '{model_type}', which comes from '{found.__module__}', not transformers")
    return found


def base_model(record: Record) -> type:
    """The class that the record names. Raises CheckpointError unless it is a model class of `transformers` for that configuration."""
    found = getattr(transformers, record.base, None) if record.base.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.__module__.startswith("transformers.")):
        raise CheckpointError(f"config.json: {KEY}.class is '{record.base}', which is no model class of transformers")
    if found.config_class is not base_config(record.model_type):
        raise CheckpointError(f"config.json: {KEY}.class is '{record.base}', which is not built from '{record.model_type}' configurations")
    return found


def config_class(base: Any) -> Any:
    """`GetaLlamaConfig` for `LlamaConfig`; its model classes are registered with all Auto classes that know the base configuration."""
    if base in _MADE:
        return _MADE[base]
    body = {"model_type": MODEL_TYPE, "__module__": __name__, "__doc__": f"`{base.__name__}` of a cut model."}
    own: Any = type(f"Geta{base.__name__}", (base, GetaConfig), body)
    _MADE[base] = own
    for auto in _auto_classes():
        found = auto._model_mapping.get(base, None)
        if found is not None:
            classes = found if isinstance(found, tuple | list) else (found,)
            made = tuple(_made(own, one) for one in classes)
            auto.register(own, made if isinstance(found, tuple | list) else made[0], exist_ok=True)
    for readers in _readers():
        if base in readers:
            readers.register(own, readers[base], exist_ok=True)
    return own


def model_class(base: Any) -> Any:
    """`GetaLlamaForCausalLM` for `LlamaForCausalLM`: the same class with the sizes of its configuration's record."""
    return _made(config_class(base.config_class), base)


def _made(config: Any, base: Any) -> Any:
    if base in _MADE:
        return _MADE[base]

    def __init__(self: Any, config: Any, *inputs: Any, **kwargs: Any) -> None:  # noqa: N807
        super(own, self).__init__(config, *inputs, **kwargs)
        record = Record.from_json(getattr(config, KEY, None))
        record.apply(self, prefix=base.base_model_prefix, strict=record.base == base.__name__)

    body = {"config_class": config, "__init__": __init__, "__module__": __name__, "__doc__": f"`{base.__name__}` of a cut model."}
    own: Any = type(f"Geta{base.__name__}", (base,), body)
    return _MADE.setdefault(base, own)


def record_config(config: Any, record: Record) -> Any:
    """A base configuration and a record as one configuration."""
    kind: Any = type(config)
    own = config_class(kind)
    settings = copy.deepcopy(config.to_dict())
    settings.pop("model_type", None)
    made = own(**settings, **{KEY: record.to_json()})
    made._attn_implementation_internal = config._attn_implementation
    return made


def auto_class(model: Any) -> str:
    """The Auto class that loads a model class, by name; the class's own name where there is none."""
    for auto in _auto_classes():
        found = auto._model_mapping.get(model.config_class, ())
        if model in (found if isinstance(found, tuple | list) else (found,)):
            return str(auto.__name__)
    return str(model.__name__)


def _auto_classes() -> Iterator[Any]:
    """Those for one task before those for several, which load the same class."""
    several = ("AutoModelForPreTraining", "AutoModel")
    known = [one for one in vars(modeling_auto).values() if isinstance(one, type) and issubclass(one, auto_factory._BaseAutoModelClass)]
    usable = [one for one in dict.fromkeys(known) if isinstance(one._model_mapping, auto_factory._LazyAutoMapping)]
    yield from sorted(usable, key=lambda one: several.index(one.__name__) if one.__name__ in several else -1)


def _readers() -> Iterator[Any]:
    """What finds tokenizers and processors by configuration."""
    from transformers.models.auto import feature_extraction_auto, image_processing_auto, processing_auto, tokenization_auto

    yield tokenization_auto.TOKENIZER_MAPPING
    yield image_processing_auto.IMAGE_PROCESSOR_MAPPING
    yield feature_extraction_auto.FEATURE_EXTRACTOR_MAPPING
    yield processing_auto.PROCESSOR_MAPPING


def __getattr__(name: str) -> Any:
    """`GetaLlamaConfig`, `GetaLlamaForCausalLM` and so on, so that instances can be pickled by processes that train."""
    found: Any = getattr(transformers, name.removeprefix("Geta"), None) if name.startswith("Geta") else None
    kinds: dict[Any, Any] = {transformers.PreTrainedConfig: config_class, transformers.PreTrainedModel: model_class}
    for kind, make in kinds.items():
        if isinstance(found, type) and issubclass(found, kind) and found.__module__.startswith("transformers."):
            return make(found)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


transformers.AutoConfig.register(MODEL_TYPE, GetaConfig, exist_ok=True)
