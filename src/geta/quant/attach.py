"""Put quantizers into a model: parametrizations on weights, forward hooks on layer inputs and, if wished, on results."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from torch.nn.utils import parametrize

from geta.errors import BadModelError, ConfigError
from geta.quant.bits import LARGEST, Bits, BitsLike
from geta.quant.blocks import Blocks, Cutting, blocks_of, check_group_size, widths_of
from geta.quant.calibration import Range, calibrate, map_inputs
from geta.quant.fixed import FixedBits, FixedQuantizer, fixed_quantizers
from geta.quant.quantizer import Kind, Quantizer
from geta.quant.results import find_results
from geta.quant.surrogate import KINDS, STE, Surrogate
from geta.quant.targets import INPUT_QUANTIZER, OUTPUT_QUANTIZER, Layer, Weight, find_layers, find_weights, is_finite

if TYPE_CHECKING:
    from geta.graph.dependency import DependencyGraph

DEFAULT_EXCLUDE = ("*.head",)

Granularity = Literal["tensor", "channel", "group"]
AnyBits = Bits | FixedBits
AnyQuantizer = Quantizer | FixedQuantizer
_INITIAL_BITS, _PERCENTILE = 16, 99.9


@dataclass(frozen=True)
class _Settings:
    """The checked arguments of `quantize` that every quantizer shares."""

    surrogate: Surrogate
    linear: bool
    initial_bits: int
    special: Mapping[str, AnyBits]

    def quantizer(self, path: str, name: str, kind: Kind, found: Range, bits: AnyBits, blocks: Blocks = ()) -> AnyQuantizer:  # noqa: PLR0917
        """The quantizer of a tensor of the module at `path`, with this range; per channel or block if the range's tensors are."""
        bits = [bits, *(special for pattern, special in self.special.items() if fnmatchcase(path, pattern))][-1]
        if isinstance(bits, FixedBits):
            scale = bits.initial_scale(found.mean, signed=found.signed)
            return FixedQuantizer(name, kind, bits, scale, signed=found.signed, surrogate=self.surrogate, blocks=blocks)
        return Quantizer(
            name,
            kind,
            bits,
            found.q_m,
            signed=found.signed,
            linear=self.linear,
            surrogate=self.surrogate,
            initial_bits=self.initial_bits,
            blocks=blocks,
        )


@dataclass(frozen=True)
class _Grain:
    """What shares one quantizer's numbers. size: columns of a block, 0 for other granularities than "group"."""

    granularity: Granularity
    size: int

    def of(self, weight: Weight) -> tuple[Granularity, Blocks]:
        """A matrix is cut into blocks of its rows; every other weight has one scale per channel."""
        if self.granularity != "group":
            return self.granularity, ()
        if weight.tensor.dim() != 2 or not weight.tensor.numel():
            return "channel", ()
        return "group", blocks_of(weight.tensor.shape[weight.column_dim], self.size)


def quantize(  # noqa: PLR0913 - the fixed public interface, keywords only
    model: nn.Module,
    *,
    weights: BitsLike | FixedBits | None = Bits(4, 8),  # noqa: B008 - frozen
    activations: BitsLike | FixedBits | None = Bits(8, 8),  # noqa: B008 - frozen
    surrogate: Surrogate = STE(),  # noqa: B008 - frozen
    granularity: Granularity = "tensor",
    group_size: int | None = None,
    bits_of: Mapping[str, BitsLike | FixedBits] | None = None,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    calibration: Iterable[Any] | None = None,
    calibration_batches: int = 32,
    percentile: float = _PERCENTILE,
    nonlinear: bool = False,
    initial_bits: int = _INITIAL_BITS,
    results_of: DependencyGraph | None = None,
) -> nn.Module:
    """Attach trainable quantizers to `model`, in place, and return it. What gets one: see `geta.quant.targets`.

    weights, activations: bit widths to learn: (4, 8) is a range, {4, 8} allows these two alone; `FixedBits(2)` for one that isn't
                  learned, or None to leave them in floating point.
    bits_of:      other bit widths for weights and inputs of some layers, by `fnmatch` pattern over whole module paths; the last pattern
                  that matches counts. For first and last layers: `dict.fromkeys(geta.end_layers(graph), 8)`.
    surrogate:    gradient of the rounding: `STE()`, `Fourier((0.21,))`, `DSQ(0.2)` or `DGE(5, 3)`.
    granularity:  what of a weight shares one scale (d, q_m and t): the whole "tensor"; each output "channel"; or, with "group", each block
                  of `group_size` consecutive columns of each row of a matrix [O, I], so that scales are [O, ceil(I / group_size)]. A
                  row of an embedding is one token's vector. Weights that are no matrices (convolutions) have one scale per channel
                  then, and a warning says so. The bit width is one per tensor in any case, and activations always have one scale.
    group_size:   columns of a block, at least 8; usual are 32, 64 and 128. The last block may be shorter.
    exclude:      `fnmatch` patterns over whole module paths; a matched module, all inside it and all weights that it shares with
                  other modules stay as they are.
    calibration:  iterable of real batches for the activations' ranges; a tensor is passed as model(x), a tuple or list as
                  model(*batch), a dict as model(**batch). At most `calibration_batches` are used. The model is in eval mode meanwhile,
                  but for batch norms whose running statistics have seen nothing yet, which use the batch's.
    percentile:   the range is the mean over batches of this percentile of |x|; 100 = the largest |x| seen. Inputs that were never
                  negative get unsigned codes.
    nonlinear:    learn the exponent t too; otherwise it stays 1.
    initial_bits: bit width to start from (the optimizer narrows it).
    results_of:   `geta.analyze`'s graph of this model: convolutions whose result no quantizer meets get one there too, so that runtimes
                  compute them in integers (`geta.quant.results`); None leaves such results in floating point.
    percentile, nonlinear and initial_bits are about learned bit widths only; `FixedBits` starts from the mean of |x|.

    Weights start at q_m = max |w| (a zero tensor: 1 / sqrt(fan in)), t = 1, d = d(initial_bits). Tied weights share one quantizer.
    The parameter `weight` is stored as `parametrizations.weight.original` from now on and d, q_m, t are new parameters: make the
    torch optimizer after this call. Whatever fails, the model is left as it was.

    Quantizers of `FixedBits` are trained by any optimizer, learned bit widths need `geta.QASSO`.

    Raises ConfigError for impossible or useless settings and unusable calibration batches; BadModelError for a weight that is
    not finite or something that isn't a module. Source: GETA (arXiv 2502.16638) section 3.
    Deviation: activations are calibrated on data and get unsigned codes where that fits; ranges per channel and block are an addition.
    """
    if not isinstance(model, nn.Module):
        raise BadModelError(f"quantize needs a torch.nn.Module, got {type(model).__name__}")
    weight_bits, activation_bits = _any_bits(weights), _any_bits(activations)
    special = {pattern: Bits.of(bits) if not isinstance(bits, FixedBits) else bits for pattern, bits in (bits_of or {}).items()}
    settings = _Settings(surrogate, linear=not nonlinear, initial_bits=initial_bits, special=special)
    grain = _checked_grain(granularity, group_size)
    _check_settings(settings, weight_bits, activation_bits, granularity)
    _check_calibration(calibration, calibration_batches, percentile, activation_bits)
    _warn_of_no_effect(settings, weight_bits, activation_bits, percentile)
    _refuse_quantized(model)
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    layers = find_layers(model, patterns, strict=exclude is not DEFAULT_EXCLUDE)
    _check_patterns(special, layers)
    weight_plan = [] if weight_bits is None else _plan_weights(model, layers, weight_bits, grain, settings)
    input_plan: list[tuple[Layer, AnyQuantizer]] = []
    result_plan: list[tuple[Layer, AnyQuantizer]] = []
    if activation_bits is not None and calibration is not None:
        inputs = [layer for layer in layers if layer.quantize_input]
        results = [] if results_of is None else find_results(model, results_of.analysis.capture, layers)
        ranges = calibrate(model, inputs, calibration, percentile=percentile, limit=calibration_batches, results=results) if inputs else {}
        input_plan = _plan(inputs, "input", ranges, activation_bits, settings)
        result_plan = _plan(results, "output", ranges, activation_bits, settings)
    if not weight_plan and not input_plan:
        raise ConfigError(
            f"nothing to quantize: {type(model).__name__} has no layer with a floating-point weight of two or more dimensions "
            f"outside exclude={patterns!r}; check exclude"
        )
    _attach(weight_plan, input_plan, result_plan)
    _tell_of_channels(grain, [weight for weight, _ in weight_plan])
    return model


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """All quantizers with learned bit widths of `model` in module order, keyed by their `name`: `conv1.weight`, `conv1:input`.

    Those of `FixedBits` are `fixed_quantizers(model)`.

    Raises BadModelError when two different quantizers have one name (a quantized layer was copied inside the model).
    """
    found: dict[str, Quantizer] = {}
    for path, module in model.named_modules():
        if isinstance(module, Quantizer):
            if module.name in found:
                raise BadModelError(
                    f"two quantizers are called '{module.name}' (the second is '{path}'): a quantized layer was copied inside the "
                    "model; build the whole model first and quantize it afterwards"
                )
            found[module.name] = module
    return found


def _any_bits(value: BitsLike | FixedBits | None) -> AnyBits | None:
    return value if value is None or isinstance(value, FixedBits) else Bits.of(value)


def _check_settings(settings: _Settings, weights: AnyBits | None, activations: AnyBits | None, granularity: str) -> None:
    if weights is None and activations is None:
        raise ConfigError("quantize: weights and activations are both None; give at least one a range of bits")
    if not isinstance(settings.surrogate, Surrogate) or isinstance(settings.surrogate, type):
        missing = next((key for key in ("coefficients", "kind", "mean_slope") if not hasattr(settings.surrogate, key)), "coefficients")
        raise ConfigError(f"surrogate: {settings.surrogate!r} has no {missing}; use STE() or Fourier((0.21,)), DSQ() or DGE()")
    if settings.surrogate.kind not in KINDS:
        raise ConfigError(f"surrogate: {settings.surrogate!r} has the kind '{settings.surrogate.kind}'; known are {', '.join(KINDS)}")
    if granularity != "tensor" and weights is None:
        warnings.warn(f"granularity='{granularity}' has no effect: it is about weights, and weights=None", stacklevel=3)
    named = {f"bits_of['{pattern}']": bits for pattern, bits in settings.special.items()}
    for key, bits in {"weights": weights, "activations": activations, **named}.items():
        if isinstance(bits, Bits) and not bits.lower <= settings.initial_bits <= LARGEST:
            raise ConfigError(
                f"initial_bits: {settings.initial_bits} is outside [{bits.lower}, {LARGEST}], from the lower bound of {key} to the "
                "widest supported; 16 is a good start"
            )


def _checked_grain(granularity: Granularity, group_size: int | None) -> _Grain:
    if granularity not in get_args(Granularity):
        raise ConfigError(f"granularity: {granularity!r} is unknown; use 'tensor', 'channel' or 'group'")
    if granularity != "group":
        if group_size is not None:
            raise ConfigError(
                f"group_size: {group_size!r} needs granularity='group', and granularity is '{granularity}': give both or none"
            )
        return _Grain(granularity, 0)
    if group_size is None:
        raise ConfigError("granularity: 'group' needs group_size, how many columns of a weight share one scale: use 32, 64 or 128")
    return _Grain(granularity, check_group_size(group_size))


def _tell_of_channels(grain: _Grain, weights: Sequence[Weight]) -> None:
    others = [weight for weight in weights if grain.of(weight)[0] != grain.granularity]
    if others:
        first = others[0]
        warnings.warn(
            f"granularity='group' cuts the rows of matrices into blocks; {len(others)} weights are no matrices and have one scale per "
            f"output channel instead (first: '{first.name}', {list(first.tensor.shape)})",
            stacklevel=3,
        )


def _check_patterns(special: Mapping[str, AnyBits], layers: Sequence[Layer]) -> None:
    paths = [layer.path for layer in layers]
    for pattern in special:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ConfigError(
                f"bits_of: '{pattern}' matches none of the {len(paths)} layers that are quantized; patterns are matched against whole "
                f"module paths such as {', '.join(repr(path) for path in paths[:3]) or '(there are none)'}: check it, and exclude"
            )


def _warn_of_no_effect(settings: _Settings, weights: AnyBits | None, activations: AnyBits | None, percentile: float) -> None:
    learned = isinstance(weights, Bits) or isinstance(activations, Bits)
    for key, changed in (("nonlinear", not settings.linear), ("initial_bits", settings.initial_bits != _INITIAL_BITS)):
        if changed and not learned:
            warnings.warn(f"{key} has no effect: it is about learned bit widths, and all are FixedBits", stacklevel=3)
    if isinstance(activations, FixedBits) and percentile != _PERCENTILE:
        warnings.warn("percentile has no effect: activations of FixedBits start from the mean of |x|", stacklevel=3)


def _check_calibration(calibration: object, batches: int, percentile: float, activations: AnyBits | None) -> None:
    if activations is not None and calibration is None:
        raise ConfigError(
            "activations are to be quantized, but their ranges are unknown: pass calibration=[batch, ...] with real inputs, or "
            "activations=None"
        )
    if activations is None and calibration is not None:
        warnings.warn("calibration has no effect: only activations need it, and activations=None", stacklevel=3)
    if batches < 1:
        raise ConfigError(f"calibration_batches: {batches} is impossible; use at least 1")
    if not 50.0 <= percentile <= 100.0:
        raise ConfigError(f"percentile: {percentile} is outside [50, 100]; 99.9 is a good start, 100 is the largest value")


def _refuse_quantized(model: nn.Module) -> None:
    present = [*quantizers(model), *fixed_quantizers(model)]
    if present:
        raise ConfigError(
            f"this model already has {len(present)} quantizers (first: '{present[0]}'); call quantize once, on a model that has none"
        )


def _plan_weights(
    model: nn.Module, layers: Sequence[Layer], bits: AnyBits, grain: _Grain, settings: _Settings
) -> list[tuple[Weight, AnyQuantizer]]:
    plan = []
    for weight in find_weights(model, layers):
        granularity, blocks = grain.of(weight)
        found = _weight_range(weight, granularity, blocks)
        plan.append((weight, settings.quantizer(weight.name.rpartition(".")[0], weight.name, "weight", found, bits, blocks)))
    return plan


def _plan(
    layers: Sequence[Layer], side: str, ranges: Mapping[str, Range], bits: AnyBits, settings: _Settings
) -> list[tuple[Layer, AnyQuantizer]]:
    """side: "input" or "output"."""
    names = [(layer, f"{layer.path}:{side}") for layer in layers]
    return [(layer, settings.quantizer(layer.path, name, "activation", ranges[name], bits)) for layer, name in names if name in ranges]


def _weight_range(weight: Weight, granularity: Granularity, blocks: Blocks) -> Range:
    """max and mean |w|, `[]`, broadcasting per output channel or row, or per block; never zero, or the weights could not leave zero."""
    tensor = weight.tensor.detach()
    if not is_finite(tensor):
        raise BadModelError(f"weight '{weight.name}' has infinite or NaN values; quantize a model with finite weights")
    magnitudes = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).abs()
    fan_in = max(1, tensor.numel() // max(1, tensor.shape[weight.output_dim]))
    if not tensor.numel():
        start = magnitudes.new_full((), fan_in**-0.5)
        return Range(start, signed=True, mean=start)
    if blocks:
        largest, mean = _per_block(magnitudes, weight.column_dim, blocks)
    else:
        own = {"tensor": (), "channel": (weight.output_dim,), "group": (1 - weight.column_dim,)}[granularity]
        others, keep = [dim for dim in range(tensor.dim()) if dim not in own], granularity != "tensor"
        largest, mean = magnitudes.amax(dim=others, keepdim=keep), magnitudes.mean(dim=others, keepdim=keep)
    whole_largest, whole_mean = (torch.where(whole > 0, whole, fan_in**-0.5) for whole in (magnitudes.amax(), magnitudes.mean()))
    return Range(torch.where(largest > 0, largest, whole_largest), signed=True, mean=torch.where(mean > 0, mean, whole_mean))


def _per_block(magnitudes: torch.Tensor, axis: int, blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest and mean of each block of each row."""
    first, second = magnitudes.shape
    cut = Cutting((first, second), axis, tuple(widths_of(blocks, magnitudes.shape[axis])))
    rows = cut.rows(magnitudes)
    mean = rows.sum(1, keepdim=True) / cut.counts(rows)
    return cut.table(rows.amax(1)).contiguous(), cut.table(mean).contiguous()


def _attach(
    weights: Sequence[tuple[Weight, AnyQuantizer]],
    inputs: Sequence[tuple[Layer, AnyQuantizer]],
    results: Sequence[tuple[Layer, AnyQuantizer]],
) -> None:
    """Attach all of it or, after an error, nothing."""
    sides = [(INPUT_QUANTIZER, *one) for one in inputs] + [(OUTPUT_QUANTIZER, *one) for one in results]
    for attribute, layer, quantizer in sides:
        if hasattr(layer.module, attribute):
            raise ConfigError(
                f"module '{layer.path}' already has an attribute '{attribute}', the name that '{quantizer.name}' needs; "
                f"rename it or exclude the module"
            )
    with ExitStack() as undo:
        for weight, quantizer in weights:
            for module, leaf in weight.places:
                order = list(module._parameters)
                undo.callback(_detach_weight, module, leaf, order)
                quantizer.train(module.training)
                parametrize.register_parametrization(module, leaf, quantizer)
                module.parametrizations.train(module.training)  # type: ignore[union-attr]
        for attribute, layer, quantizer in sides:
            quantizer.train(layer.module.training)
            layer.module.add_module(attribute, quantizer)
            undo.callback(layer.module._modules.pop, attribute)
            if attribute == INPUT_QUANTIZER:
                undo.callback(layer.module.register_forward_pre_hook(_quantize_input, with_kwargs=True).remove)
            else:
                undo.callback(layer.module.register_forward_hook(_quantize_result).remove)
        undo.pop_all()


def _detach_weight(module: nn.Module, leaf: str, order: Sequence[str]) -> None:
    if parametrize.is_parametrized(module, leaf):
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
    module._parameters = {name: module._parameters[name] for name in order}


def _quantize_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook; it looks the quantizer up in the module, so that a deep copy uses its own."""
    return map_inputs(module, args, kwargs, getattr(module, INPUT_QUANTIZER))


def _quantize_result(module: nn.Module, _args: Any, result: torch.Tensor) -> torch.Tensor:
    """Forward hook, as above."""
    quantized: torch.Tensor = getattr(module, OUTPUT_QUANTIZER)(result)
    return quantized
