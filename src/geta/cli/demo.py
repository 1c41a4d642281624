"""`geta demo`: the shipped recipe `digits`, with its commonest settings as options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from geta.cli.compress import stopping_with_code
from geta.cli.options import Debug
from geta.errors import ConfigError


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

    It is `geta compress digits` with these options as overrides. Writes OUT/compact (the small network), result.json, curves.png, log.txt
    and the recipe. A complete run in OUT is replaced; an interrupted one goes on with `geta compress --resume OUT`.

    Examples:

        geta demo

        geta demo --epochs 10 --sparsity 0.7 --bits 2,6 --out runs/narrow
    """
    lower, upper = parse_bits(bits)

    from geta.recipes.read import read_recipe
    from geta.recipes.run import run_recipe

    try:
        recipe = read_recipe(
            "digits",
            [
                f"train.epochs={epochs}",
                f"train.seed={seed}",
                f"compress.sparsity={sparsity}",
                f"compress.weight_bits=[{lower}, {upper}]",
                f"output.folder={str(out)!r}",
            ],
        )
    except ConfigError as error:
        raise ConfigError(in_options(str(error))) from None
    stopping_with_code(lambda: run_recipe(recipe, replace=True))


def in_options(message: str) -> str:
    """A message about a recipe in the words of this command's options."""
    names = {"train.epochs": "epochs", "train.seed": "seed", "compress.sparsity": "sparsity", "compress.weight_bits": "bits"}
    for key, option in names.items():
        message = message.replace(f"{key} = ", f"--{option} ")
    return message.replace("recipe 'digits'", "geta demo")


def parse_bits(text: str) -> tuple[int, int]:
    """Read `4,8` (a range) or `8` (exactly that); raises ConfigError for anything else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise ConfigError(f"--bits '{text}' is no range of bit widths: write e.g. --bits 4,8, or --bits 8 for exactly 8 bits")
    return numbers[0], numbers[-1]
