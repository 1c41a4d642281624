"""`geta inspect DIR`: what is in a saved compact model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from geta.cli.options import Debug

if TYPE_CHECKING:
    from rich.table import Table

    from geta.subnet import CompactModel


_INPUT, _OUTPUT = ":input", ":output"


def inspect_command(
    *,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that a compact model was saved in.", show_default=False)],
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Show a saved compact model: its costs, the bit width of every quantized tensor, and what is left of every family."""
    from rich.console import Console

    import geta
    from geta.report.files import folder_bytes

    model = geta.load(folder)
    console = Console()
    console.print(f"{folder}: {folder_bytes(folder):,} bytes on disk", highlight=False, markup=False)
    console.print(cost_table(model))
    console.print(bits_table(model.bits))
    console.print(kept_table(model))
    for note in model.info.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def cost_table(model: CompactModel) -> Table:
    """Costs of the compact model on the input it was built with, and of the dense model it came from when that is on record."""
    from rich.table import Table

    table = Table(title="Costs", title_justify="left")
    table.add_column("")
    table.add_column("compact", justify="right")
    dense = model.info.dense_cost or {}
    if dense:
        table.add_column("dense", justify="right")
        table.add_column("compact / dense", justify="right")
    for label, key in (("parameters", "params"), ("MACs", "macs"), ("BOPs", "bops"), ("weights, bytes", "weight_bytes")):
        compact = getattr(model.cost, key)
        compared = (f"{dense[key]:,.0f}", f"{compact / dense[key]:.2%}") if dense.get(key) else ()
        table.add_row(label, f"{compact:,.0f}", *compared)
    return table


def bits_table(bits: Mapping[str, int]) -> Table:
    """Bit width of every quantized weight, beside that of the activation that enters the same module."""
    from rich.table import Table

    table = Table(title="Bit widths", title_justify="left", caption=None if bits else "nothing is quantized", caption_justify="left")
    for heading in ("tensor", "bits", "input bits"):
        table.add_column(heading, justify="left" if heading == "tensor" else "right")
    inputs = {name.removesuffix(_INPUT): width for name, width in bits.items() if name.endswith(_INPUT)}
    for name, width in bits.items():
        if name.endswith(_OUTPUT):
            table.add_row(f"{name.removesuffix(_OUTPUT)} (result)", str(width), "")
        elif not name.endswith(_INPUT):
            table.add_row(name, str(width), str(inputs.pop(name.rpartition(".")[0], "")))
    for module, width in inputs.items():
        table.add_row(module, "", str(width))
    return table


def kept_table(model: CompactModel) -> Table:
    """How many groups of every family are left."""
    from rich.table import Table

    table = Table(title="Kept groups", title_justify="left")
    for heading in ("family", "kept", "of"):
        table.add_column(heading, justify="left" if heading == "family" else "right")
    for family, indices in model.kept.items():
        table.add_row(family, str(len(indices)), str(model.info.family_sizes[family]))
    return table
