"""The record of an analysis: families, selections over them, and how to zero them in a model."""

from __future__ import annotations

import functools
import gc
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from geta.devices import resolve_multiple
from geta.errors import BadModelError, ConfigError
from geta.graph.branches import QuantizerBranch, find_branches
from geta.graph.capture import Capture, capture, check_inputs
from geta.graph.configured import tied
from geta.graph.coupling import build_families
from geta.graph.depth import ResidualBranch, find_residual_branches, layer_families
from geta.graph.elements import with_blocks
from geta.graph.explain import Explanation, explain
from geta.graph.families import Family, Member, Selection, layer_units
from geta.graph.fingerprint import fingerprint
from geta.graph.gates import with_gates
from geta.graph.limits import Limits, protect_tensors, protection, restrict, suggest, unused_granularity
from geta.graph.names import find_tensor, first_names, unwrap
from geta.graph.page import build_page
from geta.graph.preserve import garbage_kept
from geta.graph.propagate import Propagation, propagate
from geta.graph.render import to_dot, to_table
from geta.graph.solver import Partition, Solver
from geta.graph.view import GraphView, build_view

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Example:
    """The inputs and options that a model was analysed with; kept so that it can be analysed again after quantizers are attached."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any
    exact: bool
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class DependencyGraph:
    """What can be removed from a model, and why the rest can't. Made by `analyze`; holds no copy of the model."""

    model: nn.Module = field(repr=False)
    families: list[Family]
    notes: list[str]
    example: Example = field(repr=False)
    analysis: Analysis = field(repr=False)  # the labels behind the families, in evaluation mode
    quantizers: tuple[QuantizerBranch, ...] = ()
    analyses: dict[bool, tuple[tuple[Any, ...], Analysis]] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def view(self) -> GraphView:
        """What a page shows of the operators."""
        return build_view(self.analysis, self.families)

    @property
    def prunable_families(self) -> list[Family]:
        return [family for family in self.families if family.prunable]

    @property
    def num_groups(self) -> int:
        """Prunable groups in all."""
        return sum(family.size for family in self.prunable_families)

    def __str__(self) -> str:
        return to_table(self)

    def to_dot(self) -> str:
        """Families and the modules they touch, for Graphviz."""
        return to_dot(self)

    def to_json(self) -> str:
        """A stable description without index maps: format 1, see docs/json-format.md."""
        families = [
            {
                **family.summary(),
                "removes": list(family.removes),
                "block": family.block,
                "members": [
                    {"param": m.param, "dim": m.dim, "rows_per_group": int(m.index.shape[1]), "role": m.role, "zero": m.zero}
                    for m in family.members
                ],
            }
            for family in self.families
        ]
        quantizers = [branch.to_json() for branch in self.quantizers]
        record = {"format": 1, "num_groups": self.num_groups, "notes": self.notes, "families": families, "quantizers": quantizers}
        return json.dumps(record, indent=1)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page that shows the operators and the families; it needs no network and no server.

        Raises GetaError when the folder of `path` can't be written.
        """
        from geta.report.files import prepare_folder, write_atomically

        target = Path(path)
        prepare_folder(target.parent)
        write_atomically(target, build_page(self).encode())

    def plot(self, most: int = 30) -> Figure:
        """Families as bars: how many groups each has, the parameters in their rows and columns, and why the others stay.

        most: so many families get bars of their own, those with most parameters; the rest is summed by what may happen to it.
        Returns a matplotlib figure that `pyplot` doesn't know: `figure.savefig(...)`. Raises GetaError when matplotlib is missing
        (`pip install 'geta[plots]'`), ConfigError for a `most` below 1.
        """
        from geta.graph.plot import plot_graph

        return plot_graph(self, most)

    def explain(self, name: str, dim: int, index: int) -> Explanation:
        """What would removing index `index` of dimension `dim` of a tensor remove, or why can't it go and how did that come about?

        name: a tensor (`layer1.0.conv1.weight`), or a module (`layer1.0.conv1`), which stands for its weight; or a family of a whole
            residual branch (`layer1.0 (layer)`), with dim and index 0.
        dim:  0 = the channels (neurons, heads) that a convolution or linear layer makes, 1 = those that it reads.
        Print the result, or read its fields. Raises ConfigError for a name, dimension or index that the model hasn't got.
        """
        return explain(self, name, dim, index)

    def random_selection(
        self, sparsity: float | tuple[float, float] = 0.5, seed: int = 0, multiple_of: int | str = 1, *, uniform: bool = False
    ) -> dict[str, torch.Tensor]:
        """Remove a random share of every prunable family: {family name: BoolTensor[n], True = remove}.

        sparsity: the share, at least 0 and below 1; or a range (lowest, highest) from which each family draws its own.
        multiple_of: the number kept is a multiple of this (or the whole family) and never zero. The name of a `geta.device_profile`
            instead of a number aligns channels: of heads with 64 channels each any number is a multiple of 16 channels.
        uniform: families that repeat across layers (`geta.graph.configured.tied`) draw one share together and lose equal numbers.

        Of whole residual branches (`analyze(depth=True)`) the share of all of them goes, but never all of a set: see `layer_units`. With
        `uniform` whole blocks go, as many as the share has room for; branches that are part of none stay, and don't count.
        """
        low, high = sparsity if isinstance(sparsity, tuple) else (sparsity, sparsity)
        if not 0 <= low <= high < 1:
            raise ConfigError(f"sparsity is {sparsity}; it must be at least 0 and below 1 (a range: its lower end first)")
        resolve_multiple(multiple_of)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        shares: dict[str, float] = {}
        families, layers = ([f for f in self.prunable_families if f.is_layer is wanted] for wanted in (False, True))
        for tie in (tied(self.model, families) if uniform else [[family] for family in families]) if low < high else ():
            drawn = low + (high - low) * float(torch.rand((), generator=generator, device="cpu", dtype=torch.float64))
            shares.update({family.name: drawn for family in tie})
        selection = {}
        for family in families:
            order = torch.randperm(family.size, generator=generator, device="cpu")
            remove = torch.zeros(family.size, dtype=torch.bool, device="cpu")
            remove[order[family.kept(shares.get(family.name, low), multiple_of) :]] = True
            selection[family.name] = remove
        return {**selection, **_random_layers(layers, (low, high), generator, uniform=uniform)}

    def check_selection(self, selection: Selection) -> None:
        """Raise ConfigError for unknown families, wrong sizes, unprunable or emptied families."""
        known = {family.name: family for family in self.families}
        for name, remove in selection.items():
            if name not in known:
                raise ConfigError(f"selection names a family '{name}' that this graph does not have; see graph.families")
            family = known[name]
            if tuple(remove.shape) != (family.size,) or remove.dtype != torch.bool:
                raise ConfigError(f"selection['{name}'] must be a BoolTensor[{family.size}], got {remove.dtype} {tuple(remove.shape)}")
            if bool(remove.any()) and not family.prunable:
                raise ConfigError(f"family '{name}' can't be pruned: it {family.reason}")
            if family.prunable and not family.is_layer and bool(remove.all()):
                raise ConfigError(f"selection['{name}'] removes all {family.size} {family.unit}; keep at least one")

    def zero_(self, model: nn.Module, selection: Selection) -> None:
        """Zero, in place, exactly the slices that removing the selected groups needs to be zero."""
        self.check_selection(selection)
        with torch.no_grad():
            for family in self.families:
                remove = selection.get(family.name)
                if remove is None or not bool(remove.any()):
                    continue
                for member in family.zeroed:
                    tensor = _owned(model, member)
                    rows = member.index[remove].reshape(-1).to(tensor.device)
                    tensor.index_fill_(member.dim, rows, 0)

    def zero_groups(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The groups of which every slice that removal needs is zero in `model` right now."""
        selection = {}
        for family in self.prunable_families:
            zero = torch.ones(family.size, dtype=torch.bool, device="cpu")
            for member in family.zeroed:
                tensor = _owned(model, member).detach()
                others = [dim for dim in range(tensor.dim()) if dim != member.dim]
                still = (tensor == 0).cpu()
                for dim in reversed(others):
                    still = still.all(dim)
                zero &= still[member.index].all(1)
            selection[family.name] = zero
        return selection


def _random_layers(
    layers: list[Family], share: tuple[float, float], generator: torch.Generator, *, uniform: bool
) -> dict[str, torch.Tensor]:
    """A random share of the residual branches, of each set all but one at most."""
    if not layers:
        return {}
    drawn = share[0] + (share[1] - share[0]) * float(torch.rand((), generator=generator, device="cpu", dtype=torch.float64))
    sets = layer_units(layers, uniform=uniform)
    able = [[family.name for family in unit] for one in sets for unit in _shuffled(one, generator)[1:]]
    most = int(drawn * sum(len(unit) for one in sets for unit in one))
    gone: set[str] = set()
    for unit in _shuffled(able, generator):
        if len(gone) + len(unit) <= most:
            gone.update(unit)
    return {family.name: torch.tensor([family.name in gone], device="cpu") for family in layers}


def _shuffled(items: list[_Item], generator: torch.Generator) -> list[_Item]:
    return [items[place] for place in torch.randperm(len(items), generator=generator, device="cpu").tolist()]


def _owned(model: nn.Module, member: Member) -> torch.Tensor:
    """The tensor of a member; raises BadModelError when the model's is too small to be the analysed one."""
    tensor = find_tensor(model, member.param)
    if tensor.dim() <= member.dim or tensor.shape[member.dim] <= int(member.index.max()):
        raise BadModelError(
            f"'{member.param}' has shape {tuple(tensor.shape)}, too small for the graph, which uses index {int(member.index.max())} of "
            f"dimension {member.dim}: was the graph made from another model?"
        )
    return tensor


@dataclass(frozen=True)
class Analysis:
    """A capture with its labels solved: all that rewriting the graph needs. branches: residual ones, if they were asked for."""

    capture: Capture
    propagation: Propagation
    partition: Partition
    branches: tuple[ResidualBranch, ...] = ()


def analyse_capture(model: nn.Module, captured: Capture, *, exact: bool, limits: Limits | None = None) -> Analysis:
    """Propagate labels through a capture and solve them."""
    limits, first = limits or Limits(), first_names(model)
    with garbage_kept():
        found = propagate(captured, lambda name: first.get(name, name), limits.granularity_at)
        protect_tensors(found, model, limits)
        branches = find_residual_branches(captured, model) if limits.depth else ()
        return Analysis(captured, found, Solver(found.space.size, found.constraints, exact=exact).solve(), branches)


def analysed(model: nn.Module, graph: DependencyGraph, *, train: bool) -> Analysis:
    """The model as it is now, captured and solved on the example inputs of the graph; an earlier capture serves if nothing changed."""
    example, now = graph.example, fingerprint(model)
    known = graph.analyses.get(train)
    if known is not None and known[0] == now:
        return known[1]
    captured = capture(model, example.args, example.kwargs, dynamic_shapes=example.dynamic_shapes, train=train)
    found = analyse_capture(model, captured, exact=example.exact, limits=example.limits)
    if model is graph.model:
        graph.analyses[train] = (now, found)
    return found


def analyze(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    exact: bool = True,
    dynamic_shapes: Any = None,
    protect: Sequence[str] | str = (),
    prune: Sequence[str] | str | None = None,
    granularity: Mapping[str, str] | str | None = None,
    depth: bool = False,
) -> DependencyGraph:
    """Find which parameter indices of `model` live and die together.

    model:  any module that `torch.export` can capture; its mode and weights are left as they are (meta device works).
    args, kwargs: example inputs, as in `model(*args, **kwargs)`.
    exact:  True = a family is prunable only if zeroing a group gives exactly the output of the model without it.
            False = also allows dimensions that a mean or a LayerNorm runs over; such families say so in `inexact`.
    dynamic_shapes: as for `torch.export.export`; None = the batch dimension is left open where the model allows it.
    protect: globs of tensors that keep their shape (`"head"`, `"layer1.*"`, `"*.attn"`, `"encoder.fc.weight"`): matched with
            full tensor names and with the paths of the modules around them, so a module's glob covers all that is inside it.
            `"*.lora_A.*:0"` protects only dimension 0 of them, here the ranks of low-rank adapters.
    prune:  the units to prune, as `Family.unit` has them ("channels", "heads", "neurons", "norm groups" ...; "heads" covers
            key-value groups); families of other units stay. None = all.
    granularity: what one group is, for the whole model or as {glob of module paths: value}; the first glob that matches counts.
            "head" = whole attention heads (what attention asks for by default); "head_dim" = the same position inside all
            heads of a layer; "group" = whole groups of a grouped convolution; "channel" = the same channel of all its groups
            (the default where a group has several).
    depth:  True = a residual branch, f in x + f(x), may go as a whole: families of one group with the unit "layers", see
            `geta.graph.depth`; `protect` keeps branches with a protected tensor, `prune` has to name "layers" if it is given.
    Raises BadModelError if the model can't be captured on these inputs, ConfigError for a glob that matches nothing and for
    units and granularities that don't exist.

    Source: QADG analysis, GETA (arXiv 2502.16638) section 4. Deviation: coupling comes from labels propagated through
    ATen operators, not from a table of module classes.
    """
    model = unwrap(model)
    args, kwargs = check_inputs(model, args, kwargs)
    limits = Limits.of(protect, prune, granularity, depth=depth)
    limits.check(model)
    with _collecting_later():
        captured = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        solved = analyse_capture(model, captured, exact=exact, limits=limits)
        found = solved.propagation
        layers = layer_families(solved.branches, model, protection(model, limits))
        families = restrict([*build_families(found, solved.partition, model), *layers], limits)
        families = with_gates(suggest(families, found, limits, _loosened(solved) if exact else None), captured)
        families = with_blocks(families, solved.branches, captured, model)
        notes = [*captured.notes, *unused_granularity(found, limits)]
        example = Example(args, kwargs, dynamic_shapes, exact, limits)
        known = {False: (fingerprint(model), solved)}
        return DependencyGraph(model, families, notes, example, solved, find_branches(captured), known)


@contextmanager
def _collecting_later() -> Iterator[None]:
    """No automatic garbage collection: it would go through all that is imported, for a tenth of the time, and find next to nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _loosened(solved: Analysis) -> Partition | None:
    """What `exact=False` would find; None where it makes no difference."""
    found, strict = solved.propagation, solved.partition
    if not any(freeze.soft for freeze in found.constraints.freezes):
        return None
    if not strict.swayed:  # the same groups, so nothing has to be solved again
        return replace(strict, frozen={root: reason for root, reason in strict.frozen.items() if root in strict.firm})
    return Solver(found.space.size, found.constraints, exact=False).solve()
