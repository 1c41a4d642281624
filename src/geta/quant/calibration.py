"""Ranges of layer inputs, measured on real batches before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from geta import ranks
from geta.errors import ConfigError
from geta.quant.targets import Layer

_ATTENTION_INPUTS = ("query", "key", "value")


@dataclass(frozen=True)
class Range:
    """What calibration found for one tensor: q_m, whether a value below zero was seen, and the mean of |x| (both shape `[]`)."""

    q_m: Tensor
    signed: bool
    mean: Tensor


class RangeObserver:
    """Gathers minimum, maximum and a high percentile of |x| over batches.

    Rule: q_m = mean over the batches of the `percentile`-th percentile of |x|; of several inputs within one batch (attention's query, key
    and value, a module that is called more than once) the largest percentile counts. percentile = 100, or a percentile of zero (almost
    all values are zero), gives q_m = max |x| over all batches; all values zero gives 1. Signed if any value was below zero. The mean of |x|
    is over all elements of all batches, 1 if all are zero. Every rank's batches count (`summary`, `adopt`).
    """

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self.calls = 0
        self.batch = 0
        self.integer_only = True
        self._percentiles: dict[int, Tensor] = {}
        self._largest: list[Tensor] = []
        self._smallest: list[Tensor] = []
        self._means: list[tuple[Tensor, int]] = []

    def observe(self, x: Tensor) -> Tensor:
        """Record one input and return it unchanged."""
        self.integer_only = False
        if x.numel() == 0:
            return x
        values = x.detach().to(torch.promote_types(x.dtype, torch.float32)).flatten()
        magnitudes = values.abs()
        rank = max(1, math.ceil(self.percentile / 100.0 * magnitudes.numel()))
        found = magnitudes.kthvalue(rank).values
        self._percentiles[self.batch] = torch.maximum(self._percentiles.get(self.batch, found), found)
        self._largest.append(magnitudes.amax())
        self._smallest.append(values.amin())
        self._means.append((magnitudes.mean(), magnitudes.numel()))
        return x

    def summary(self) -> Tensor:
        """What this rank has seen, float64 [9]: calls, floating point or not, double precision or not, batches, mean percentile,
        largest |x|, smallest x, mean of |x| and number of elements it is over; zeros where there is nothing."""
        facts = [float(self.calls), float(not self.integer_only)]
        if not self._largest:
            return torch.tensor([*facts, *[0.0] * 7], dtype=torch.float64)
        wide = float(self._largest[0].dtype == torch.float64)
        elements = sum(count for _, count in self._means)
        mean = torch.stack([mean.double() * (count / elements) for mean, count in self._means]).sum()
        percentiles = torch.stack(list(self._percentiles.values())).double()
        values = [percentiles.mean(), torch.stack(self._largest).amax(), torch.stack(self._smallest).amin(), mean]
        numbers = [float(value) for value in values]
        return torch.tensor([*facts, wide, float(len(percentiles)), *numbers, float(elements)], dtype=torch.float64)

    def adopt(self, summaries: Sequence[Sequence[float]], device: torch.device) -> None:
        """Go on as if all ranks' batches had been seen here."""
        self.calls = int(sum(one[0] for one in summaries))
        self.integer_only = not any(one[1] for one in summaries)
        seen = [one for one in summaries if one[3]]
        dtype = torch.float64 if any(one[2] for one in seen) else torch.float32
        batches = sum(one[3] for one in seen)

        def number(value: float) -> Tensor:
            return torch.tensor(value, dtype=dtype, device=device)

        self._percentiles = {0: number(sum(one[4] * (one[3] / batches) for one in seen))} if seen else {}
        self._largest, self._smallest = ([number(one[place]) for one in seen] for place in (5, 6))
        self._means = [(number(one[7]), int(one[8])) for one in seen]

    def result(self, name: str) -> Range:
        """The range for `conv1:input` or `bn1:output`; raises ConfigError when values were not finite."""
        path, _, side = name.rpartition(":")
        if not self._largest:
            raise ConfigError(f"calibration: the {side} of '{path}' was empty in every batch; use batches with data")
        largest = torch.stack(self._largest).amax()
        if not bool(torch.isfinite(largest)):
            raise ConfigError(f"calibration: the {side} of '{path}' had infinite or NaN values; check the batches and the model's weights")
        q_m = torch.stack(list(self._percentiles.values())).mean()
        if self.percentile == 100.0 or float(q_m) == 0.0:
            q_m = largest
        if float(q_m) == 0.0:
            q_m = torch.ones_like(q_m)
        elements = sum(count for _, count in self._means)
        mean = torch.stack([mean * (count / elements) for mean, count in self._means]).sum()
        mean = torch.where(mean > 0, mean, 1.0)
        return Range(q_m, signed=bool(torch.stack(self._smallest).amin() < 0), mean=mean)


def map_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply `function` to the floating-point data inputs of a module call and return the new arguments.

    Data inputs are the first argument or, for `nn.MultiheadAttention`, query, key and value. A tensor that is passed twice stays one
    tensor, because attention takes another path when query, key and value differ.
    """
    done: list[tuple[Tensor, Tensor]] = []  # not a dict by id(): torch.compile would trace again for every new tensor

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        for given, result in done:
            if given is value:
                return result
        done.append((value, function(value)))
        return done[-1][1]

    count, names = 0, tuple(kwargs)[:1]
    if isinstance(module, nn.MultiheadAttention):
        count, names = len(_ATTENTION_INPUTS), _ATTENTION_INPUTS
    elif args:
        return (convert(args[0]), *args[1:]), kwargs
    new_args = (*(convert(value) for value in args[:count]), *args[count:])
    return new_args, {key: convert(value) if key in names else value for key, value in kwargs.items()}


def calibrate(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Iterable[Any],
    *,
    percentile: float,
    limit: int,
    results: Sequence[Layer] = (),
) -> dict[str, Range]:
    """Run up to `limit` batches through the model and return {"<module path>:input": range}, with `results` "<module path>:output" too.

    The model runs in eval mode without gradients; its modes and buffers are put back afterwards, also after an error. A layer whose
    data inputs are integers (an embedding) has no range. Norms whose running statistics have seen nothing yet use those of the batch, as
    they will in training: with mean 0 and variance 1 in their place the inputs of a deep network's last layers were 10^10 times too large.
    With several ranks (`geta.ranks`) all of them call this, each with its own batches, and find the same.

    Raises ConfigError for unusable batches and for a layer that none reaches.
    """
    probes = {f"{layer.path}:input": layer.module for layer in layers} | {f"{layer.path}:output": layer.module for layer in results}
    observers = {name: RangeObserver(percentile) for name in probes}
    with ExitStack() as stack:
        stack.enter_context(_unchanged(model))
        stack.enter_context(torch.no_grad())
        for layer in layers:
            hook = _observing_hook(observers[f"{layer.path}:input"])
            stack.callback(layer.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for layer in results:
            after = _result_hook(observers[f"{layer.path}:output"])
            stack.callback(layer.module.register_forward_hook(after).remove)
        count = 0
        for count, batch in enumerate(islice(_iterate(batches), limit), start=1):
            for observer in observers.values():
                observer.batch = count
            _run(model, batch, count)
    if count == 0:
        raise ConfigError("calibration: no batch was given; pass an iterable with at least one batch of real inputs")
    _share(observers, [*probes.values()])
    _refuse_unseen(observers, count)
    return {name: observer.result(name) for name, observer in observers.items() if not observer.integer_only}


def _share(observers: Mapping[str, RangeObserver], modules: Sequence[nn.Module]) -> None:
    """Let every rank know what all of them have seen."""
    if ranks.count() == 1:
        return
    devices = [next((p.device for p in module.parameters()), torch.device("cpu")) for module in modules]
    mine = torch.stack([observer.summary() for observer in observers.values()]).to(devices[0])
    found = ranks.gathered(mine).cpu().transpose(0, 1)
    for observer, summaries, device in zip(observers.values(), found.tolist(), devices, strict=True):
        observer.adopt(summaries, device)


def _observing_hook(observer: RangeObserver) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observer.calls += 1
        map_inputs(module, args, kwargs, observer.observe)

    return hook


def _result_hook(observer: RangeObserver) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, result: Any) -> None:
        observer.calls += 1
        if isinstance(result, Tensor) and result.is_floating_point():
            observer.observe(result)

    return hook


def _iterate(batches: Iterable[Any]) -> Iterator[Any]:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise ConfigError(
            f"calibration: got one {type(batches).__name__}, needed is an iterable of batches; write calibration=[batch, ...]"
        )
    return iter(batches)


def _run(model: nn.Module, batch: Any, number: int) -> None:
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        elif isinstance(batch, list | tuple):
            model(*batch)
        else:
            model(batch)
    except Exception as error:
        raise ConfigError(
            f"calibration: the model failed on batch {number} ({type(error).__name__}: {error}). A tensor is passed as model(x), a "
            "tuple or list as model(*batch), a dict as model(**batch): leave out labels and whatever else forward doesn't take"
        ) from error


def _refuse_unseen(observers: Mapping[str, RangeObserver], count: int) -> None:
    unseen = [name.rpartition(":")[0] for name, observer in observers.items() if observer.calls == 0]
    if unseen:
        shown = ", ".join(f"'{path}'" for path in unseen[:5]) + (" ..." if len(unseen) > 5 else "")
        raise ConfigError(
            f"calibration: no input of {len(unseen)} layer(s) was seen in {count} batch(es): {shown}. Add batches that reach them, "
            "or list them in exclude, or quantize weights only (activations=None)"
        )


def _has_seen_nothing(norm: nn.modules.batchnorm._NormBase) -> bool:
    """Whether running statistics are as they were made. Ranks may have different numbers of batches, so nothing waits for others here."""
    mean, variance, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if mean is None or variance is None or isinstance(norm, nn.SyncBatchNorm) or (batches is not None and bool(batches)):
        return False
    return not bool(mean.any()) and bool((variance == 1).all())


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, but for norms without statistics; every module's mode and every buffer as before outside."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and _has_seen_nothing(module):
            module.training = True
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if buffer is not None and value is not None:
                    buffer.copy_(value)
