"""From a YAML file and `key=value` overrides to a checked recipe; every problem at once, with its key and what to do."""

from __future__ import annotations

import copy
import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from geta.errors import ConfigError
from geta.hints import did_you_mean
from geta.recipes.recipe import VERSION, Recipe

_MODEL_ERROR = "Value error, "


def read_recipe(what: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    what:      a path, or the name of a shipped recipe (`shipped_recipes` lists them).
    overrides: `key=value` each: dotted keys (`train.epochs`), or the last part alone where only one section has it (`epochs`); values are
               YAML.

    Raises ConfigError that lists every problem: the key, the value found, the rule, and the name that was probably meant.
    """
    text, label = _text_of(what)
    raw = parse_yaml(text, label)
    if not isinstance(raw, dict):
        raise ConfigError(f"{label} holds {_kind(raw)} where a recipe is a mapping of sections: version, name, model, data, task ...")
    if raw.get("version") != VERSION:
        found = "has no version" if "version" not in raw else f"has version {raw['version']!r}"
        raise ConfigError(
            f"{label} {found}, and this geta reads version {VERSION}: write `version: {VERSION}` once its keys are those of it"
        )
    for key, value in map(parse_override, overrides):
        _set(raw, full_key(key), value)
    return check_recipe(raw, label)


def check_recipe(raw: Mapping[str, Any], label: str) -> Recipe:
    """A recipe from plain data. label: what the data is called in messages."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = list(dict.fromkeys(_describe(one, raw) for one in error.errors()))
        head = f"{label} has {len(lines)} problems:" if len(lines) > 1 else f"{label}:"
        raise ConfigError("\n  ".join([head, *lines])) from None


def write_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default filled in."""
    return str(_yaml().safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True, width=120))


def shipped_recipes() -> dict[str, Any]:
    """The recipes that come with geta: name -> its file."""
    folder = resources.files("geta.recipes") / "shipped"
    found = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def parse_yaml(text: str, label: str) -> Any:
    """What a YAML text says. Raises ConfigError with the line and column of a syntax error, and when PyYAML is missing."""
    yaml = _yaml()
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{label}{where}: this is no YAML: {getattr(error, 'problem', None) or error}") from None


def parse_override(text: str) -> tuple[str, Any]:
    """Read `train.epochs=10`. Raises ConfigError for text without a key or with a value that is no YAML."""
    key, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"\w+(\.[\w*-]+)*", key.strip()):
        raise ConfigError(f"'{text}' is no override: write key=value, e.g. train.epochs=10")
    return key.strip(), parse_yaml(value, f"override '{text}'")


def full_key(key: str) -> str:
    """`sparsity` -> `compress.sparsity`, `lr` -> `train.optimizer.lr`; keys with a dot and names of sections stay.

    Raises ConfigError for what no section has.
    """
    if "." in key or key in Recipe.model_fields:
        return key
    sections = {name: _fields({_classes(Recipe, name)[0]}) for name in ("train", "compress", "output", "model")}
    sections["train.optimizer"] = _fields({_classes(_classes(Recipe, "train")[0], "optimizer")[0]})
    owners = [name for name, fields in sections.items() if key in fields]
    if len(owners) == 1:
        return f"{owners[0]}.{key}"
    if owners:
        raise ConfigError(f"'{key}' is ambiguous: write {' or '.join(f'{owner}.{key}' for owner in owners)}")
    every = [*Recipe.model_fields, *(f"{name}.{field}" for name, fields in sections.items() for field in fields)]
    near = difflib.get_close_matches(key, [name.rpartition(".")[2] for name in every], n=1)
    names = [name for name in every if near and name.rpartition(".")[2] == near[0]]
    raise ConfigError(f"no key of a recipe is called '{key}'" + (f"; did you mean '{names[0]}'?" if names else ": see docs/recipes.md"))


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError("recipes are YAML files, and PyYAML is not installed: pip install 'geta[recipes]'") from None
    return yaml


def _text_of(what: str | Path) -> tuple[str, str]:
    path, shipped = Path(what), shipped_recipes()
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the recipe '{path}' can't be read: {error}") from error
    if str(what) in shipped:
        return shipped[str(what)].read_text(encoding="utf-8"), f"recipe '{what}'"
    hint = did_you_mean(str(what), shipped) or f"; shipped are {', '.join(shipped)}"
    raise ConfigError(f"there is no file and no shipped recipe '{what}'{hint}")


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at a dotted key; sections that aren't there are made, numbers are places in lists."""
    place: Any = raw
    *parents, last = key.split(".")
    for number, part in enumerate(parents):
        if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
        if not isinstance(place, dict | list):
            raise ConfigError(f"'{key}' can't be set: '{'.'.join(parents[: number + 1])}' is {_kind(place)}, which has no keys")
    if isinstance(place, list):
        if not last.isdecimal() or int(last) >= len(place):
            raise ConfigError(f"'{key}' can't be set: '{'.'.join(parents)}' is a list of {len(place)}, numbered from 0")
        place[int(last)] = copy.deepcopy(value)
    else:
        place[last] = copy.deepcopy(value)


def _describe(error: Mapping[str, Any], raw: Mapping[str, Any]) -> str:
    """One problem in words: `train.epochs = 0: Input should be greater than or equal to 1`."""
    path, kind, message = _path(error["loc"], raw), error["type"], str(error["msg"]).removeprefix(_MODEL_ERROR)
    key = ".".join(path) or "the recipe"
    if kind == "missing":
        return f"{key}: is missing"
    if kind == "extra_forbidden":
        known = _fields(_at(error["loc"][:-1]))
        return f"{key} = {_short(error['input'])}: there is no such key{did_you_mean(path[-1], known)}"
    if kind == "union_tag_invalid":
        context = error["ctx"]
        known = re.findall(r"'([^']+)'", str(context["expected_tags"]))
        return f"{key}.{str(context['discriminator']).strip(chr(39))} = {context['tag']!r}: is none of {', '.join(known)}" + did_you_mean(
            str(context["tag"]), known
        )
    if kind == "literal_error":
        known = re.findall(r"'([^']+)'", str(error["ctx"]["expected"]))
        return f"{key} = {_short(error['input'])}: {message}{did_you_mean(str(error['input']), known) if known else ''}"
    if isinstance(error["input"], dict):
        return f"{key}: {message}"
    return f"{key} = {_short(error['input'])}: {message}"


def _path(loc: Sequence[str | int], raw: Any) -> list[str]:
    """The keys as the file has them: pydantic puts the names of a union's alternatives between them."""
    path: list[str] = []
    place: Any = raw
    for number, part in enumerate(loc):
        inside: Any = place
        if (isinstance(place, dict) and part in place) or (isinstance(place, list) and isinstance(part, int) and part < len(place)):
            place = inside[part]
            path.append(str(part))
        elif number == len(loc) - 1 and isinstance(place, dict):
            path.append(str(part))
    return path


def _at(loc: Sequence[str | int]) -> set[type[BaseModel]]:
    """The classes that may stand at a place, narrowed by the tags in it."""
    found: set[type[BaseModel]] = {Recipe}
    for part in loc:
        tagged = {cls for cls in found if any(field.default == part for field in cls.model_fields.values() if isinstance(part, str))}
        below = {inner for cls in found if part in cls.model_fields for inner in _classes(cls, str(part))}
        found = below or tagged or found
    return found


def _classes(owner: type[BaseModel], name: str) -> list[type[BaseModel]]:
    return list(_models(owner.model_fields[name].annotation))


def _models(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, types.UnionType, tuple, list):
        for inner in get_args(annotation):
            yield from _models(inner)


def _fields(classes: Iterable[type[BaseModel]]) -> list[str]:
    return sorted({name for cls in classes for name in cls.model_fields})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
