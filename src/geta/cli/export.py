"""`geta export DIR`: a saved compact model as a file, or folder, that other runtimes read."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geta.cli.options import Debug, saved_model
from geta.cli.output import JsonFile, Output, check_outside
from geta.errors import ConfigError
from geta.hints import choose

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from geta.export.compressed_tensors import CompressedTensorsReport
    from geta.export.onnx import OnnxReport
    from geta.subnet import CompactModel


class Format(StrEnum):
    ONNX = "onnx"
    PT2 = "pt2"
    COMPRESSED_TENSORS = "compressed-tensors"


class OpenSizes(StrEnum):
    BATCH = "batch"
    ALL = "all"
    NONE = "none"


def export_command(
    *,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved compact model, or the folder of a run.", show_default=False)],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="onnx|pt2|compressed-tensors",
            autocompletion=lambda: [*Format],
            help="ONNX with integer weights, PyTorch's .pt2, or the folder that servers of language models read.",
        ),
    ] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option(help="What to write; default: model.onnx, model.pt2 or the folder compressed-tensors beside DIR.", show_default=False),
    ] = None,
    floats: Annotated[bool, typer.Option("--float", help="ONNX only: compute in float32, rounding spelled out.")] = False,
    dynamic: Annotated[
        str,
        typer.Option(
            metavar="batch|all|none",
            autocompletion=lambda: [*OpenSizes],
            help="ONNX and .pt2: sizes that stay open: of the batch, all, or none.",
        ),
    ] = "batch",
    signed_weights: Annotated[
        bool, typer.Option("--int8-weights", help="ONNX only: 8-bit weights as int8, faster on CPUs with dot-product instructions.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help=".pt2 only: machine code for this processor; needs a C++ compiler.")] = False,
    json: JsonFile = None,
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Write a saved compact model as one file, or folder, that is read without geta."""
    wanted, sizes = Format(choose("--format", form, Format)), OpenSizes(choose("--dynamic", dynamic, OpenSizes))
    _check_options(
        wanted,
        {
            "--float": (floats, (Format.ONNX,)),
            "--int8-weights": (signed_weights, (Format.ONNX,)),
            "--compiled": (compiled, (Format.PT2,)),
            "--dynamic": (sizes is not OpenSizes.BATCH, (Format.ONNX, Format.PT2)),
        },
    )

    import geta
    from geta.export.modules import check_wishes

    folder = saved_model(folder)
    check_outside(folder, json, "--json")
    check_outside(folder, out, "--out")
    output = Output(json)
    name = "compressed-tensors" if wanted is Format.COMPRESSED_TENSORS else f"model.{wanted}"
    target = folder.absolute().parent / name if out is None else out
    if wanted is not Format.COMPRESSED_TENSORS:
        check_wishes(target, sizes.value)
    model = geta.load(folder)
    facts: dict[str, Any] = {"format": 1, "folder": str(folder), "written": str(target), "as": wanted.value}
    if wanted is Format.PT2:
        facts["bytes"] = model.export_pt2(target, dynamic=sizes.value, compiled=compiled)
        output.line(f"{target}: {facts['bytes']:,} bytes")
    elif wanted is Format.COMPRESSED_TENSORS:
        packed = model.save_compressed_tensors(target)
        _show_packed(output.line, target, packed)
        facts.update(asdict(packed))
    else:
        report = model.export_onnx(target, integers=not floats, dynamic=sizes.value, uint8_weights=not signed_weights)
        _show(output.line, model, report, integers=not floats)
        facts.update({key: value for key, value in asdict(report).items() if key != "path"})
    output.finish(facts, "report")


def _check_options(form: Format, given: Mapping[str, tuple[bool, tuple[Format, ...]]]) -> None:
    """Raise ConfigError for an option that does nothing in this format. given: name -> (whether it was given, formats that it is about)."""
    for name, (used, formats) in given.items():
        if used and form not in formats:
            raise ConfigError(f"{name} is about {' and '.join(formats)} and the format is {form}: leave it out")


def _show_packed(line: Callable[[str], None], folder: Path, report: CompressedTensorsReport) -> None:
    line(f"{folder}: {report.bytes:,} bytes of tensors; {len(report.packed)} linear layers as integers")
    for name, reason in {**report.floating, **report.lost}.items():
        line(f"  {name}: {reason}")
    for note in report.notes:
        line(f"note: {note}")


def _show(line: Callable[[str], None], model: CompactModel, report: OnnxReport, *, integers: bool) -> None:
    line(f"{report.path}: {report.bytes:,} bytes, opset 21; inputs {', '.join(report.inputs)}; outputs {', '.join(report.outputs)}")
    line("open sizes: " + (", ".join(f"{name} {dims}" for name, dims in report.dynamic.items()) or "none"))
    if report.folded:
        line(f"batch norms folded: {len(report.folded)}")
    if not integers or not model.bits:
        return
    line(f"layers that integer kernels can run: {len(report.integer)} of {len(report.integer) + len(report.floating)}")
    for path, reason in report.floating.items():
        line(f"  {path}: {reason}")
    for note in report.notes:
        line(f"note: {note}")
