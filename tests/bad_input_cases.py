"""What people get wrong on the command line: one row per command and mistake, and the folder in which all of it happens.

To add a command: write its rows, or give it to `of_folder` or `of_target` when it takes a saved model or a TARGET, and add them to ROWS.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from export_nets import compacted

ODD = os.fsdecode(b"na\xffme")
"""A name that is no UTF-8, as file systems allow it."""


@dataclass(frozen=True)
class Row:
    """arguments: of `geta`, in the folder that `furnish` made. words: in the message. nobody: run without the rights of root."""

    arguments: tuple[str, ...]
    code: int
    words: str
    nobody: bool = False

    def __str__(self) -> str:
        return " ".join(self.arguments).encode(errors="replace").decode()


FACTORIES = """
from torch import nn
def net(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
def fails(): raise RuntimeError("no weights here")
def text(): return "a model"
def needs(width): return net()
"""


def furnish(room: Path) -> None:
    """Saved models, whole and damaged in every way, factories, configurations, and files that have to survive."""
    compacted("perceptron").save(room / "small")
    for name in ("with spaces", ODD, "half", "altered", "latin", "locked", "crowded"):
        shutil.copytree(room / "small", room / name)
    (room / "half" / "model.safetensors").unlink()
    tensors = room / "altered" / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")
    (room / "latin" / "manifest.json").write_bytes(b'{"format": "\xff\xfe"}')
    (room / "locked" / "manifest.json").chmod(0)
    (room / "crowded" / "mine.txt").write_text("mine")
    (room / "empty").mkdir()
    (room / "closed").mkdir()
    (room / "closed").chmod(0o555)
    (room / "file.txt").write_text("mine")
    (room / "old.json").write_text("old")
    (room / "nets.py").write_text(FACTORIES)
    (room / "latin.py").write_bytes(b"name = '\xff'\n")
    (room / "broken.py").write_text("def net(:\n")
    (room / "locked.py").write_text(FACTORIES)
    (room / "locked.py").chmod(0)
    (room / "bad.json").write_text("{")
    (room / "broken.yaml").write_text("version: [1\n")
    (room / "latin.yaml").write_bytes(b"version: 1\nname: \xff\n")
    (room / "locked.yaml").write_text("version: 1\n")
    (room / "locked.yaml").chmod(0)
    (room / "latin.json").write_bytes(b'{"model_type": "\xff"}')
    (room / "bert.json").write_text(json.dumps({"model_type": "bret"}))


def of_any(command: str, *rest: str) -> list[Row]:
    """Mistakes that every command can meet. rest: its arguments, which are right."""
    return [
        Row((command, *rest, "--no-such-option"), 2, "there is no option '--no-such-option'"),
        Row((command, *rest, "--debg"), 2, "there is no option '--debg'; did you mean '--debug'?"),
        Row((command, *rest, "too", "much"), 2, "unexpected extra argument"),
    ]


def of_json(command: str, *rest: str) -> list[Row]:
    """Places where the JSON can't go."""
    return [
        Row((command, *rest, "--jsn", "x.json"), 2, "did you mean '--json'?"),
        Row((command, *rest, "--json"), 2, "--json"),
        Row((command, *rest, "--json", "empty"), 2, "--json 'empty' can't be written: it is a folder"),
        Row((command, *rest, "--json", "/dev/full"), 2, "--json '/dev/full' can't be written: it is no ordinary file"),
        Row((command, *rest, "--json", "file.txt/x.json"), 1, "the output folder 'file.txt' can't be written"),
        Row((command, *rest, "--json", "closed/x.json"), 1, "'closed' can't be written (Permission denied)", nobody=True),
    ]


def of_folder(command: str) -> list[Row]:
    """Mistakes with the folder of a saved model."""
    return [
        *of_any(command, "small"),
        *of_json(command, "small"),
        Row((command,), 2, "missing argument 'DIR'"),
        Row((command, ""), 1, "is not a whole saved model"),
        Row((command, "nothing"), 1, "there is no folder 'nothing'"),
        Row((command, "nothing at all"), 1, "there is no folder 'nothing at all'"),
        Row((command, f"{ODD}.not"), 1, "there is no folder"),
        Row((command, "file.txt"), 1, "'file.txt' can't be read as a folder"),
        Row((command, "empty"), 1, "'empty' is not a whole saved model: manifest.json, model.json.gz, model.safetensors missing"),
        Row((command, "half"), 1, "'half' is not a whole saved model: model.safetensors missing"),
        Row((command, "altered"), 1, "'altered/model.safetensors' was truncated or altered"),
        Row((command, "latin"), 1, "'latin/manifest.json' was truncated or altered"),
        Row((command, "crowded"), 1, "'crowded' holds files that don't belong to a saved model: mine.txt"),
        Row((command, "locked"), 1, "'locked/manifest.json' can't be read: Permission denied", nobody=True),
        Row((command, "small", "--json", "small/manifest.json"), 2, "--json 'small/manifest.json' lies in the saved model 'small'"),
    ]


def of_target(command: str) -> list[Row]:
    """Mistakes with a TARGET."""
    good = ("nets:net", "--input-shape", "2,4")
    return [
        *of_any(command, *good),
        *of_json(command, *good),
        Row((command,), 2, "missing argument"),
        Row((command, "resnet18"), 2, "TARGET 'resnet18' has no ':'"),
        Row((command, "tim:resnet18"), 2, "'tim' can't be imported: No module named 'tim'; did you mean 'timm'?"),
        Row((command, "nets:nett"), 2, "'nets' has no function or class 'nett'; did you mean 'net'?"),
        Row((command, "nets:net"), 2, "add --input-shape"),
        Row((command, "nets:net", "--input-shape", "2,four"), 2, "--input-shape '2,four' is no shape"),
        Row((command, "nets:net", "--input-shape", "2,5"), 1, "2x5"),
        Row((command, "nets:fails", "--input-shape", "2,4"), 1, "calling fails() failed with RuntimeError: no weights here"),
        Row((command, "nets:text", "--input-shape", "2,4"), 1, "returned an object of type str"),
        Row((command, "nets:needs", "--input-shape", "2,4"), 1, "a factory takes no arguments"),
        Row((command, "broken:net", "--input-shape", "2,4"), 1, "importing 'broken' failed with SyntaxError"),
        Row((command, "latin:net", "--input-shape", "2,4"), 1, "importing 'latin' failed with SyntaxError"),
        Row((command, "locked:net", "--input-shape", "2,4"), 1, "Permission denied", nobody=True),
        Row((command, "hf:no/such/config.json"), 2, "there is no file or folder 'no/such/config.json'"),
        Row((command, "hf:./with spaces"), 2, "TARGET 'hf:./with spaces'"),
        Row((command, "hf:bad.json"), 2, "TARGET 'hf:bad.json'"),
        Row((command, "hf:latin.json"), 2, "TARGET 'hf:latin.json'"),
        Row((command, "hf:bert", "--input-shape", "2,4"), 2, "--input-shape has no effect on 'hf:bert'"),
    ]


_NET = ("nets:net", "--input-shape", "2,4")
ROWS = [
    Row(("inspct",), 2, "Did you mean 'inspect'?"),
    Row(("--verbose",), 2, "there is no option '--verbose'"),
    *of_any("demo"),
    *of_folder("inspect"),
    *of_folder("export"),
    Row(
        ("export", "small", "--format", "onn"),
        2,
        "--format 'onn' is unknown: write one of onnx, pt2, compressed-tensors; did you mean 'onnx'?",
    ),
    Row(("export", "small", "--dynamic", "bach"), 2, "did you mean 'batch'?"),
    Row(("export", "small", "--format", "pt2", "--float"), 2, "--float is about onnx and the format is pt2"),
    Row(("export", "small", "--out", "no/folder/model.onnx"), 2, "there is no folder no/folder"),
    Row(("export", "small", "--out", "empty"), 2, "'empty' can't be written: it is a folder"),
    Row(("export", "small", "--out", "small/model.onnx"), 2, "--out 'small/model.onnx' lies in the saved model 'small'"),
    Row(("export", "small", "--format", "compressed-tensors", "--out", "file.txt"), 1, "file.txt"),
    Row(("export", "small", "--format", "compressed-tensors", "--out", "small"), 2, "--out 'small' lies in the saved model 'small'"),
    *of_folder("bench"),
    Row(
        ("bench", "small", "--runtime", "onxx"),
        2,
        "--runtime 'onxx' is unknown: write one of eager, compile, onnx, openvino; did you mean 'onnx'?",
    ),
    Row(("bench", "small", "--batch", "0"), 2, "--batch is 0; it must be at least 1"),
    Row(("bench", "small", "--rounds", "-1"), 2, "--rounds is -1"),
    Row(("bench", "small", "--threads", "many"), 2, "--threads"),
    Row(("bench", "small", "--input-shape", "2,4"), 2, "--input-shape is about the network of --dense"),
    Row(("bench", "small", "--dense", "nets:nett"), 2, "did you mean 'net'?"),
    *of_any("compress", "digits")[:2],
    Row(("compress",), 2, "give a RECIPE"),
    Row(("compress", "digist"), 2, "did you mean 'digits'?"),
    Row(("compress", "nothing.yaml"), 2, "nothing.yaml"),
    Row(("compress", "empty"), 2, "empty"),
    Row(("compress", "broken.yaml"), 2, "broken.yaml"),
    Row(("compress", "latin.yaml"), 2, "latin.yaml"),
    Row(("compress", "old.json"), 2, "old.json"),
    Row(("compress", "locked.yaml"), 1, "locked.yaml", nobody=True),
    Row(("compress", "digits", "train.epoch=3"), 2, "did you mean"),
    Row(("compress", "digits", "train.epochs=many"), 2, "train.epochs"),
    Row(("compress", "digits", "sparsity=1.5"), 2, "sparsity"),
    Row(("compress", "digits", "output.folder=crowded"), 1, "crowded"),
    Row(("compress", "digits", "output.folder=file.txt/run"), 1, "file.txt"),
    Row(("compress", "digits", "output.folder=closed/run"), 1, "closed", nobody=True),
    Row(("compress", "--resume", "nothing"), 1, "nothing"),
    Row(("compress", "--resume", "crowded"), 1, "crowded"),
    Row(("compress", "digits", "--resume", "nothing"), 2, "--resume goes on with the recipe"),
    Row(("compress", "digits", "--sweep", "sparsity"), 2, "--sweep"),
    Row(("evaluate",), 2, "missing argument 'DIR'"),
    Row(("evaluate", "small"), 2, "--config"),
    Row(("evaluate", "small", "--config", "digist"), 2, "did you mean 'digits'?"),
    Row(("evaluate", "nothing", "--config", "digits"), 1, "there is no folder 'nothing'"),
    Row(("evaluate", "half", "--config", "digits"), 1, "model.safetensors missing"),
    Row(("evaluate", "altered", "--config", "digits"), 1, "was truncated or altered"),
    Row(("report",), 2, "missing argument"),
    Row(("report", "nothing"), 2, "'nothing' does not exist"),
    Row(("report", "file.txt"), 2, "'file.txt' is a file, not a folder"),
    Row(("report", "empty"), 1, "'empty' is no run folder and no saved compact model"),
    Row(("report", "half"), 1, "model.safetensors missing"),
    Row(("report", "altered"), 1, "was truncated or altered"),
    Row(("report", "small", "--out", "page.pdf"), 2, "name an HTML file"),
    Row(("report", "small", "--out", "file.txt/page.html"), 1, "file.txt"),
    Row(("report", "small", "--json", "small/x.json"), 2, "--json 'small/x.json' lies in the saved model 'small'"),
    *of_target("latency"),
    Row(("latency", *_NET, "--runtime", "eagr"), 2, "did you mean 'eager'?"),
    Row(("latency", *_NET, "--seconds", "0"), 2, "--seconds is 0.0"),
    Row(("latency", *_NET, "--batch", "0"), 2, "--batch is 0"),
    Row(("latency", *_NET, "--multiple-of", "avx512-vni"), 2, "did you mean 'avx512-vnni'?"),
    Row(("latency", *_NET, "--multiple-of", "0"), 2, "multiple_of is 0"),
    Row(("latency", *_NET, "--table", "empty"), 2, "--table 'empty' can't be written: it is a folder"),
    *of_target("analyze"),
    Row(("analyze", *_NET, "--html", "empty"), 2, "--html 'empty' can't be written: it is a folder"),
    Row(("analyze", *_NET, "--html", "file.txt/x.html"), 1, "the output folder 'file.txt' can't be written"),
    Row(
        ("analyze", *_NET, "--protect", "0.wieght"),
        2,
        "protect='0.wieght' matches no tensor and no module that has one; did you mean '0.weight'",
    ),
    Row(("analyze", *_NET, "--only", "neuron"), 2, "did you mean 'neurons'?"),
    Row(("analyze", *_NET, "--granularity", "hed"), 2, "hed"),
    Row(("analyze", *_NET, "--granularity", "x*=head"), 2, "granularity: 'x*' matches no module"),
    Row(("analyze", *_NET, "--explain", "0"), 2, "--explain '0' is no question"),
    Row(("analyze", *_NET, "--explain", "0.wieght:0:0"), 2, "did you mean '0.weight'"),
    Row(("analyze", *_NET, "--explain", "0:0:99"), 2, "99"),
    Row(("analyze", *_NET, "--gpus", "2"), 2, "--gpus has no effect without --memory"),
    Row(("analyze", *_NET, "--memory", "--optimizer", "adamm"), 2, "did you mean 'adam"),
    Row(("analyze", *_NET, "--memory", "--dtype", "fp8"), 2, "--dtype 'fp8' is unknown"),
]
