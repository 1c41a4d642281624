"""From a recipe to networks and optimizers that are ready to be trained; the same every time, so that a run can be resumed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import geta
from geta.graph import DependencyGraph
from geta.optim import HESSO, HESSOCRIC, QASSO
from geta.quant import end_layers
from geta.recipes.batches import Data
from geta.recipes.compress_settings import CompressSettings, read_bits
from geta.recipes.norms import set_momentum, warm_norms
from geta.recipes.order import Batches
from geta.recipes.processes import Place
from geta.recipes.recipe import Recipe
from geta.recipes.record import board_class
from geta.recipes.sources import build_model
from geta.recipes.tasks.task import Call, Task
from geta.report.run_files import analysis_files

EXAMPLES = 2
"""In the example inputs, for which costs are counted: the smallest batch with which the captured batch size stays free."""

Compressing = QASSO | HESSO | HESSOCRIC


@dataclass(frozen=True)
class Job:
    """Everything that a run trains and measures with.

    dense:    the network that is trained plainly; None without a baseline. Both start from the same weights.
    model:    the network that compresses itself, quantizers attached; optimizer: what prunes and narrows it.
    analysis: name -> text of the files that tell about the float network's graph.
    cost, state_bytes: what the float network costs, and its tensors' bytes.
    example:  inputs of two examples, as the networks are called.
    """

    recipe: Recipe
    place: Place
    data: Data
    task: Task
    batches: Batches
    dense: nn.Module | None
    model: nn.Module
    graph: DependencyGraph
    optimizer: Compressing
    analysis: Mapping[str, str]
    cost: geta.Cost
    state_bytes: int
    example: Call

    @property
    def evaluation_batch(self) -> int:
        """How many examples of the test split are looked at together."""
        train = self.recipe.train
        return self.task.evaluation_batch or train.evaluation_batch or train.batch_size

    def float_network(self) -> nn.Module:
        """A float network of full size on the CPU, in evaluation mode: the trained one where there is a baseline."""
        found = build_model(self.recipe.model, self.data.facts) if self.dense is None else self.dense
        return found.to("cpu").eval()

    def base_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The recipe's optimizer over all parameters of a network."""
        return self.recipe.train.optimizer.build(model.parameters())


def prepare(recipe: Recipe, place: Place) -> Job:
    """Load the data, build the network twice from one seed, analyse and quantize one of them, make its optimizer.

    Raises whatever these steps raise, before anything is trained.
    """
    if recipe.output.tensorboard:
        board_class()
    data, task = recipe.data.load(), recipe.task
    batches = Batches(data.train, recipe.train, place.rank, place.ranks)
    settings, steps = recipe.compress, batches.total_steps
    stages = settings.schedule.build(steps)

    geta.seed_everything(recipe.train.seed)
    model = build_model(recipe.model, data.facts).train()
    if recipe.train.norm_momentum is not None:
        set_momentum(model, recipe.train.norm_momentum)
    dense = copy.deepcopy(model).to(place.device) if recipe.baseline else None
    args, kwargs = example = task.call(data.train.batch(range(EXAMPLES)))
    graph = geta.analyze(
        model,
        args,
        kwargs,
        exact=settings.exact,
        depth=settings.depth,
        protect=settings.protect,
        prune=settings.prune,
        granularity=settings.prune_granularity,
    )
    analysis, cost = analysis_files(graph), geta.cost(model, args, kwargs)
    state_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    model.to(place.device)
    if settings.quantized:
        calls = [place.move(task.call(batches[number])) for number in range(settings.calibration_batches)]
        warm_norms(model, calls)
        quantize(model, graph, settings, calls)
    base = recipe.train.optimizer.build(model.parameters())
    optimizer = make_optimizer(base, graph, settings, stages)
    return Job(recipe, place, data, task, batches, dense, model, graph, optimizer, analysis, cost, state_bytes, example)


def quantize(model: nn.Module, graph: DependencyGraph, settings: CompressSettings, calls: list[Call]) -> None:
    """Attach the quantizers that a recipe asks for, with ranges from these calls."""
    excluded: dict[str, Any] = {} if settings.exclude is None else {"exclude": settings.exclude}
    ends = None if settings.end_bits is None else dict.fromkeys(end_layers(graph, **excluded), read_bits(settings.end_bits))
    activations = None if settings.activation_bits is None else read_bits(settings.activation_bits)
    geta.quantize(
        model,
        weights=None if settings.weight_bits is None else read_bits(settings.weight_bits),
        activations=activations,
        surrogate=settings.surrogate.build(),
        granularity=settings.granularity,
        group_size=settings.group_size,
        bits_of=ends,
        calibration=None if activations is None else [_as_batch(model, call) for call in calls],
        calibration_batches=settings.calibration_batches,
        percentile=settings.percentile,
        nonlinear=settings.nonlinear,
        initial_bits=settings.initial_bits,
        results_of=graph if settings.results else None,
        **excluded,
    )


def make_optimizer(base: torch.optim.Optimizer, graph: DependencyGraph, settings: CompressSettings, stages: geta.Schedule) -> Compressing:
    """The optimizer that compresses, around `base`."""
    common: dict[str, Any] = {
        "sparsity": settings.sparsity,
        "target": None if settings.target is None else settings.target.build(),
        "schedule": stages,
        "multiple_of": settings.multiple_of,
        "uniform": settings.uniform,
        "layer_sparsity": settings.layer_sparsity,
        "saliency": settings.criteria(),
    }
    if settings.method == "hesso":
        return HESSO(base, graph, **common)
    if settings.method == "hesso-cric":
        return HESSOCRIC(
            base,
            graph,
            **common,
            max_cycles=settings.max_cycles,
            sampling_steps=settings.sampling_steps,
            tolerance=settings.tolerance,
            hybrid_steps=settings.hybrid_steps,
            probe_weight=settings.probe_weight,
        )
    return QASSO(
        base, graph, **common, quant_lr=settings.quant_lr, forgetting=settings.forgetting, tighten=settings.tighten, follow=settings.follow
    )


def _as_batch(model: nn.Module, call: Call) -> Any:
    """One call as calibration takes it: positional inputs, or named ones."""
    args, kwargs = call
    if not kwargs:
        return tuple(args)
    bound: Mapping[str, Any] = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
    return dict(bound)
