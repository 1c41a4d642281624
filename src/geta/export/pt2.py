"""A compact model as PyTorch's own `.pt2` file: `torch.export.load("model.pt2").module()` runs it, without this library."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from geta.errors import ConfigError
from geta.export.cleanup import clean_up, copied
from geta.export.modules import Exportable, check_wishes, example_inputs, named_outputs, with_open_sizes
from geta.export.plain import lower_plain

if TYPE_CHECKING:
    from geta.export.modules import Dynamic
    from geta.subnet.model import CompactModel


def export_pt2(model: CompactModel, path: str | Path, *, dynamic: Dynamic = "batch") -> int:
    """Write the evaluation half of a compact model as one `.pt2` file, atomically; returns its size in bytes.

    Weights are stored as integers, those of up to 4 bits packed, and dequantized where they are used; quantizers of activations are
    ordinary operators. The loaded module takes the inputs in their flattened order and returns a tuple of tensors.
    dynamic: sizes that stay open: the first dimension of every input, all of them (as far as the model allows), or none.
    Raises ConfigError when the path can't be written, BadModelError when PyTorch can't export the model; nothing on disk has changed then.
    """
    target = Path(path)
    check_wishes(target, dynamic)
    network = copied(model.programs["eval"].graph, model.tensors())
    clean_up(network)
    lower_plain(network, packed=True)
    module = Exportable(network, named_outputs(model, network))
    leaves = tuple(example_inputs(network.graph))
    with torch.no_grad():
        program = with_open_sizes(
            "torch.export can't export",
            leaves,
            dynamic,
            lambda shapes: torch.export.export(module, leaves, dynamic_shapes=shapes, strict=False),
        )
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            made = Path(folder) / "model.pt2"
            torch.export.save(program, made)
            size = made.stat().st_size
            os.replace(made, target)
    except OSError as error:
        raise ConfigError(f"'{target}' can't be written: {error}") from error
    return size
