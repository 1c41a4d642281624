"""Which tensors of a model get a quantizer.

Weights: the floating-point parameters with two or more dimensions of every module that owns a parameter called `weight`
(linear, convolution, transposed convolution, embedding, bilinear, `transformers`' Conv1D, a user's own layer), and the input
projections of `nn.MultiheadAttention`. Not quantized: normalisation layers, one-dimensional parameters (biases, scales), bare
parameters of modules without a `weight` (position tables, class tokens, a recurrent layer's packed weights), and whatever
`exclude` names.
Activations: the inputs of the same modules, unless these are integers (embeddings). The output projection inside
`nn.MultiheadAttention` is never called as a module, so its input stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils import parametrize

from geta.errors import ConfigError

INPUT_QUANTIZER = "input_quantizer"
"""Name of the submodule that quantizes a layer's input."""
OUTPUT_QUANTIZER = "output_quantizer"
"""Name of the submodule that quantizes a module's result."""

_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_OUTPUT_SECOND = (*_EMBEDDINGS, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layer:
    """A module that has weights to quantize.

    weights:        names of these parameters inside the module.
    quantize_input: whether a quantizer on its input takes effect.
    """

    path: str
    module: nn.Module
    weights: tuple[str, ...]
    quantize_input: bool


@dataclass(frozen=True)
class Weight:
    """One parameter to quantize and every place that uses it (more than one when weights are tied).

    name: canonical name of the first place.
    output_dim: dimension of the output channels there.
    column_dim: dimension along which a row lies, if it is a matrix: the inputs of a layer, the entries of an embedded token.
    """

    name: str
    tensor: nn.Parameter
    output_dim: int
    column_dim: int
    places: tuple[tuple[nn.Module, str], ...]


def find_layers(model: nn.Module, exclude: Sequence[str], *, strict: bool) -> list[Layer]:
    """The layers of `model` to quantize, in module order, without those that `exclude` matches.

    exclude: `fnmatch` patterns over whole module paths (`*` also crosses dots, case counts); a match excludes everything inside
    the module too. strict: raise ConfigError for a pattern that matches no module.
    """
    excluded = _excluded_modules(model, exclude, strict=strict)
    uncalled = {id(module.out_proj) for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
    layers: list[Layer] = []
    for path, module in model.named_modules():
        if id(module) in excluded:
            continue
        _refuse_parametrized(path, module)
        weights = _weight_names(path, module)
        if weights:
            quantize_input = not isinstance(module, _EMBEDDINGS) and id(module) not in uncalled
            layers.append(Layer(path, module, weights, quantize_input))
    return layers


def find_weights(model: nn.Module, layers: Sequence[Layer]) -> list[Weight]:
    """The distinct parameters of `layers`. One that a module outside of `layers` also uses as its own stays unquantized."""
    included = {id(layer.module) for layer in layers}
    shared_outside = {
        id(parameter) for module in model.modules() if id(module) not in included for parameter in module.parameters(recurse=False)
    }
    found: dict[int, Weight] = {}
    for layer in layers:
        for leaf in layer.weights:
            tensor = layer.module._parameters[leaf]
            assert tensor is not None
            if id(tensor) in shared_outside:
                continue
            place = (layer.module, leaf)
            known = found.get(id(tensor))
            if known is None:
                output_dim = _output_dim(layer.module)
                column_dim = 1 if isinstance(layer.module, _EMBEDDINGS) else 1 - output_dim
                found[id(tensor)] = Weight(_join(layer.path, leaf), tensor, output_dim, column_dim, (place,))
            else:
                found[id(tensor)] = replace(known, places=(*known.places, place))
    return list(found.values())


def _excluded_modules(model: nn.Module, exclude: Sequence[str], *, strict: bool) -> set[int]:
    excluded: set[int] = set()
    paths = list(model.named_modules(remove_duplicate=False))
    for pattern in exclude:
        matched = [module for path, module in paths if fnmatchcase(path, pattern)]
        if strict and not matched:
            raise ConfigError(
                f"exclude: '{pattern}' matches no module of {type(model).__name__}; patterns are matched against whole module "
                f"paths such as {', '.join(repr(path) for path, _ in paths[1:4]) or '(the model has no submodules)'}"
            )
        for module in matched:
            excluded.update(id(inner) for inner in module.modules())
    return excluded


def _weight_names(path: str, module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, _NORMS):
        return ()
    if isinstance(module, nn.MultiheadAttention):
        names: Sequence[str] = _ATTENTION_WEIGHTS
    elif module._parameters.get("weight") is not None:
        names = list(module._parameters)
    else:
        return ()
    chosen = []
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is None:
            continue
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigError(f"'{_join(path, name)}' has no shape yet (lazy module): run the model once before it is quantized")
        if parameter.is_floating_point() and parameter.dim() >= 2:
            chosen.append(name)
    return tuple(chosen)


def _refuse_parametrized(path: str, module: nn.Module) -> None:
    if not parametrize.is_parametrized(module):
        return
    names = [name for name in module.parametrizations if getattr(module, name).dim() >= 2]  # type: ignore[union-attr]
    if names:
        raise ConfigError(
            f"'{_join(path, names[0])}' already has a parametrization: remove it "
            f"(torch.nn.utils.parametrize.remove_parametrizations) before quantize, or exclude the module with exclude=['{path}']"
        )


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _output_dim(module: nn.Module) -> int:
    """Dimension of the output channels in a module's weights; a user's own layer is taken to be [O, ...] like linear."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    transposed = pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)
    return 1 if transposed or isinstance(module, _OUTPUT_SECOND) else 0


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are finite; True for a tensor without data (meta device)."""
    return tensor.is_meta or bool(torch.isfinite(tensor).all())
