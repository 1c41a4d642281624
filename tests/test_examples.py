"""The examples: all of them run, what geta adds is short, and the page shows exactly that."""

from __future__ import annotations

import importlib.util
import logging
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from accelerate.state import AcceleratorState, GradientState

import geta

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
MOST_ADDED = 10

# a few steps each: enough for every stage
RUNS = {
    "pytorch": "--epochs 1 --batch-size 128",
    "accelerate": "--epochs 1 --batch-size 64 --cpu --mixed-precision bf16",
    "lightning": "--epochs 1 --batch-size 128 --accelerator cpu --out {out}",
    "distillation": "--epochs 1 --more-epochs 1 --batch-size 128",
    "hf_trainer": "--blocks 64 --epochs 1 --batch-size 4 --hidden 32 --layers 1 --block 16 --out {out}",
    "lora": "--base-steps 2 --steps 16 --block 16 --out {out}",
}
SAVED = {"lightning": "small", "hf_trainer": "small"}

pytestmark = [
    # a machine without a GPU
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found:UserWarning"),
    # Lightning's advice, and what it asks of torch 2.13
    pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The '(train|test)_dataloader' does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning"),
    # peft asks transformers for it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps one state per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def diffs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_diffs", EXAMPLES / "diffs.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run():
    assert sorted(RUNS) == sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__")


@pytest.mark.parametrize("script", ["plain", "compressed"])
@pytest.mark.parametrize("name", list(RUNS))
def test_examples_run(name, script, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = RUNS[name].format(out=out).split()
    if script == "compressed" and "--out" not in arguments:
        arguments += ["--out", str(out)]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    monkeypatch.chdir(tmp_path)
    ran = runpy.run_path(str(EXAMPLES / name / f"{script}.py"), run_name="__main__")
    assert re.search(r"accuracy|perplexity|test loss", capsys.readouterr().out)
    if script == "plain":
        assert not any(getattr(value, "__module__", "").split(".")[0] == "geta" for value in ran.values())
        return
    small = geta.load(out / SAVED.get(name, ""))
    compressor = ran["compressor"] if "compressor" in ran else ran["model"].compressor
    assert compressor.progress()["group_sparsity"] == pytest.approx(0.5, abs=0.01)
    dense = sum(
        p.numel() for n, p in compressor.model.named_parameters() if "parametrizations" not in n.split(".") or n.endswith(".original")
    )
    assert small.cost.params < 0.9 * dense
    assert (small.bits != {}) == (name != "lora")


@pytest.mark.parametrize("name", list(RUNS))
def test_geta_adds_few_lines(name):
    plain, compressed = (diffs().lines(name, script) for script in ("plain", "compressed"))
    assert 0 < len(compressed) - len(plain) <= MOST_ADDED


def test_the_page_shows_the_examples_as_they_are():
    made = diffs()
    page = made.PAGE.read_text()
    assert made.filled(page) == page, "docs/frameworks.md is older than the examples: python examples/diffs.py"
    shown = [block[2] for block in made.BLOCK.finditer(page)]
    assert sorted(shown) == sorted(RUNS)
    assert "+compressor = geta.Compressor(" in page
    changed = page.replace("+compressor = geta", "+compressor = gota")
    assert made.filled(changed) == page
