"""A run that is stopped and resumed ends as it would have, to the last bit; nothing is lost or overwritten on the way."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import geta
from geta.cli.main import main
from geta.errors import CheckpointError, ConfigError, GetaError
from geta.recipes import training
from geta.recipes.checkpoints import Checkpoints
from geta.recipes.read import read_recipe
from geta.recipes.run import resume, run_recipe
from geta.recipes.stopping import Interrupted
from geta.recipes.training import Training
from recipe_nets import RECIPE


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("FOLDER", str(tmp_path / "out")))
    return path


def kill_after(monkeypatch, leg: str, step: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal in the middle of the step that follows `step` steps of a leg."""
    real = Training._loss

    def loss(self, batch):
        if self.leg.name == leg and self.leg.step == step:
            os.kill(os.getpid(), number)
        return real(self, batch)

    monkeypatch.setattr(Training, "_loss", loss)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def history_of(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_interrupted_in_every_stage_and_resumed_it_is_the_same_run(recipe_file, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "out"
    expected = run_recipe(read_recipe(recipe_file, [f"output.folder={whole}"]))
    assert not (whole / "checkpoint").exists()

    kill_after(monkeypatch, "dense", 17)
    assert main(["compress", str(recipe_file)]) == 130
    printed = capsys.readouterr().out
    assert f"geta compress --resume {cut}" in printed
    assert len(list((cut / "checkpoint").iterdir())) <= 2
    for leg, step, number, code in (
        ("compact", 3, signal.SIGTERM, 143),
        ("compact", 17, signal.SIGINT, 130),
        ("compact", 33, signal.SIGINT, 130),
    ):
        monkeypatch.undo()
        kill_after(monkeypatch, leg, step, number)
        assert main(["compress", "--resume", str(cut)]) == code
        assert sorted(path.name for path in (cut / "checkpoint").iterdir())[-2:] == [f"2-{step + 1:09d}", "trained"]
        assert len(list((cut / "checkpoint").iterdir())) <= 3
    monkeypatch.undo()
    found = resume(cut)
    assert found is not None
    assert expected is not None
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert files_of(cut / "compact") == files_of(whole / "compact")
    assert history_of(cut) == history_of(whole)
    assert [row["step"] for row in history_of(cut)] == [11, 22, 33, 40] * 2
    assert not (cut / "checkpoint").exists()
    assert main(["compress", "--resume", str(cut)]) == 1
    assert "nothing is left to resume" in capsys.readouterr().err


def test_a_run_whose_process_died_goes_on_from_its_last_whole_checkpoint(recipe_file, tmp_path, monkeypatch, capsys):
    def die(self):
        if self.leg.step >= 14:
            raise KeyboardInterrupt  # nothing of ours runs after it, as after SIGKILL
        return real(self)

    real = Training._save
    monkeypatch.setattr(Training, "_save", die)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(read_recipe(recipe_file))
    monkeypatch.undo()
    folder = tmp_path / "out" / "checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == ["1-000000006", "1-000000012"]
    torn = folder / "1-000000012" / "state.pt"
    torn.write_bytes(torn.read_bytes()[:-1000])
    with (tmp_path / "out" / "history.jsonl").open("a") as stream:
        stream.write('{"run": "dense", "st')
    kill_after(monkeypatch, "dense", 8)
    with pytest.raises(Interrupted):
        resume(tmp_path / "out")
    printed = " ".join(capsys.readouterr().out.split())
    assert "is damaged: state.pt is not what was written; the one before it is used" in printed
    assert "resumed: dense, step 6" in printed
    assert history_of(tmp_path / "out") == []
    for path in folder.glob("*/state.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        resume(tmp_path / "out")


def test_batches_that_workers_fetch_give_the_same_run(tmp_path):
    recipe = RECIPE.replace("FOLDER", str(tmp_path / "one")).replace("steps: 40", "steps: 24")
    (tmp_path / "tiny.yaml").write_text(recipe)
    base = ["baseline=false"]
    first = run_recipe(read_recipe(tmp_path / "tiny.yaml", base))
    second = run_recipe(read_recipe(tmp_path / "tiny.yaml", [*base, "workers=1", f"output.folder={tmp_path / 'two'}"]))
    assert first is not None
    assert second is not None
    assert first["metric"] == second["metric"]
    assert first["metric"]["dense"] is None
    assert files_of(tmp_path / "one" / "compact") == files_of(tmp_path / "two" / "compact")


def test_a_full_disk_is_told_and_the_checkpoint_before_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoint")
    checkpoints.save(1, 5, {"leg": 1, "weight": torch.ones(3)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the system refuses to write more, as on a full disk
    try:
        with pytest.raises(GetaError, match=r"can't be written .*1-000000005\) is whole"):
            checkpoints.save(1, 9, {"leg": 1, "weight": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["1-000000005"]
    found = checkpoints.newest()
    assert found is not None
    assert torch.equal(found["weight"], torch.ones(3))


def test_a_disk_that_fills_up_in_a_run_is_one_message_with_the_way_on(recipe_file, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        assert main(["compress", str(recipe_file)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = capsys.readouterr().err
    assert "can't be written" in message
    assert "--resume" in message
    assert "Traceback" not in message


def test_checkpoints_run_no_code_when_they_are_read(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints._write("1-000000001", {"model": nn.Linear(2, 2)})  # a pickled object, which weights_only refuses
    with pytest.raises(CheckpointError, match="can't be read"):
        checkpoints.newest()


def test_a_second_signal_ends_the_run_at_once(recipe_file, monkeypatch):
    def loss(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the step went on")

    monkeypatch.setattr(Training, "_loss", loss)
    with pytest.raises(Interrupted):
        run_recipe(read_recipe(recipe_file))


def test_a_loss_that_is_not_finite_is_explained_and_the_log_stays(recipe_file, tmp_path, capsys, monkeypatch):
    real = Training._loss
    monkeypatch.setattr(Training, "_loss", lambda self, batch: real(self, batch) * (float("nan") if self.leg.step == 5 else 1.0))
    assert main(["compress", str(recipe_file)]) == 1
    message = capsys.readouterr().err
    assert "the training loss became nan at step 5 of the dense network" in message
    assert "log.txt" in message
    assert "Lower the learning rate (train.optimizer.lr = 0.05)" in message
    assert "became nan" in (tmp_path / "out" / "log.txt").read_text()
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"thesis.txt": "mine"}, "holds other files \\('thesis.txt'\\)"),
        ({"result.json": "{}", "recipe.yaml": ""}, "holds a run already, complete"),
        ({"recipe.yaml": ""}, "holds a run already, unfinished.*--resume"),
        ({"recipe.yaml": "", "checkpoint/1-000000001/state.pt": ""}, "holds an unfinished run.*--resume"),
    ],
)
def test_nothing_that_lies_there_is_overwritten(recipe_file, tmp_path, files, message, monkeypatch):
    monkeypatch.setattr(training.Training, "run", lambda *_: pytest.fail("training was started"))
    for name, text in files.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = files_of(tmp_path / "out")
    with pytest.raises(GetaError, match=message):
        run_recipe(read_recipe(recipe_file))
    assert files_of(tmp_path / "out") == before


def test_half_written_folders_are_refused_with_a_reason(tmp_path):
    with pytest.raises(GetaError, match="there is no run to resume"):
        resume(tmp_path)
    (tmp_path / "recipe.yaml").write_text("version: 1\nname: [")
    with pytest.raises(ConfigError, match=r"recipe\.yaml, line 2"):
        resume(tmp_path)


def test_the_saved_model_is_the_one_that_was_measured(recipe_file, tmp_path, capsys):
    found = run_recipe(read_recipe(recipe_file, ["baseline=false", "steps=20"]))
    assert found is not None
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["value"] == found["metric"]["compact"]
    assert main(["evaluate", str(tmp_path / "out" / "compact"), "--config", str(recipe_file)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert geta.load(tmp_path / "out" / "compact").info.kept
