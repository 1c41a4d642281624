"""`geta latency TARGET`: which families of a network are worth pruning on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geta.cli.analyze import parse_shape
from geta.cli.options import Debug
from geta.cli.output import JsonFile, Output, check_file
from geta.errors import ConfigError
from geta.hints import choose

if TYPE_CHECKING:
    from geta.graph import DependencyGraph


def latency_command(  # noqa: PLR0913 - one parameter per option
    *,
    target: Annotated[str, typer.Argument(help="python.path:factory, timm:NAME or hf:CONFIG_OR_PATH.", show_default=False)],
    input_shape: Annotated[str | None, typer.Option(help="Shape of one random input, batch first, e.g. 1,3,224,224.")] = None,
    runtime: Annotated[str, typer.Option(help="onnx (ONNX Runtime) or eager (PyTorch).")] = "onnx",
    integers: Annotated[bool, typer.Option("--integers", help="Measure with weights and activations of 8 bits.")] = False,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time to spend on timing, about.")] = 15.0,
    multiple_of: Annotated[str, typer.Option(help="Groups kept: a number, or a device profile such as avx512-vnni.")] = "1",
    table: Annotated[Path | None, typer.Option(help="Write the latency table to this JSON file, for geta.LatencyTable.load.")] = None,
    json: JsonFile = None,
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Time the layers of a network by shape, and print what pruning each family would save here."""
    choose("--runtime", runtime, ("onnx", "eager"))
    for option, number in (("--batch", batch), ("--threads", threads)):
        if number < 1:
            raise ConfigError(f"{option} is {number}; it must be at least 1")
    if not seconds > 0:
        raise ConfigError(f"--seconds is {seconds}; it must be more than 0")
    shape = None if input_shape is None else parse_shape(input_shape)

    import geta
    from geta.cli.targets import resolve_target
    from geta.devices import resolve_multiple
    from geta.report.latency_families import SHARES, family_savings, savings_table
    from geta.report.latency_table import measure_layers

    multiple = int(multiple_of) if multiple_of.lstrip("-").isdecimal() else multiple_of
    resolve_multiple(multiple)
    check_file(table, "--table")
    output = Output(json)
    found = resolve_target(target, shape)
    graph = geta.analyze(found.model, found.args, found.kwargs)
    if integers:
        _quantize(graph)
    measured = measure_layers(
        graph, runtime=runtime, precision="integers" if integers else "floats", batch=batch, threads=threads, seconds=seconds
    )
    savings, uncut = family_savings(graph, measured, multiple_of=multiple), measured.networks["uncut"]["predicted"]
    output.line(savings_table(savings, measured, uncut))
    for note in measured.notes:
        output.line(f"note: {note}")
    if table is not None:
        measured.save(table)
        output.line(f"\nlatency table written to {table}")
    record = {
        "format": 1,
        "measured": measured.words,
        "uncut_ms": uncut,
        "multiple_of": multiple,
        "shares": list(SHARES),
        "families": [saving.to_json() for saving in savings],
        "notes": list(measured.notes),
    }
    output.finish(record, "savings")


def _quantize(graph: DependencyGraph) -> None:
    """Quantizers as they would be for integer kernels; values don't matter for times."""
    import geta

    example = graph.example
    batches = [dict(example.kwargs) if example.kwargs and not example.args else example.args]
    geta.quantize(graph.model, weights=geta.Bits(8, 8), activations=geta.Bits(8, 8), calibration=batches, results_of=graph)
