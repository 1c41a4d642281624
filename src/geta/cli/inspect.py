"""`geta inspect DIR`: what is in a saved compact model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geta.cli.options import Debug, saved_model
from geta.cli.output import JsonFile, Output, check_outside

if TYPE_CHECKING:
    from rich.table import Table

    from geta.subnet import CompactModel


_INPUT, _OUTPUT = ":input", ":output"


def inspect_command(
    *,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved compact model, or the folder of a run.", show_default=False)],
    json: JsonFile = None,
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Show a saved compact model: its costs, the bit width of every quantized tensor, and what is left of every family."""
    import geta
    from geta.report.files import folder_bytes

    folder = saved_model(folder)
    check_outside(folder, json, "--json")
    output = Output(json)
    model = geta.load(folder)
    size = folder_bytes(folder)
    output.line(f"{folder}: {size:,} bytes on disk")
    console = output.console()
    for table in (cost_table(model), bits_table(model.bits), kept_table(model)):
        console.print(table)
    for note in model.info.notes:
        output.line(f"note: {note}")
    output.finish({"format": 1, "folder": str(folder), "bytes_on_disk": size, **record(model)}, "facts")


_COSTS = (("parameters", "params"), ("MACs", "macs"), ("BOPs", "bops"), ("weights, bytes", "weight_bytes"))


def record(model: CompactModel) -> dict[str, Any]:
    """What the tables show, as plain data: docs/commands.md lists the keys."""
    dense, difference = model.info.dense_cost, model.info.max_difference
    keys = [key for _, key in _COSTS]
    return {
        "cost": {
            "compact": {key: getattr(model.cost, key) for key in keys},
            "dense": None if dense is None else {key: dense[key] for key in keys},
        },
        "bits": model.bits,
        "families": {
            name: {"kept": len(kept), "of": model.info.family_sizes[name], "indices": list(kept)} for name, kept in model.info.kept.items()
        },
        "max_difference": difference if math.isfinite(difference) else None,
        "precision": model.info.precision,
        "notes": list(model.info.notes),
    }


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
    for label, key in _COSTS:
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
