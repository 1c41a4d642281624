"""`geta export DIR`: a saved compact model as a file, or folder, that other runtimes read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geta.cli.options import Debug
from geta.errors import ConfigError

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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that a compact model was saved in.", show_default=False)],
    form: Annotated[
        Format,
        typer.Option("--format", help="ONNX with integer weights, PyTorch's .pt2, or the folder that servers of language models read."),
    ] = Format.ONNX,
    out: Annotated[
        Path | None,
        typer.Option(help="What to write; default: model.onnx, model.pt2 or the folder compressed-tensors beside DIR.", show_default=False),
    ] = None,
    floats: Annotated[bool, typer.Option("--float", help="ONNX only: compute in float32, rounding spelled out.")] = False,
    dynamic: Annotated[OpenSizes, typer.Option(help="ONNX and .pt2: sizes that stay open: of the batch, all, or none.")] = OpenSizes.BATCH,
    signed_weights: Annotated[
        bool, typer.Option("--int8-weights", help="ONNX only: 8-bit weights as int8, faster on CPUs with dot-product instructions.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help=".pt2 only: machine code for this processor; needs a C++ compiler.")] = False,
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Write a saved compact model as one file, or folder, that is read without geta."""
    from rich.console import Console

    import geta

    _check_options(
        form,
        {
            "--float": (floats, (Format.ONNX,)),
            "--int8-weights": (signed_weights, (Format.ONNX,)),
            "--compiled": (compiled, (Format.PT2,)),
            "--dynamic": (dynamic is not OpenSizes.BATCH, (Format.ONNX, Format.PT2)),
        },
    )
    model = geta.load(folder)
    name = "compressed-tensors" if form is Format.COMPRESSED_TENSORS else f"model.{form}"
    target = folder.absolute().parent / name if out is None else out
    console = Console()

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if form is Format.PT2:
        line(f"{target}: {model.export_pt2(target, dynamic=dynamic.value, compiled=compiled):,} bytes")
    elif form is Format.COMPRESSED_TENSORS:
        _show_packed(line, target, model.save_compressed_tensors(target))
    else:
        report = model.export_onnx(target, integers=not floats, dynamic=dynamic.value, uint8_weights=not signed_weights)
        _show(line, model, report, integers=not floats)


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
