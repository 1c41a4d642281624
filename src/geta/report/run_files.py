"""Reading a run folder: every file checked, and a clear error for what is missing, half-written or damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from geta.errors import CheckpointError, ConfigError, GetaError
from geta.report.run_records import Bytes, Costs, Environment, FamilyRecord, Groups, HistoryRow, Operation, Pair, Result, Run

if TYPE_CHECKING:
    from geta.graph.dependency import DependencyGraph

RESULT, HISTORY, ANALYSIS, COSTS = "result.json", "history.jsonl", "analysis.json", "costs.json"
RECIPE, ENVIRONMENT, GRAPH, SWEEP = "recipe.yaml", "environment.json", "graph.json", "sweep.json"
COMPACT, CHECKPOINT = "compact", "checkpoint"
FORMAT = 1
_MANIFEST = "manifest.json"
_LARGEST = 1 << 28  # bytes of one file
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: the value of the key, and its folder below that of the sweep."""

    value: Any
    folder: str


@dataclass(frozen=True)
class Sweep:
    """sweep.json: the recipe key that was varied, and the runs."""

    key: str
    runs: tuple[SweepRun, ...]


def analysis_files(graph: DependencyGraph) -> dict[str, str]:
    """Texts of analysis.json and graph.json by name: families with their reasons, and the operators as the report draws them.

    graph: of the float network, before quantizers are attached.
    """
    from geta.graph.page import page_data

    drawn = json.dumps(page_data(graph), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return {ANALYSIS: graph.to_json(), GRAPH: drawn}


def read_run(folder: Path) -> Run:
    """Read a run folder, or a folder that `CompactModel.save` wrote.

    Raises GetaError for a run that is not complete and a folder that is neither; CheckpointError for a missing or damaged file.
    """
    check_folder(folder)
    if not (folder / RESULT).exists():
        if (folder / _MANIFEST).exists():
            return _compact_alone(folder)
        raise GetaError(_incomplete(folder))
    result = read_result(folder)
    recipe = _text(folder / RECIPE)
    return Run(
        folder=folder,
        result=result,
        trained=True,
        families=_families(folder / ANALYSIS),
        costs=_costs(folder / COSTS),
        history=_history(folder / HISTORY),
        environment=_record(folder / ENVIRONMENT, Environment),
        recipe=recipe,
        settings=_yaml(folder / RECIPE, recipe),
        graph=_graph(folder / GRAPH),
    )


def check_folder(folder: Path) -> None:
    """Raise ConfigError when there is no such folder."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ConfigError(f"'{folder}' {what}: name the output folder of `geta compress` or `geta demo`, or that of a saved compact model")


def read_result(folder: Path) -> Result:
    """Read result.json alone, for comparisons with many runs. Raises GetaError when the run is not complete."""
    path = folder / RESULT
    if not path.exists():
        raise GetaError(_incomplete(folder))
    data = _json(path)
    if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"'{path}' has format {data['format']!r}, this version of geta reads {FORMAT}: use the version that wrote it")
    if isinstance(data, dict) and "format" not in data and "accuracy" in data:
        raise CheckpointError(f"'{path}' was written by an older version of `geta demo`, without the files of a report: run it again")
    return _checked(path, data, Result)


def read_sweep(folder: Path) -> Sweep | None:
    """The sweep whose folder this is; None for a folder without sweep.json."""
    path = folder / SWEEP
    if not path.exists():
        return None
    sweep = _record(path, Sweep)
    outside = [run.folder for run in sweep.runs if Path(run.folder).is_absolute() or ".." in Path(run.folder).parts]
    if outside or not sweep.runs:
        problem = f"names the folder '{outside[0]}' outside the sweep" if outside else "names no runs"
        raise CheckpointError(f"'{path}' {problem}: it is damaged; write it again with `geta compress --sweep`")
    return sweep


def _incomplete(folder: Path) -> str:
    if any((folder / name).exists() for name in (HISTORY, RECIPE, CHECKPOINT, ENVIRONMENT)):
        return f"the run in '{folder}' is not complete (it has no {RESULT}): finish it with `geta compress --resume {folder}`"
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    return (
        f"'{folder}' is no run folder and no saved compact model: it holds neither {RESULT} nor {_MANIFEST}, but {found}. Name the output "
        f"folder of `geta compress` or `geta demo`"
    )


def _compact_alone(folder: Path) -> Run:
    """What a saved compact model tells about itself."""
    import geta
    from geta.report.files import folder_bytes

    model = geta.load(folder)
    info, cost, dense = model.info, model.cost, model.info.dense_cost or {}
    examples = max(1, cost.input_shapes[0][0]) if cost.input_shapes and cost.input_shapes[0] else 1
    kept = {name: len(indices) for name, indices in info.kept.items()}
    sizes = info.family_sizes
    result = Result(
        name="",
        params=Pair(cost.params, dense.get("params")),
        macs=Pair(cost.macs / examples, dense["macs"] / examples if dense else None),
        bops=Pair(cost.bops / examples, dense["bops"] / examples if dense else None),
        bytes=Bytes(cost.weight_bytes, folder_bytes(folder), dense.get("weight_bytes")),
        groups=Groups(sum(sizes.values()), None, sum(sizes[name] - number for name, number in kept.items())),
        notes=tuple(info.notes),
        bits=dict(info.bits),
        kept=kept,
        max_rel_difference=info.max_difference if info.max_difference == info.max_difference else None,
    )
    operations = {
        name: tuple(Operation(row["name"], row["op"], row["macs"] / examples, row["bops"] / examples) for row in rows)
        for name, rows in (("compact", cost.to_json()["per_op"]), ("dense", dense.get("per_op", [])))
    }
    families = tuple(FamilyRecord(name, number) for name, number in sizes.items())
    return Run(folder, result, trained=False, families=families, costs=Costs(**operations))


def _families(path: Path) -> tuple[FamilyRecord, ...]:
    data = _json(path)
    if not isinstance(data, dict) or "families" not in data:
        raise _damaged(path, "it has no 'families'")
    return _checked(path, data["families"], tuple[FamilyRecord, ...])


def _costs(path: Path) -> Costs:
    data = _json(path)
    try:
        lists = {name: data[name]["operations"] for name in ("dense", "compact")}
    except (KeyError, TypeError):
        raise _damaged(path, "it doesn't hold the operations of 'dense' and 'compact'") from None
    return _checked(path, lists, Costs)


def _history(path: Path) -> tuple[HistoryRow, ...]:
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            try:
                data = json.loads(line, parse_constant=_refuse)
            except ValueError as error:
                raise _damaged(path, f"line {number} is no JSON ({error})") from None
            rows.append(_checked(path, data, HistoryRow, f"line {number}: "))
    return tuple(rows)


def _graph(path: Path) -> str:
    """The text of graph.json, known to be JSON of the drawing; "" without the file."""
    if not path.exists():
        return ""
    data = _json(path)
    if not isinstance(data, dict) or not {"nodes", "families", "texts"} <= set(data):
        raise _damaged(path, "it doesn't hold 'nodes', 'families' and 'texts'")
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _yaml(path: Path, text: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise GetaError("reading recipes needs PyYAML, which is not installed: pip install 'geta[recipes]'") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _damaged(path, f"it is no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise _damaged(path, "it is no table of keys and values")
    return data


def _record(path: Path, kind: type[_Record]) -> _Record:
    return _checked(path, _json(path), kind)


def _checked(path: Path, data: Any, kind: type[_Record], where: str = "") -> _Record:
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "its content"
        raise _damaged(path, f"{where}{key}: {first['msg'].lower()}") from None


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no JSON ({error})") from None


def _text(path: Path) -> str:
    try:
        if os.stat(path).st_size > _LARGEST:
            raise _damaged(path, f"it has more than {_LARGEST:,} bytes")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"'{path.parent}' has no {path.name}: files of the run were lost or not copied; copy the whole folder, or run it again"
        ) from None
    except UnicodeDecodeError:
        raise _damaged(path, "it is no UTF-8 text") from None
    except OSError as error:
        raise GetaError(f"'{path}' can't be read: {error.strerror or error}") from None


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"'{path}' is damaged: {problem}. Copy it again from where it was made, or run the job again")


def _refuse(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def differing(runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """Recipe keys in which runs differ: {dotted key: {label: value}}; a key that a run hasn't got is left out for it."""
    flat = {label: _flat(run.settings) for label, run in runs.items()}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    values = {key: {label: settings[key] for label, settings in flat.items() if key in settings} for key in keys}
    same = {key for key, found in values.items() if len(found) == len(flat) and len({repr(value) for value in found.values()}) == 1}
    return {key: found for key, found in values.items() if key not in same}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found
