"""`geta export DIR`: a saved compact model as a file that other runtimes run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geta.cli.options import Debug
from geta.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from geta.export.onnx import OnnxReport
    from geta.subnet import CompactModel


class Format(StrEnum):
    ONNX = "onnx"
    PT2 = "pt2"


class OpenSizes(StrEnum):
    BATCH = "batch"
    ALL = "all"
    NONE = "none"


def export_command(
    *,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that a compact model was saved in.", show_default=False)],
    form: Annotated[Format, typer.Option("--format", help="ONNX with integer weights, or PyTorch's .pt2.")] = Format.ONNX,
    out: Annotated[
        Path | None, typer.Option(help="File to write; default: model.onnx or model.pt2 beside DIR.", show_default=False)
    ] = None,
    floats: Annotated[bool, typer.Option("--float", help="ONNX only: compute in float32, rounding spelled out.")] = False,
    dynamic: Annotated[OpenSizes, typer.Option(help="Sizes that stay open: of the batch, all, or none.")] = OpenSizes.BATCH,
    signed_weights: Annotated[
        bool, typer.Option("--int8-weights", help="ONNX only: 8-bit weights as int8, faster on CPUs with dot-product instructions.")
    ] = False,
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Write a saved compact model as one file that runs without geta."""
    from rich.console import Console

    import geta

    if form is Format.PT2 and (floats or signed_weights):
        raise ConfigError(f"{'--float' if floats else '--int8-weights'} is about ONNX files and the format is pt2: leave it out")
    model = geta.load(folder)
    target = folder.absolute().parent / f"model.{form}" if out is None else out
    console = Console()
    if form is Format.PT2:
        size = model.export_pt2(target, dynamic=dynamic.value)
        console.print(f"{target}: {size:,} bytes", highlight=False, markup=False, soft_wrap=True)
        return
    report = model.export_onnx(target, integers=not floats, dynamic=dynamic.value, uint8_weights=not signed_weights)
    _show(console, model, report, integers=not floats)


def _show(console: Console, model: CompactModel, report: OnnxReport, *, integers: bool) -> None:
    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    line(f"{report.path}: {report.bytes:,} bytes, opset 21; inputs {', '.join(report.inputs)}; outputs {', '.join(report.outputs)}")
    line("open sizes: " + (", ".join(f"{name} {dims}" for name, dims in report.dynamic.items()) or "none"))
    if report.folded:
        line(f"batch norms folded: {len(report.folded)}")
    if not integers or not model.bits:
        return
    line(f"layers that integer kernels can run: {len(report.integer)} of {len(report.integer) + len(report.floating)}")
    for path, reason in report.floating.items():
        line(f"  {path}: {reason}")
