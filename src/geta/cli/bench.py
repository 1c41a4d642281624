"""`geta bench DIR`: how long a saved compact model takes, beside the dense one, in every runtime that is installed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geta.cli.analyze import parse_shape
from geta.cli.options import Debug, saved_model
from geta.cli.output import JsonFile, Output, check_outside
from geta.errors import ConfigError
from geta.hints import choose

if TYPE_CHECKING:
    from rich.table import Table

    from geta.report.runtimes import Measured


def bench_command(
    *,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved compact model, or the folder of a run.", show_default=False)],
    dense: Annotated[
        str | None, typer.Option(metavar="TARGET", help="The network it came from: python.path:factory, timm:NAME or hf:CONFIG.")
    ] = None,
    input_shape: Annotated[str | None, typer.Option(help="Shape of one random input of TARGET, batch first, e.g. 1,3,224,224.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; repeatable. Default: 1 and 8.", show_default=False)] = None,
    threads: Annotated[int, typer.Option(help="Threads of every runtime.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed rounds; every candidate runs once in each.")] = 30,
    runtime: Annotated[
        list[str] | None, typer.Option(help="eager, compile, onnx or openvino; repeatable. Default: all.", show_default=False)
    ] = None,
    json: JsonFile = None,
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Time a saved compact model in PyTorch, torch.compile, ONNX Runtime and OpenVINO, as far as they are installed."""
    _check_numbers(batch or (), threads, rounds)
    if input_shape is not None and dense is None:
        raise ConfigError("--input-shape is about the network of --dense: leave it out, or name that network")
    shape = None if input_shape is None else parse_shape(input_shape)

    import geta
    from geta.cli.targets import resolve_target
    from geta.report.files import folder_bytes
    from geta.report.runtimes import RUNTIMES, measure

    runtimes = [choose("--runtime", one, RUNTIMES) for one in runtime or RUNTIMES]
    folder = saved_model(folder)
    check_outside(folder, json, "--json")
    output = Output(json)
    model = geta.load(folder)
    target = None if dense is None else resolve_target(dense, shape)
    with tempfile.TemporaryDirectory() as files:
        found = measure(
            model,
            None if target is None else target.model,
            folder=Path(files),
            args=() if target is None else target.args,
            kwargs={} if target is None else target.kwargs,
            batches=batch or (1, 8),
            threads=threads,
            rounds=rounds,
            runtimes=runtimes,
        )
    size = folder_bytes(folder)
    output.line(f"{folder}: {size:,} bytes on disk; {threads} thread(s), {rounds} rounds")
    output.console().print(latency_table(found))
    for name, reason in found.missing.items():
        output.line(f"not measured: {name}: {reason}")
    facts = {"format": 1, "folder": str(folder), "bytes_on_disk": size, "threads": threads, "rounds": rounds}
    output.finish({**facts, **found.to_json()}, "times")


def _check_numbers(batches: Sequence[int], threads: int, rounds: int) -> None:
    """Raise ConfigError for a number below 1."""
    for option, number in (*(("--batch", size) for size in batches), ("--threads", threads), ("--rounds", rounds)):
        if number < 1:
            raise ConfigError(f"{option} is {number}; it must be at least 1")


def latency_table(found: Measured) -> Table:
    """A row per batch size and candidate: median, 95th percentile, ratio to the dense network in ONNX Runtime, or else in PyTorch."""
    from rich.table import Table

    table = Table(title="Milliseconds per call", title_justify="left")
    for heading in ("batch", "network"):
        table.add_column(heading, justify="right" if heading == "batch" else "left")
    for heading in ("median", "p95", "times faster"):
        table.add_column(heading, justify="right", no_wrap=True)
    names = sorted(next(iter(found.latency.values()), {}), reverse=True)
    base = next((name for name in ("dense, ONNX Runtime, floats", "dense, PyTorch") if name in names), None)
    for batch, times in found.latency.items():
        for name in names:
            ratio = "" if base is None else f"{times[base].median / times[name].median:.2f}"
            table.add_row(str(batch), name, f"{times[name].median:.3f}", f"{times[name].p95:.3f}", ratio, end_section=name == names[-1])
    if base is not None:
        table.caption = f"times faster: than {base}"
        table.caption_justify = "left"
    return table
