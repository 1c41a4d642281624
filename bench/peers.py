"""One classifier, pruned by half with geta and with torch-pruning, from the same weights and judged on the same fresh inputs.

Each tool's pruned model is compared with the dense one after zeroing what that very tool removed. For geta that is
`graph.zero_`. For torch-pruning it is read off the groups that its pruner hands out: every (layer, pruning function, indices)
whose function removes *output* channels has the rows of its weight and bias set to zero, for a normalization its weight and
bias. If the coupling is right, the columns that were removed along with them have only zeros to read.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

import geta
from geta.subnet import CompactModel
from geta.subnet.comparison import max_difference, widened

from .facts import deadline
from .zoo.catalogue import find
from .zoo.check import Record
from .zoo.entry import Entry
from .zoo.parts import TOLERANCE, Figures, Inputs, outputs
from .zoo.perturb import fresh_inputs, perturb

RATIO = 0.5
SEED = 1
LIMIT = 240.0
CLASSES = 1000
_FRESH_SEED = 11
_NORMS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Removal:
    """One entry of a group of torch-pruning: `indices` of the current (already pruned) output channels of `owner` go.

    owner: module path, or parameter name where torch-pruning prunes a parameter of its own; dim: of a parameter, else 0.
    """

    owner: str
    indices: tuple[int, ...]
    parameter: bool = False
    dim: int = 0


def in_child(pipe: Connection, name: str, threads: int) -> None:
    """What a forked process does: compare, send the record."""
    torch.set_num_threads(threads)
    pipe.send(compare_tools(find(name)))


def compare_tools(entry: Entry, limit: float = LIMIT, *, debug: bool = False) -> dict[str, Any]:
    """All parts of both tools on one model; a part that raises, or takes over `limit` seconds, is recorded with its error."""
    record = Record(entry.name, debug=debug)

    def build() -> tuple[nn.Module, Inputs, Figures]:
        model, args, kwargs = entry.build()
        perturb(model, args, kwargs)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model, (args, kwargs), {"parameters": _size(model)}

    built = record.run("build", build)
    if built is not None:
        _warm_up()
        model, inputs, _ = built
        _geta(record, model, inputs, limit)
        _torch_pruning(record, model, inputs, limit)
    return record.to_json()


def _geta(record: Record, model: nn.Module, inputs: Inputs, limit: float) -> None:
    def analyze() -> geta.DependencyGraph:
        with deadline(limit):
            return geta.analyze(model, *inputs)

    graph = record.run("geta analyze", analyze)
    if graph is None:
        return
    selection = graph.random_selection(RATIO, seed=SEED)

    def prune() -> tuple[CompactModel, Figures]:
        with deadline(limit):
            small = geta.compact(model, graph, selection, verify=False)
        return small, {"parameters": _size(small)}

    done = record.run("geta prune", prune)
    if done is None:
        return

    def compare() -> Figures:
        zeroed = copy.deepcopy(model)
        graph.zero_(zeroed, selection)
        return _difference(model, zeroed, done[0].eval(), inputs)

    record.run("geta compare", compare)


def _torch_pruning(record: Record, model: nn.Module, inputs: Inputs, limit: float) -> None:
    pruned = copy.deepcopy(model)
    torch.manual_seed(SEED)

    def analyze() -> Any:
        with deadline(limit):
            return _pruner(pruned, inputs)

    pruner = record.run("torch-pruning analyze", analyze)
    if pruner is None:
        return
    removals: list[Removal] = []

    def prune() -> Figures:
        with deadline(limit):
            seconds = _step(pruner, pruned, removals)
        _tell_width(pruned)
        return {"pruning_seconds": round(seconds, 3), "parameters": _size(pruned)}

    if record.run("torch-pruning prune", prune) is None:
        return

    def runs() -> Figures:
        outputs(pruned, inputs)
        return {}

    if record.run("torch-pruning run", runs) is None:
        return

    def compare() -> Figures:
        zeroed = copy.deepcopy(model)
        zero_removed(zeroed, removals)
        return _difference(model, zeroed, pruned, inputs)

    record.run("torch-pruning compare", compare)


def _pruner(model: nn.Module, inputs: Inputs) -> Any:
    """Set up as its README and its own script for torchvision say: classifier ignored, widths of a ViT rounded to its heads, batch 1."""
    import torch_pruning as tp
    from torchvision.models import VisionTransformer

    ignored = [module for module in model.modules() if CLASSES in (getattr(module, "out_features", 0), getattr(module, "out_channels", 0))]
    ignored += [module for module in model.modules() if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)]
    heads = next((module.num_heads for module in model.modules() if isinstance(module, nn.MultiheadAttention)), None)
    return tp.pruner.BasePruner(
        model,
        inputs[0][0][:1],
        importance=tp.importance.RandomImportance(),
        pruning_ratio=RATIO,
        ignored_layers=ignored,
        round_to=heads if isinstance(model, VisionTransformer) else None,
        in_channel_groups={},  # its defaults are one dict that all pruners of a process write into
        out_channel_groups={},
    )


def _step(pruner: Any, model: nn.Module, removals: list[Removal]) -> float:
    """Prune group by group, note what each group removes, return the seconds of the pruning alone."""
    groups = iter(pruner.step(interactive=True))
    seconds = 0.0
    while True:
        started = time.perf_counter()
        group = next(groups, None)
        seconds += time.perf_counter() - started
        if group is None:
            return seconds
        removals += _removals(pruner.DG, model, group)
        started = time.perf_counter()
        group.prune()
        seconds += time.perf_counter() - started


def _removals(graph: Any, model: nn.Module, group: Any) -> list[Removal]:
    modules = {id(module): path for path, module in model.named_modules()}
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for dependency, indices in group:
        target = dependency.target.module
        plain = tuple(int(getattr(index, "idx", index)) for index in indices)
        if id(target) in parameters:
            found.append(Removal(parameters[id(target)], plain, parameter=True, dim=dependency.target.pruning_dim))
        elif id(target) in modules and graph.is_out_channel_pruning_fn(dependency.handler):
            found.append(Removal(modules[id(target)], plain))
    return found


def _tell_width(model: nn.Module) -> None:
    """torchvision's ViT reads its width from an attribute, which torch-pruning leaves to its user."""
    from torchvision.models import VisionTransformer

    if isinstance(model, VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels


def zero_removed(model: nn.Module, removals: Sequence[Removal]) -> None:
    """Zero, in the dense `model`, the output slices that `removals` took away one after another.

    Later removals count the channels that earlier ones left. Raises ValueError for an index that is no longer there, TypeError
    for a kind of module whose outputs this function doesn't know.
    """
    alive: dict[tuple[str, int], list[int]] = {}
    for removal in removals:
        slices = _slices(model, removal)
        if not slices:
            continue
        tensor, dim, blocks = slices[0]
        width = tensor.shape[dim] // blocks
        left = alive.setdefault((removal.owner, dim), list(range(width)))
        if any(not 0 <= index < len(left) for index in removal.indices):
            raise ValueError(f"'{removal.owner}' has {len(left)} channels left, torch-pruning removes number {max(removal.indices)}")
        gone = [left[index] for index in removal.indices]
        alive[removal.owner, dim] = sorted(set(left) - set(gone))
        with torch.no_grad():
            for tensor, dim, blocks in slices:
                rows = [block * width + index for block, index in itertools.product(range(blocks), gone)]
                tensor.index_fill_(dim, torch.tensor(rows, dtype=torch.long), 0)


def _slices(model: nn.Module, removal: Removal) -> list[tuple[Tensor, int, int]]:
    """(tensor, dimension, how many times the channels are repeated along it) that an output channel of the owner lives in."""
    if removal.parameter:
        parameter = model.get_parameter(removal.owner)
        return [(parameter, removal.dim % parameter.dim(), 1)]
    module = model.get_submodule(removal.owner)
    if isinstance(module, _ConvNd):
        found: list[tuple[Any, int, int]] = [(module.weight, int(module.transposed), 1), (module.bias, 0, 1)]
    elif isinstance(module, (nn.Linear, *_NORMS)):
        last = module.weight.dim() - 1 if isinstance(module, nn.LayerNorm) and module.elementwise_affine else 0
        found = [(module.weight, last, 1), (module.bias, last, 1)]
    elif isinstance(module, nn.Embedding):
        found = [(module.weight, 1, 1)]
    elif isinstance(module, nn.MultiheadAttention):
        projection = module.out_proj
        found = [(projection.weight, 0, 1), (projection.bias, 0, 1), (module.in_proj_weight, 0, 3), (module.in_proj_bias, 0, 3)]
    elif next(module.parameters(), None) is None or isinstance(module, nn.PReLU):
        found = []
    else:
        raise TypeError(f"'{removal.owner}' is a {type(module).__name__}: which of its rows make a channel is not known here")
    return [(tensor, dim, blocks) for tensor, dim, blocks in found if tensor is not None]


def _difference(dense: nn.Module, zeroed: nn.Module, small: nn.Module, inputs: Inputs) -> Figures:
    """max |a - b| / max |a| on inputs that neither has seen; over the tolerance it is taken again in float64.

    effect: how far zeroing moves the dense model's output, in the same measure.
    """
    fresh = fresh_inputs(*inputs, _FRESH_SEED)
    expected = outputs(zeroed, fresh)
    difference = max_difference(expected, outputs(small, fresh))[1]
    figures: Figures = {"difference": difference, "effect": max_difference(outputs(dense, fresh), expected)[1]}
    if not difference <= TOLERANCE[torch.float32]:
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, Tensor.double, fresh)
        wide = widened(small) if isinstance(small, CompactModel) else copy.deepcopy(small).double()
        figures["difference64"] = max_difference(outputs(zeroed.double(), (args, kwargs)), outputs(wide, (args, kwargs)))[1]
    return figures


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _warm_up() -> None:
    """Both tools once on a tiny network, so that neither pays for what is loaded at first use."""
    tiny = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(144, CLASSES)).eval()
    inputs: Inputs = ((torch.randn(2, 3, 8, 8),), {})
    graph = geta.analyze(tiny, *inputs)
    geta.compact(tiny, graph, graph.random_selection(RATIO), verify=False)
    _step(_pruner(tiny, inputs), tiny, [])
