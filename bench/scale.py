"""How large a model the analysis takes: language models of 7 to 70 billion parameters without weights, `python -m bench.scale`.

Every model is built on the meta device and analysed in a process of its own, example ids [1, 16]; then its costs are counted and the
memory of training it on 8 GPUs is planned. Prints a table, then writes
bench/results/scale_<date>.md and, with the time over the number of layers, scale_<date>.svg. `--only GLOB` picks models;
`--one NAME` is what the processes run.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geta.report.files import write_atomically

from .facts import RESULTS, dated, machine, results_folder, table, versions

ROOT = Path(__file__).resolve().parents[1]
SEQUENCE, TOKENS, GPUS = 16, 4096, 8
_GROWTH = (2, 4, 8, 16, 32)
_LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
_LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
_LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
_QWEN_8B = {**_LLAMA_8B, "intermediate_size": 12288, "head_dim": 128, "vocab_size": 151936}
_MIXTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8}
_HEADER = (
    *("model", "layers", "parameters", "build, s", "capture, s", "analysis, s", "capture + analysis, s", "costs, s"),
    *("families and costs, CPU s", "memory plan, s", "whole process, s", "peak, GB", "peak with plan, GB"),
    *("nodes", "groups", "prunable families", "families"),
)


@dataclass(frozen=True)
class Config:
    """A configuration of `transformers`, by class name and keywords; shown: whether its costs and its plan are printed whole."""

    name: str
    layers: int
    options: Mapping[str, int] = field(hash=False)
    kind: str = "Llama"
    shown: bool = False


MODELS = (
    *(Config(f"llama-7b-wide-{layers}-layers", layers, _LLAMA_7B) for layers in _GROWTH[:-1]),
    Config("llama-7b", _GROWTH[-1], _LLAMA_7B),
    Config("llama-8b", 32, _LLAMA_8B),
    Config("qwen3-8b", 36, _QWEN_8B, "Qwen3", shown=True),
    Config("mixtral-8x7b", 32, _MIXTRAL, "Mixtral"),
    Config("llama-70b", 80, _LLAMA_70B),
)


@dataclass(frozen=True)
class Line:
    """A least-squares line y = slope * x + offset, and the share r2 of the variance of y that it explains."""

    slope: float
    offset: float
    r2: float


def least_squares(x: Sequence[float], y: Sequence[float]) -> Line:
    """Fit y = slope * x + offset; raises ValueError when all x are equal or there are fewer than two."""
    if len(x) != len(y) or len(set(x)) < 2:
        raise ValueError(f"a line needs two different x and a y for each; got x = {list(x)} and {len(y)} y")
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    offset = mean_y - slope * mean_x
    total = sum((b - mean_y) ** 2 for b in y)
    rest = sum((b - offset - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return Line(slope, offset, 1 - rest / total if total else 1.0)


def measure(config: Config) -> dict[str, Any]:
    """Build and analyse one model in this process, count its costs and plan its training; seconds, bytes and counts."""
    import torch
    import transformers

    import geta
    from geta.cost.outlook import outlook

    from .clock import timed_analysis
    from .zoo.shim import declare_torchvision_operators

    declare_torchvision_operators()  # transformers imports torchvision where there is one
    started = time.perf_counter()
    kind = getattr(transformers, f"{config.kind}Config")
    chosen = kind(**{"vocab_size": 32000, **config.options}, num_hidden_layers=config.layers, use_cache=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(chosen, dtype=torch.bfloat16).eval()
        ids = torch.zeros(1, SEQUENCE, dtype=torch.long)
    built = time.perf_counter() - started
    graph, capture_seconds, analysis_seconds = timed_analysis(model, (), {"input_ids": ids})
    assert isinstance(graph, geta.DependencyGraph)
    started = time.perf_counter()
    counted = outlook(graph)
    costs, started = time.perf_counter() - started, time.perf_counter()
    analysed_peak, processor = peak_bytes(), time.process_time()
    with torch.device("meta"):
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    plan = geta.memory_plan(
        graph,
        torch.optim.AdamW,
        kwargs={"input_ids": tokens},
        gpus=GPUS,
        weight_bits=(4, 8),
        dtype=torch.float32,
        compute_dtype=torch.bfloat16,
    )
    return {
        "name": config.name,
        "layers": config.layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "build": built,
        "capture": capture_seconds,
        "analysis": analysis_seconds,
        "costs": costs,
        "processor": processor,
        "plan": time.perf_counter() - started,
        "outlook": str(counted),
        "memory": str(plan),
        "shown": config.shown,
        "peak_bytes": analysed_peak,
        "plan_peak_bytes": peak_bytes(),
        "nodes": len(graph.analysis.capture.graph.nodes),
        "groups": graph.num_groups,
        "prunable_families": len(graph.prunable_families),
        "families": len(graph.families),
    }


def peak_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The most memory that this process ever held; unlike getrusage it doesn't count what the parent held before exec."""
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def in_a_process(config: Config, threads: int) -> dict[str, Any]:
    """Measure in a new interpreter; a failure is a record with the last line of its error."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(  # noqa: S603 - our own interpreter and module
        [sys.executable, "-m", "bench.scale", "--one", config.name],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    whole = time.perf_counter() - started
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"name": config.name, "layers": config.layers, "error": lines[-1], "whole": whole}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "whole": whole}


def cells(record: Mapping[str, Any]) -> list[str]:
    """One row of the table."""
    if "error" in record:
        return [record["name"], str(record["layers"]), f"**failed**: {record['error']}", *[""] * (len(_HEADER) - 3)]
    seconds = [record["build"], record["capture"], record["analysis"], record["capture"] + record["analysis"]]
    seconds += [record["costs"], record["processor"], record["plan"], record["whole"]]
    counts = [record["nodes"], record["groups"], record["prunable_families"], record["families"]]
    return [
        *(record["name"], str(record["layers"]), f"{record['parameters'] / 1e9:.2f} G"),
        *(f"{value:.2f}" for value in seconds),
        *(f"{record[key] / 1e9:.2f}" for key in ("peak_bytes", "plan_peak_bytes")),
        *(f"{count:,}" for count in counts),
    ]


def growth(records: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(layers, seconds of capture and analysis) of the models that differ in nothing but their number of layers."""
    names = {config.name for config in MODELS if config.options is _LLAMA_7B}
    good = [record for record in records if record["name"] in names and "error" not in record]
    return sorted((record["layers"], record["capture"] + record["analysis"]) for record in good)


def caption(line: Line, points: Sequence[tuple[int, float]]) -> str:
    """What the figure shows, in one sentence."""
    return (
        f"Capture and analysis of a Llama of 7B width at {', '.join(str(layers) for layers, _ in points)} layers: "
        f"least-squares line {line.slope:.3f} s per layer + {line.offset:.2f} s, R² = {line.r2:.4f}."
    )


def draw(points: Sequence[tuple[int, float]], line: Line) -> bytes:
    """The figure as SVG; the same bytes for the same points."""
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "geta"
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    layers = [layers for layers, _ in points]
    axes.plot(layers, [seconds for _, seconds in points], "o", label="measured")
    axes.plot(layers, [line.slope * x + line.offset for x in layers], label=f"least squares, R² = {line.r2:.4f}")
    axes.set(xlabel="decoder layers", ylabel="capture + analysis, seconds", xlim=(0, None), ylim=(0, None))
    axes.set_title("Time of the analysis over depth (Llama, 7B width, meta device)", fontsize=10)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def render(records: Sequence[Mapping[str, Any]], facts: str, figure: str | None, line: Line | None) -> str:
    """The report; figure: file name of the plot, None without one."""
    lines = [
        "# Analysis of large language models",
        "",
        facts,
        "",
        f"Configurations of `transformers` in bfloat16 on the meta device (no weights), example ids [1, {SEQUENCE}], vocabulary",
        "32,000 (those of 8B: their own), each in a process of its own. *Capture* is `torch.export` and what surrounds it, *analysis*",
        "all the rest of `geta.analyze`, *costs* what `geta analyze` prints of them. *CPU* is the processor time of all this with starting",
        "Python and importing torch and transformers, which other jobs stretch less. *Memory plan* is `geta.memory_plan` of QASSO and",
        f"AdamW with quantized weights on {GPUS} GPUs with ids [1, {TOKENS}], which captures the model again. *Whole process* is all of",
        "it, *peak* the largest resident memory (VmHWM), before the plan and after it.",
        "",
        *table(_HEADER, [cells(record) for record in records]),
    ]
    if figure is not None and line is not None:
        points = growth(records)
        rows = [[str(layers), f"{seconds:.2f}", f"{line.slope * layers + line.offset:.2f}"] for layers, seconds in points]
        lines += ["", "## Growth with layers", "", f"![Time over layers]({figure})", "", caption(line, points), ""]
        lines += table(("layers", "capture + analysis, s", "line, s"), rows)
    for record in records:
        if record.get("shown"):
            text = [record["outlook"], "", record["memory"]]
            lines += ["", f"## Costs and memory of {record['name']}", "", "```", *text, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help=f"of {', '.join(config.name for config in MODELS)}")
    parser.add_argument("--one", metavar="NAME", help="measure this one here and print a JSON record")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=results_folder, default=RESULTS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(next(config for config in MODELS if config.name == options.one))))
        return 0
    chosen = [config for config in MODELS if fnmatch.fnmatchcase(config.name, options.only)]
    if not chosen:
        parser.error(f"no model is called '{options.only}'")
    records = []
    for config in chosen:
        records.append(in_a_process(config, options.threads))
        print("  ".join(f"{name} {value}" for name, value in zip(_HEADER, cells(records[-1]), strict=True) if value), flush=True)
    points, figure, line = growth(records), None, None
    if len(points) > 1:
        line = least_squares(*zip(*points, strict=True))
        picture = dated("scale", ".svg", options.out)
        write_atomically(picture, draw(points, line))
        figure = picture.name
    facts = f"Measured on {machine()}, {options.threads} threads; {versions('torch', 'transformers', 'geta')}."
    path = dated("scale", folder=options.out)
    write_atomically(path, render(records, facts, figure, line).encode())
    print(path)
    return 1 if any("error" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
