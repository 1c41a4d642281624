"""`geta latency TARGET`: which families of a network are worth pruning on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geta.cli.analyze import parse_shape
from geta.cli.options import Debug

if TYPE_CHECKING:
    from geta.graph import DependencyGraph


def latency_command(
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
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Time the layers of a network by shape, and print what pruning each family would save here."""
    import geta
    from geta.cli.targets import resolve_target
    from geta.devices import resolve_multiple
    from geta.report.files import prepare_folder
    from geta.report.latency_families import family_savings, savings_table
    from geta.report.latency_table import measure_layers

    multiple = int(multiple_of) if multiple_of.lstrip("-").isdecimal() else multiple_of
    resolve_multiple(multiple)
    if table is not None:
        prepare_folder(table.parent)
    found = resolve_target(target, None if input_shape is None else parse_shape(input_shape))
    graph = geta.analyze(found.model, found.args, found.kwargs)
    if integers:
        _quantize(graph)
    measured = measure_layers(
        graph, runtime=runtime, precision="integers" if integers else "floats", batch=batch, threads=threads, seconds=seconds
    )
    typer.echo(savings_table(family_savings(graph, measured, multiple_of=multiple), measured, measured.networks["uncut"]["predicted"]))
    for note in measured.notes:
        typer.echo(f"note: {note}")
    if table is not None:
        measured.save(table)
        typer.echo(f"\nlatency table written to {table}")


def _quantize(graph: DependencyGraph) -> None:
    """Quantizers as they would be for integer kernels; values don't matter for times."""
    import geta

    example = graph.example
    batches = [dict(example.kwargs) if example.kwargs and not example.args else example.args]
    geta.quantize(graph.model, weights=geta.Bits(8, 8), activations=geta.Bits(8, 8), calibration=batches, results_of=graph)
