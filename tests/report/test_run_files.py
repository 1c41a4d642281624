"""Reading run folders: what is there is read, and what is missing, half-written or damaged is named, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import run_folders
from geta.cli.main import main
from geta.errors import CheckpointError, ConfigError, GetaError
from geta.report.run_files import differing, read_run, read_sweep


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    return run_folders.small_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture
def folder(complete, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(complete, tmp_path / "run"))


def test_everything_in_a_run_folder_is_read(complete):
    run = read_run(complete)
    assert run.trained
    assert run.result.metric is not None
    assert (run.result.metric.dense, run.result.metric.compact) == (98.89, 98.61)
    assert [family.name for family in run.families] == ["stem", "stem (inputs)", "body.0", "head"]
    assert [family.prunable for family in run.families] == [True, False, True, False]
    assert [row.name for row in run.costs.dense] == ["stem", "body.0", "body.2", "head"]
    assert sum(row.macs for row in run.costs.dense) == run.result.macs.dense
    assert len(run.history) == 40
    assert {row.stage for row in run.history if row.run == "compact"} == {"warm-up", "projection", "joint", "cool-down"}
    assert run.environment is not None and run.environment.command[:2] == ("geta", "compress")
    assert run.settings["compress"]["sparsity"] == 0.5
    assert json.loads(run.graph)["model"] == "Net"


def test_a_saved_model_alone_is_read_too(complete):
    run = read_run(complete / "compact")
    assert not run.trained
    assert run.result.metric is None and run.history == ()
    assert run.result.params.relative == pytest.approx(355 / 1138)
    assert run.result.kept == {"stem": 4, "body.0": 3}
    assert run.costs.dense and run.costs.compact
    assert run.result.macs.dense == 69152  # of one of the two examples


def test_keys_that_this_version_does_not_know_are_ignored(folder):
    data = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**data, "of_a_later_version": 1}))
    assert read_run(folder).result.name == "small"


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def _change(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, **values}))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], None], type[GetaError], str]] = {
    "not complete": (_remove("result.json"), GetaError, r"not complete .*geta compress --resume"),
    "no history": (_remove("history.jsonl"), CheckpointError, r"has no history\.jsonl"),
    "no analysis": (_remove("analysis.json"), CheckpointError, r"has no analysis\.json"),
    "no costs": (_remove("costs.json"), CheckpointError, r"has no costs\.json"),
    "no recipe": (_remove("recipe.yaml"), CheckpointError, r"has no recipe\.yaml"),
    "no environment": (_remove("environment.json"), CheckpointError, r"has no environment\.json"),
    "half a result": (_write("result.json", '{"format": 1, "na'), CheckpointError, r"result\.json' is damaged: it is no JSON"),
    "an empty result": (_write("result.json", ""), CheckpointError, "is no JSON"),
    "a list": (_write("result.json", "[1]"), CheckpointError, "is damaged"),
    "no numbers": (_change("result.json", params={"dense": "many", "compact": 1}), CheckpointError, r"params\.dense"),
    "missing keys": (_write("result.json", '{"format": 1, "name": "x"}'), CheckpointError, r"params: field required"),
    "a later format": (_change("result.json", format=2), CheckpointError, r"format 2"),
    "an old demo": (_write("result.json", '{"accuracy": {}}'), CheckpointError, "older version of `geta demo`"),
    "not a number": (_write("result.json", '{"format": NaN}'), CheckpointError, "NaN is no JSON"),
    "no text": (_write("result.json", b"\xff\xfe\x00"), CheckpointError, "no UTF-8"),
    "half a history": (
        _write("history.jsonl", '{"run": "dense", "step": 1, "loss": 1.0}\n{"run": "de'),
        CheckpointError,
        "line 2 is no JSON",
    ),
    "odd history": (_write("history.jsonl", '{"run": "dense"}\n'), CheckpointError, "line 1: step: field required"),
    "odd costs": (_write("costs.json", '{"dense": []}'), CheckpointError, "doesn't hold the operations"),
    "odd analysis": (_write("analysis.json", "{}"), CheckpointError, "no 'families'"),
    "odd graph": (_write("graph.json", "{}"), CheckpointError, "doesn't hold 'nodes'"),
    "odd recipe": (_write("recipe.yaml", "a: [1"), CheckpointError, "is no YAML"),
    "recipe of words": (_write("recipe.yaml", "words"), CheckpointError, "no table"),
    "odd environment": (_write("environment.json", '{"command": 5}'), CheckpointError, "command"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_an_error_with_the_file_and_what_to_do(folder, name, capsys):
    damage, kind, message = DAMAGES[name]
    damage(folder)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(kind, match=message):
        read_run(folder)
    assert main(["report", str(folder)]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("geta: ") and "Traceback" not in printed
    assert sorted(path.name for path in folder.iterdir()) == before  # nothing was written


def test_folders_that_are_no_runs(tmp_path, complete):
    with pytest.raises(ConfigError, match="does not exist"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is a file"):
        read_run(complete / "result.json")
    with pytest.raises(GetaError, match=r"no run folder and no saved compact model.*nothing"):
        read_run(tmp_path)


def test_a_damaged_model_alone_is_refused(complete, tmp_path):
    copy = Path(shutil.copytree(complete / "compact", tmp_path / "compact"))
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        read_run(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"key": "compress.sparsity", "runs": [{"value": 1, "folder": "../else"}]}', "outside the sweep"),
        ('{"key": "compress.sparsity", "runs": []}', "names no runs"),
        ('{"runs": 3}', "key: field required"),
    ],
)
def test_a_damaged_sweep_is_refused(tmp_path, text, message):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_sweep(tmp_path)


def test_settings_that_differ(complete, folder):
    text = (folder / "recipe.yaml").read_text().replace("sparsity: 0.5", "sparsity: 0.7\n  exact: true")
    (folder / "recipe.yaml").write_text(text)
    found = differing({"a": read_run(complete), "b": read_run(folder)})
    assert found == {"compress.sparsity": {"a": 0.5, "b": 0.7}, "compress.exact": {"b": True}}
