"""Everything in one object, for people who just want a smaller model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import nn

from geta.devices import resolve_multiple
from geta.errors import ConfigError
from geta.graph import DependencyGraph, analyze
from geta.integrations.forward import own_forward
from geta.integrations.sharding import Skeleton, gathered
from geta.optim import QASSO, Budget, Schedule
from geta.optim.setup import check_uniform
from geta.quant import STE, BitsLike, Surrogate, end_layers, quantize
from geta.subnet import CompactModel, compact
from geta.subnet.compact import Product


class Compressor:
    """Analyse and quantize a model now, prune it while it trains, build the small network at the end.

        compressor = geta.Compressor(model, (x,), sparsity=0.5, weight_bits=(4, 8))
        optimizer = compressor.optimizer(torch.optim.AdamW, lr=1e-3, total_steps=steps)
        ...the training loop, unchanged...
        small = compressor.finish()

    model:           trained in place from now on: its weights get quantizers, and its groups become zero.
    args, kwargs:    example inputs, as the model is called: `model(*args, **kwargs)`.
    sparsity:        share of the prunable groups to remove, in [0, 1).
    target:          a `geta.Budget` of costs instead of a sparsity; `optimizer` refuses one that can't be met.
    weight_bits:     bit widths of the weights: (4, 8) is a range, {4, 8} allows these two alone, 8 is exactly that; None = not quantized.
    activation_bits: the same for activations; needs `calibration`, an iterable of real batches.
    end_bits:        other bit widths for the first and last layers (`geta.end_layers`), often 8; None = as the rest.
    multiple_of:     every family keeps a multiple of this many groups; or the name of a `geta.device_profile`: of its many channels.
    uniform:         families that repeat across layers lose equal numbers of groups, see `geta.QASSO`.
    depth:           whole residual branches may go too, see `geta.analyze`. layer_sparsity: the share of them that goes; None = sparsity.
    surrogate, granularity, group_size, exclude: as in `geta.quantize`. exact, dynamic_shapes, protect, prune: as in `geta.analyze`.

    Raises whatever `geta.analyze` and `geta.quantize` raise; ConfigError when the settings leave nothing to do.
    Source: GETA (arXiv 2502.16638), sections 3 to 5.
    """

    def __init__(  # noqa: PLR0913 - the settings of three stages, keywords only
        self,
        model: nn.Module,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        sparsity: float | None = None,
        target: Budget | None = None,
        weight_bits: BitsLike | None = (4, 8),
        activation_bits: BitsLike | None = None,
        end_bits: BitsLike | None = None,
        calibration: Iterable[Any] | None = None,
        multiple_of: int | str = 1,
        uniform: bool = False,
        depth: bool = False,
        layer_sparsity: float | None = None,
        surrogate: Surrogate | None = None,
        granularity: Literal["tensor", "channel", "group"] = "tensor",
        group_size: int | None = None,
        exclude: Sequence[str] | None = None,
        exact: bool = True,
        dynamic_shapes: Any = None,
        protect: Sequence[str] | str = (),
        prune: Sequence[str] | str | None = None,
    ) -> None:
        if (sparsity is None) == (target is None):
            raise ConfigError("give exactly one of sparsity=... (a share of the groups) and target=geta.Budget(...) (costs)")
        if sparsity is not None and not 0.0 <= sparsity < 1.0:
            raise ConfigError(f"sparsity = {sparsity}: it is the share of the groups to remove, from 0 to below 1")
        resolve_multiple(multiple_of)
        quantized = weight_bits is not None or activation_bits is not None
        if not quantized and sparsity == 0.0 and not layer_sparsity:
            raise ConfigError("sparsity = 0 and no bit widths: nothing would become smaller; set sparsity, weight_bits or activation_bits")
        chosen = {"surrogate": surrogate, "group_size": group_size, "exclude": exclude, "calibration": calibration, "end_bits": end_bits}
        if not quantized and (granularity != "tensor" or any(value is not None for value in chosen.values())):
            raise ConfigError(
                "surrogate, granularity, group_size, exclude, calibration and end_bits have no effect without quantization: set "
                "weight_bits or activation_bits"
            )
        self.model = model
        if layer_sparsity is not None and not depth:
            raise ConfigError(f"layer_sparsity = {layer_sparsity} has no effect without depth=True, which lets residual branches go")
        self.graph: DependencyGraph = analyze(
            model, args, kwargs, exact=exact, dynamic_shapes=dynamic_shapes, protect=protect, prune=prune, depth=depth
        )
        self._layer_sparsity = layer_sparsity
        self._sparsity = sparsity
        self._target = target
        self._multiple_of = multiple_of
        self._uniform = check_uniform(uniform)
        self._optimizer: QASSO | None = None
        self._skeleton: Skeleton | None = None
        if quantized:
            excluded: Any = {} if exclude is None else {"exclude": exclude}
            quantize(
                model,
                weights=weight_bits,
                activations=activation_bits,
                bits_of=None if end_bits is None else dict.fromkeys(end_layers(self.graph, **excluded), end_bits),
                surrogate=surrogate or STE(),
                granularity=granularity,
                group_size=group_size,
                calibration=calibration,
                **excluded,
            )

    def optimizer(
        self,
        optimizer_class: Callable[..., torch.optim.Optimizer],
        *,
        total_steps: int | None = None,
        schedule: Schedule | None = None,
        compression: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> QASSO:
        """Make the optimizer to train with: `optimizer_class(model.parameters(), **options)`, wrapped in QASSO.

        total_steps: planned optimizer steps; or give a whole `schedule` instead.
        compression: further settings of `geta.QASSO` by name, e.g. `{"quant_lr": 1e-4, "saliency": ...}`.
        options:     settings of the base optimizer, e.g. `lr=1e-3`.

        Raises ConfigError when called twice, or when not exactly one of `total_steps` and `schedule` is given.
        """
        plan = self._plan(total_steps, schedule)
        return self._wrapped(optimizer_class(self.model.parameters(), **options), plan, compression or {})

    def wrap(
        self,
        base: torch.optim.Optimizer,
        *,
        total_steps: int | None = None,
        schedule: Schedule | None = None,
        compression: Mapping[str, Any] | None = None,
    ) -> QASSO:
        """The same around an optimizer that exists already, for training code that makes its own (parameter groups, Lightning, Trainer).

        base: any torch optimizer over the model's parameters, made after this compressor; without a learning-rate scheduler yet, because
              quantizers get a parameter group of their own here. The other arguments: as in `optimizer`, with the same errors.
        """
        return self._wrapped(base, self._plan(total_steps, schedule), compression or {})

    def _plan(self, total_steps: int | None, schedule: Schedule | None) -> Schedule:
        if self._optimizer is not None:
            raise ConfigError("this compressor already has its optimizer: make a new Compressor for another run")
        if (total_steps is None) == (schedule is None):
            raise ConfigError("give exactly one of total_steps=... (the default schedule of that length) and schedule=geta.Schedule(...)")
        return schedule if schedule is not None else Schedule(total_steps=total_steps or 0)

    def _wrapped(self, base: torch.optim.Optimizer, plan: Schedule, compression: Mapping[str, Any]) -> QASSO:
        self._optimizer = QASSO(
            base,
            self.graph,
            sparsity=self._sparsity,
            target=self._target,
            layer_sparsity=self._layer_sparsity,
            schedule=plan,
            multiple_of=self._multiple_of,
            uniform=self._uniform,
            **compression,
        )
        return self._optimizer

    @property
    def trained_by(self) -> QASSO | None:
        """The optimizer that `optimizer` or `wrap` made; None before."""
        return self._optimizer

    def progress(self) -> dict[str, Any] | None:
        """`QASSO.progress()` of the run: step, stage, groups, mean bits; None as long as there is no optimizer."""
        return None if self._optimizer is None else self._optimizer.progress()

    @overload
    def finish(self, product: Literal["graph"] = "graph") -> CompactModel: ...

    @overload
    def finish(self, product: Literal["eager", "auto"]) -> nn.Module: ...

    def finish(self, product: Product = "graph") -> nn.Module:
        """Build the compact network from the trained model, verified against it.

        product: "graph", a `CompactModel`; "eager", a smaller instance of the model's own class; "auto", that one if there is one:
                 see `geta.compact`.

        Raises ConfigError when there is no optimizer yet or training has not reached the cool-down, the stage in which the
        removed groups are zero and every bit width is an integer; GetaError when the network costs more than the budget.
        """
        self.check()
        model, graph = self.gathered()
        with own_forward(model):
            small = compact(model, graph, product=product)
            if self._target is not None and self._optimizer is not None:
                counted = small if isinstance(small, CompactModel) else compact(model, graph)  # whose integers a budget counts
                self._optimizer.check_cost(counted.cost)
        return small

    def expect_sharding(self, skeleton: Skeleton) -> None:
        """Note that the model's parameters are about to be spread over ranks, see `geta.integrations.sharding.prepare_sharding`."""
        if self._target is not None and self._optimizer is None:
            self._target = self._target.bind(self.graph)
        self._skeleton = skeleton

    def gathered(self) -> tuple[nn.Module, DependencyGraph]:
        """The trained model and its graph, as `geta.compact` and `geta.save_pretrained` take them.

        Where accelerate has sharded the model, a whole copy on every rank and on the device that the model was on before: a collective
        operation, which needs memory for all weights. Otherwise the model itself.
        """
        return (self.model, self.graph) if self._skeleton is None else gathered(self._skeleton, self.model, self.graph)

    def check(self) -> None:
        """Assert that training has kept what was promised: exactly K zero groups, integer bit widths in their ranges, costs as planned.

        Raises what `finish` raises.
        """
        if self._optimizer is None:
            raise ConfigError("nothing was trained: call optimizer(...), train the model with it, then finish()")
        if self._optimizer.stage != "cool-down":
            now = self._optimizer.progress()
            raise ConfigError(
                f"training stopped in stage '{self._optimizer.stage}' at step {now['step']}: groups and bit widths are final only in the "
                "cool-down; train on, or plan fewer total_steps"
            )
        self._optimizer.check()
