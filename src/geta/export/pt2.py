"""A compact model as PyTorch's own `.pt2` file: `torch.export.load("model.pt2").module()` runs it, without this library.

`compiled=True` writes AOTInductor's machine code for this kind of processor instead, which `torch._inductor.aoti_load_package("model.pt2")`
runs.
"""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from geta.errors import BadModelError, ConfigError
from geta.export.cleanup import clean_up, copied
from geta.export.modules import Exportable, check_wishes, example_inputs, first_cause, named_outputs, with_open_sizes
from geta.export.plain import lower_plain

if TYPE_CHECKING:
    from geta.export.modules import Dynamic
    from geta.subnet.model import CompactModel


def export_pt2(model: CompactModel, path: str | Path, *, dynamic: Dynamic = "batch", compiled: bool = False) -> int:
    """Write the evaluation half of a compact model as one `.pt2` file, atomically; returns its size in bytes.

    Weights are stored as integers, those of up to 4 bits packed, and dequantized where they are used; quantizers of activations are
    ordinary operators. The loaded module takes the inputs in their flattened order and returns a tuple of tensors.
    dynamic:  sizes that stay open: the first dimension of every input, all of them (as far as the model allows), or none.
    compiled: compile the model with AOTInductor for this machine's CPU; needs a C++ compiler and takes about a minute. Only processors
              of this kind and this version of PyTorch run the file.
    Raises ConfigError when the path can't be written or there is no C++ compiler, BadModelError when PyTorch can't export or compile the
    model; nothing on disk has changed then.
    """
    target = Path(path)
    check_wishes(target, dynamic)
    if compiled:
        _check_compiler()
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
            if compiled:
                _compile(program, made)
            else:
                with _Patient(made) as file:
                    torch.export.save(program, file)
                    file.settle()
            size = made.stat().st_size
            os.replace(made, target)
    except OSError as error:
        raise ConfigError(f"'{target}' can't be written: {error}") from error
    return size


class _Patient(io.FileIO):
    """A file that keeps quiet about a refused write until `settle`: PyTorch's writer ends the whole process when one raises."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._refusal: OSError | None = None

    def write(self, content: Any, /) -> int:
        """Write all of it, or nothing more once the system has refused."""
        whole = memoryview(content).cast("B")
        written = 0
        while self._refusal is None and written < len(whole):
            try:
                written += super().write(whole[written:])
            except OSError as error:
                self._refusal = error
        return len(whole)

    def settle(self) -> None:
        """Raise what the system said, if it refused anything."""
        if self._refusal is not None:
            raise self._refusal


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "compiled=True needs a C++ compiler, and there is none: install one (g++, say) or name it in the environment variable CXX; "
            "compiled=False needs none"
        ) from error


def _compile(program: Any, path: Path) -> None:
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning):
                warnings.simplefilter("ignore", kind)  # PyTorch's own, about PyTorch's own code
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except OSError:
        raise
    except Exception as error:
        raise BadModelError(f"AOTInductor can't compile this model: {first_cause(error)}") from error
