"""Do exported files compute the network that was trained? `python -m bench.export_parity [--only GLOB]`.

Each model of the zoo's part named below gets 8-bit weights and activations, loses half of its groups, and is exported as ONNX with
integers, as ONNX in floats and as .pt2. Compared with PyTorch's fake quantization, on the example inputs:

- **steps**: the largest difference of an activation quantizer's codes, in quantization steps, where PyTorch is given the runtime's own
  codes before it (`geta.export.parity`); **results** the same way, relative to the largest value. A sum on a rounding boundary may go
  either way, so one step is the bound, and 1e-4 for results.
- **end to end**: results without such help. After a code that fell on the other side, everything behind it computes with another number.
- **floats**, **.pt2**: results of the other two files, relative. The .pt2 file recomputes the same codes with the same operators.
- Files are run in a process of their own: the ONNX ones with onnxruntime and numpy alone, the .pt2 one with torch and without geta.
  **same**: the integers' file gave there, bit for bit, what it gave here.

Resumable: records in bench/results/export_parity/. Writes bench/results/export_parity_<date>.md.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import glob
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import geta
from geta.export.parity import parity
from geta.quant import quantizers
from geta.report.files import write_atomically
from geta.subnet.comparison import max_difference

from .facts import RESULTS, dated, machine, results_folder, table, versions
from .zoo.catalogue import catalogue, find
from .zoo.check import Record
from .zoo.entry import Entry
from .zoo.parts import Inputs, WrongError, outputs
from .zoo.perturb import perturb
from .zoo.quantized import unquantizable
from .zoo.run import Run, due, run_all

CHOSEN = (
    "own/*",
    *(f"torchvision/{name}" for name in ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3")),
    *(f"torchvision/{name}" for name in ("mnasnet1_0", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnet50")),
    *(
        f"torchvision/{name}"
        for name in ("shufflenet_v2_x1_0", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_16", "lraspp_mobilenet_v3_large")
    ),
    *(f"transformers/{name}" for name in ("bert", "roberta", "distilbert", "electra", "deberta_v2", "albert", "gpt2", "gpt_neox", "opt")),
    *(
        f"transformers/{name}"
        for name in ("llama", "mistral", "qwen3", "gemma2", "gemma3", "phi", "phi3", "stablelm", "falcon_new", "bloom")
    ),
    *(f"transformers/{name}" for name in ("t5", "bart", "marian", "vit", "deit", "beit", "swin", "pvt", "convnext", "segformer", "detr")),
    *(f"transformers/{name}" for name in ("clip", "siglip", "sam", "whisper", "wav2vec2")),
    *(f"diffusers/{name}" for name in ("unet2d", "dit")),
)
STEPS, RESULTS_GAP = 1.001, 1e-4
"""One step is allowed; the rest is rounding of the product of step and code in float32."""
_LIMIT = 900.0
_HEADER = ("model", "integer layers", "in floats", "steps", "flips", "results", "end to end", "floats", ".pt2", "same", "notes")
_ONNX = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", options, providers=["CPUExecutionProvider"])
given = numpy.load(sys.argv[1] + "/inputs.npz")
names = [value.name for value in session.get_inputs()]
results = session.run(None, {name: given[str(place)] for place, name in enumerate(names)})
numpy.savez(sys.argv[1] + "/results.npz", *results)
assert "torch" not in sys.modules and "geta" not in sys.modules
"""
_PT2 = """
import json, sys, numpy, torch
sys.modules["geta"] = None
torch.set_num_threads(1)
given = numpy.load(sys.argv[1] + "/inputs.npz")
tensors = (torch.from_numpy(given[str(n)]) for n in range(len(given.files)))
with open(sys.argv[1] + "/leaves.json") as plain:  # values that aren't tensors are inputs as well
    leaves = [next(tensors) if leaf == "tensor" else leaf for leaf in json.load(plain)]
with torch.no_grad():
    results = torch.export.load(sys.argv[1] + "/model.pt2").module()(*leaves)
leaves = torch.utils._pytree.tree_leaves(results)
numpy.savez(sys.argv[1] + "/results.npz", *(leaf.numpy() for leaf in leaves if isinstance(leaf, torch.Tensor)))
"""


def compressed(entry: Entry) -> tuple[geta.CompactModel, Inputs]:
    """Quantized to 8 bits and without half of its groups."""
    model, args, kwargs = entry.build()
    perturb(model, args, kwargs)
    graph = geta.analyze(model, args, kwargs)
    batch: Any = dict(kwargs) if kwargs and not args else args
    geta.quantize(
        model,
        weights=8,
        activations=8,
        exclude=[glob.escape(path) for path in unquantizable(model, args, kwargs)],
        calibration=[copy.deepcopy(batch)],
        results_of=graph,
    )
    for quantizer in quantizers(model).values():
        quantizer.round_bits_()
    selection = graph.random_selection(0.5, seed=0)
    graph.zero_(model, selection)
    return geta.compact(model, graph, selection).eval(), (args, kwargs)


def in_child(pipe: Connection, name: str, threads: int) -> None:
    """What a forked process does: compare, send the record."""
    torch.set_num_threads(threads)
    pipe.send(compare(find(name)))


def compare(entry: Entry, *, debug: bool = False) -> dict[str, Any]:
    """All formats of one model; a part that fails is recorded with its error and the others go on."""
    record = Record(entry.name, debug=debug)
    made = record.run("compress", lambda: compressed(entry))
    if made is None:
        return record.to_json()
    small, inputs = made
    expected = outputs(small, inputs)
    everything = small.flattened(*inputs)
    leaves = [leaf for leaf in everything if isinstance(leaf, Tensor)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given: dict[str, Any] = {str(place): leaf.numpy() for place, leaf in enumerate(leaves)}
        np.savez(folder / "inputs.npz", **given)
        (folder / "leaves.json").write_text(json.dumps(["tensor" if isinstance(leaf, Tensor) else leaf for leaf in everything]))

        def integers() -> dict[str, Any]:
            report = small.export_onnx(folder / "model.onnx")
            return {"integer": len(report.integer), "floating": report.floating}

        def codes() -> dict[str, Any]:
            found = parity(small, small.flattened(*inputs))
            figures = {"steps": found.largest_step, "flips": found.flips, "results": found.output, "end_to_end": found.end_to_end}
            if found.largest_step > STEPS or found.output > RESULTS_GAP:
                raise WrongError(f"codes are {found.largest_step:g} steps off, results {found.output:.1e}", **figures)
            return figures

        def alone() -> dict[str, Any]:
            here = _here(folder, leaves)
            there = _elsewhere(_ONNX, folder)
            same = all(np.array_equal(one, other, equal_nan=True) for one, other in zip(here, there, strict=True))
            if not same:
                raise WrongError("a process with onnxruntime alone gave other numbers")
            return {"same": same}

        def floats() -> dict[str, Any]:
            small.export_onnx(folder / "model.onnx", integers=False)
            return {"gap": _gap(expected, _elsewhere(_ONNX, folder))}

        def pt2() -> dict[str, Any]:
            small.export_pt2(folder / "model.pt2")
            return {"gap": _gap(expected, _elsewhere(_PT2, folder))}

        for part in (integers, codes, alone, floats, pt2):
            record.run(part.__name__, part)
    return record.to_json()


def _here(folder: Path, leaves: Sequence[Tensor]) -> list[Any]:
    from geta.export.parity import runner

    return runner(folder / "model.onnx")(leaves)


def _elsewhere(code: str, folder: Path) -> list[Any]:
    done = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-I", "-W", "ignore", "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"code {done.returncode}")
    found = np.load(folder / "results.npz")
    return [found[name] for name in found.files]


def _gap(expected: Sequence[Tensor], found: Sequence[Any]) -> float:
    """Largest difference relative to the largest value of its tensor."""
    return max_difference([*expected], [torch.from_numpy(one) for one in found])[1]


def render(records: Sequence[Mapping[str, Any]], missing: Sequence[str]) -> list[str]:
    """The report's lines."""
    good = sum(1 for record in records if record["ok"])
    steps = [part["steps"] for record in records if "steps" in (part := record["parts"].get("codes", {}))]
    worst = f"of {len(steps)} compared code by code, the worst is {max(steps, default=0.0):g} step(s) off"
    lines = [f"{good} of {len(records)} models without a failure; {worst}."]
    if missing:
        lines.append(f"Not measured yet: {', '.join(missing)}.")
    return [
        *lines,
        "",
        (__doc__ or "").split("\n\n", 1)[1].rsplit("\n\n", 1)[0],
        "",
        *table(_HEADER, [_cells(record) for record in records], left=(0, 10)),
    ]


def _cells(record: Mapping[str, Any]) -> list[str]:
    parts = record["parts"]
    ints, codes = parts.get("integers", {}), parts.get("codes", {})
    notes = [f"{name}: {part['error']}" for name, part in parts.items() if not part["ok"]]
    kinds = sorted(set(ints.get("floating", {}).values()))
    gaps = [f"{parts[name]['gap']:.1e}" if "gap" in parts.get(name, {}) else "" for name in ("floats", "pt2")]
    numbers = [
        f"{codes[key]:{form}}" if key in codes else ""
        for key, form in (("steps", "g"), ("flips", ".1e"), ("results", ".1e"), ("end_to_end", ".1e"))
    ]
    return [
        record["name"],
        str(ints.get("integer", "")),
        str(len(ints.get("floating", {}))),
        *numbers,
        *gaps,
        "yes" if parts.get("alone", {}).get("same") else "",
        "; ".join([*notes, *(f"in floats: {kind}" for kind in kinds)]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help="names among the chosen ones, e.g. 'own/*'")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="compare again what has a record")
    parser.add_argument("--failed", action="store_true", help="compare again what has a record of a failure")
    parser.add_argument("--out", type=results_folder, default=RESULTS)
    options = parser.parse_args()
    run = Run(options.out / "export_parity", options.jobs, limit=_LIMIT, target=in_child)
    entries = [entry for name, entry in catalogue().items() if any(fnmatch.fnmatchcase(name, pattern) for pattern in CHOSEN)]
    chosen = [entry for entry in entries if fnmatch.fnmatchcase(entry.name, options.only)]
    if not chosen:
        parser.error(f"no chosen model is called '{options.only}'; python -m bench.zoo.catalogue lists the zoo's")
    run_all(run, due(run, chosen, fresh=options.fresh, failed=options.failed))
    known = {entry.name: run.record(entry.name) for entry in entries}
    facts = f"{versions('torch', 'onnxruntime', 'transformers', 'geta')}; {machine()}."
    lines = render([one for one in known.values() if one], [name for name, one in known.items() if one is None])
    path = dated("export_parity", folder=options.out)
    write_atomically(path, "\n".join(["# Parity of exported files", "", facts, *lines, ""]).encode())
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
