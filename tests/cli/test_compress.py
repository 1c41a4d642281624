"""`geta compress` and `geta evaluate`: what is wrong is said in one block, on stderr, with the right exit code, before anything is done."""

from __future__ import annotations

import json

import pytest

from geta.cli.main import main
from geta.recipes.training import Training
from recipe_nets import RECIPE


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a recipe `tiny.yaml`, a broken one, and a folder with a run of nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Training, "run", lambda *_: pytest.fail("training was started"))
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("FOLDER", "out"))
    (tmp_path / "broken.yaml").write_text("version: 1\nname: [")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text(RECIPE.replace("FOLDER", "begun"))
    (tmp_path / "begun" / "checkpoint").mkdir()
    (tmp_path / "begun" / "checkpoint" / "2-000000010").mkdir()
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compress"], 2, "give a RECIPE"),
        (["compress", "nowhere.yaml"], 2, "there is no file and no shipped recipe 'nowhere.yaml'"),
        (["compress", "digitz"], 2, "did you mean 'digits'?"),
        (["compress", "broken.yaml"], 2, "broken.yaml, line 2, column 8"),
        (["compress", "binary.yaml"], 2, "can't be read"),
        (["compress", "tiny.yaml", "steps"], 2, "'steps' is no override"),
        (["compress", "tiny.yaml", "stepz=3"], 2, "did you mean 'train.steps'?"),
        (["compress", "tiny.yaml", "steps=-3", "sparsity=2"], 2, "has 2 problems"),
        (["compress", "tiny.yaml", "train.batch_size=5000"], 2, "more than the 1437 training examples: write at most 1437"),
        (["compress", "tiny.yaml", "output.tensorboard=true", "batch_size=5000"], 2, "more than the 1437 training examples"),
        (["compress", "tiny.yaml", "model.source=nowhere:f"], 2, "model.source 'nowhere:f': the module 'nowhere' can't be imported"),
        (["compress", "tiny.yaml", "model.weights=none.safetensors"], 1, "model.weights = 'none.safetensors' can't be read"),
        (["compress", "tiny.yaml", "compress.protect=[nothing]"], 2, "nothing"),
        (["compress", "tiny.yaml", "compress.schedule={warmup: 0.9}"], 2, "the schedule is longer than the run"),
        (["compress", "tiny.yaml", "output.folder=file"], 1, "can't be written"),
        (["compress", "tiny.yaml", "output.folder=begun"], 1, "holds an unfinished run. Go on with it: geta compress --resume begun"),
        (["compress", "tiny.yaml", "--resume", "begun"], 2, "leave RECIPE, KEY=VALUE, --out and --sweep out"),
        (["compress", "tiny.yaml", "--out", "begun"], 1, "holds an unfinished run. Go on with it: geta compress --resume begun"),
        (["compress", "tiny.yaml", "folder=here", "--out", "there"], 2, "--out there and folder=here both name the folder of the run"),
        (["compress", "--resume", "begun", "--out", "there"], 2, "leave RECIPE, KEY=VALUE, --out and --sweep out"),
        (["compress", "--resume", "nowhere"], 1, "there is no run to resume in 'nowhere'"),
        (["compress", "--resume", "begun"], 1, "no checkpoint in 'begun/checkpoint' is whole"),
        (["compress", "tiny.yaml", "--sweep", "sparsity"], 2, "is no list of values"),
        (["compress", "tiny.yaml", "--sweep", "sparsity=0.5,1.5"], 2, "compress.sparsity = 1.5"),
        (["evaluate", "nowhere"], 1, "there is no folder 'nowhere'"),
        (["evaluate", "begun", "--config", "digitz"], 2, "did you mean 'digits'?"),
        (["evaluate", "begun"], 1, "begun/compact"),
        (["evaluate", "begun/checkpoint"], 2, "--config"),
    ],
)
def test_what_is_wrong_is_said_once(folder, arguments, code, message, capsys):
    assert main(arguments) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("geta: ")
    assert "Traceback" not in printed.err
    assert not list((folder / "out").glob("*"))  # so that the corrected recipe can be run into the same folder


def test_shipped_recipes_are_listed(capsys):
    assert main(["compress", "--list"]) == 0
    assert "digits" in capsys.readouterr().out
    assert main(["compress", "--list", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["digits"]["task"] == {"name": "classification"}
