"""A compact model as PyTorch's own `.pt2` file: `torch.export.load("model.pt2").module()` runs it, without this library."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from geta.errors import BadModelError, ConfigError
from geta.export.cleanup import clean_up, copied
from geta.export.modules import Exportable, example_inputs, first_cause, named_outputs, open_sizes, wishes
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
    if not target.parent.is_dir() or target.is_dir():
        raise ConfigError(f"'{target}' can't be written: {'it is a folder' if target.is_dir() else f'there is no folder {target.parent}'}")
    network = copied(model.programs["eval"].graph, model.tensors())
    clean_up(network)
    lower_plain(network, packed=True)
    module = Exportable(network, named_outputs(model, network))
    program = _exported(module, example_inputs(network.graph), dynamic)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            made = Path(folder) / "model.pt2"
            torch.export.save(program, made)
            size = made.stat().st_size
            os.replace(made, target)
    except OSError as error:
        raise ConfigError(f"'{target}' can't be written: {error}") from error
    return size


def _exported(module: Exportable, leaves: list[Any], dynamic: Dynamic) -> torch.export.ExportedProgram:
    reason = ""
    for wish in wishes(dynamic):
        shapes = (tuple(open_sizes(leaf, wish) for leaf in leaves),)
        try:
            with torch.no_grad():
                return torch.export.export(module, tuple(leaves), dynamic_shapes=shapes if wish != "none" else None, strict=False)
        except Exception as error:  # noqa: BLE001 - whatever torch.export raises; what it says goes into ours
            reason = first_cause(error)
    raise BadModelError(f"torch.export can't export this model: {reason}")
