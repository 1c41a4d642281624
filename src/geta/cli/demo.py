"""`geta demo`: the main job on real data, from the training loop to the files of the compact network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from geta.cli.options import Debug
from geta.errors import CheckpointError, GetaError


def demo_command(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(help="Passes over the training images, for each of the two networks.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the order of the images.")] = 0,
    sparsity: Annotated[float, typer.Option(help="Share of the groups to remove, from 0 to below 1.")] = 0.5,
    bits: Annotated[str, typer.Option(help="Bit widths of the weights: LOWER,UPPER, or one number for exactly that.")] = "4,8",
    debug: Debug = False,  # noqa: ARG001 - acts in its callback
) -> None:
    """Train a ResNet-20 on real handwritten digits twice, plainly and compressing itself, and compare the two.

    Writes OUT/compact (the small network), result.json, curves.png and log.txt.
    """
    from geta.cli.demo_settings import DemoSettings, parse_bits

    values = {"out": out, "epochs": epochs, "seed": seed, "sparsity": sparsity, "bits": parse_bits(bits)}
    settings = DemoSettings.checked(values)

    from geta.cli.demo_data import load_digits
    from geta.cli.demo_result import measure, result_table
    from geta.cli.demo_run import one_thread, train_both
    from geta.report.curves import save_curves
    from geta.report.files import prepare_folder, write_json
    from geta.report.progress import RunLog

    prepare_folder(settings.out)
    refuse_foreign_folder(settings.out / "compact")
    digits = load_digits()
    start = time.monotonic()
    with one_thread(), RunLog(settings.out / "log.txt") as log:
        log.note(f"settings: {settings.model_dump_json()}", quiet=True)
        trained = train_both(settings, digits, log)
        record = measure(trained, settings, digits, time.monotonic() - start)
        save_curves(settings.out / "curves.png", {"dense": trained.dense_epochs, "compact": trained.compact_epochs})
        write_json(settings.out / "result.json", record)
        log.show(result_table(record))
        for note in trained.notes:
            log.note(f"note: {note}")
        log.note(f"{record['seconds']:.0f} seconds; files in {settings.out}: compact/, result.json, curves.png, log.txt")


def refuse_foreign_folder(folder: Path) -> None:
    """Raise GetaError when `folder` exists and is no saved model, which a run that ends there would not be allowed to replace."""
    import geta

    if folder.exists():
        try:
            geta.load(folder)
        except CheckpointError as error:
            raise GetaError(
                f"the small network can't be saved: {error}. Nothing was started: clear the folder or choose another --out"
            ) from error
