"""The record of an analysis: families, selections over them, and how to zero them in a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from geta.errors import BadModelError, ConfigError
from geta.graph.capture import Capture, capture, check_inputs
from geta.graph.coupling import build_families
from geta.graph.families import Family, Member, Selection
from geta.graph.names import canonical_name, find_tensor
from geta.graph.propagate import Propagation, propagate
from geta.graph.render import to_dot, to_table
from geta.graph.solver import Partition, Solver


@dataclass(frozen=True)
class Example:
    """The inputs that a model was analysed with; kept so that it can be captured again after quantizers are attached."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic_shapes: Any
    exact: bool


@dataclass(frozen=True)
class DependencyGraph:
    """What can be removed from a model, and why the rest can't. Made by `analyze`; holds no copy of the model."""

    model: nn.Module = field(repr=False)
    families: list[Family]
    notes: list[str]
    example: Example = field(repr=False)

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
        """A stable description without index maps: format 1, see docs/how-it-works.md."""
        families = [
            {
                "name": family.name,
                "unit": family.unit,
                "size": family.size,
                "prunable": family.prunable,
                "reason": family.reason,
                "inexact": family.inexact,
                "members": [
                    {"param": m.param, "dim": m.dim, "rows_per_group": int(m.index.shape[1]), "role": m.role, "zero": m.zero}
                    for m in family.members
                ],
            }
            for family in self.families
        ]
        record = {"format": 1, "num_groups": self.num_groups, "notes": self.notes, "families": families}
        return json.dumps(record, indent=1)

    def random_selection(self, sparsity: float = 0.5, seed: int = 0, multiple_of: int = 1) -> dict[str, torch.Tensor]:
        """Remove a random share of every prunable family: {family name: BoolTensor[n], True = remove}.

        The number kept is a multiple of `multiple_of` (or the whole family) and never zero.
        """
        if not 0 <= sparsity < 1:
            raise ConfigError(f"sparsity is {sparsity}; it must be at least 0 and below 1")
        if multiple_of < 1:
            raise ConfigError(f"multiple_of is {multiple_of}; it must be at least 1")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        selection = {}
        for family in self.prunable_families:
            kept = max(1, family.size - int(sparsity * family.size))
            kept = min(-(-kept // multiple_of) * multiple_of, family.size)
            order = torch.randperm(family.size, generator=generator, device="cpu")
            remove = torch.zeros(family.size, dtype=torch.bool, device="cpu")
            remove[order[kept:]] = True
            selection[family.name] = remove
        return selection

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
            if family.prunable and bool(remove.all()):
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
    """A capture with its labels solved: all that rewriting the graph needs."""

    capture: Capture
    propagation: Propagation
    partition: Partition


def analyse_capture(model: nn.Module, captured: Capture, *, exact: bool) -> Analysis:
    """Propagate labels through a capture and solve them."""
    found = propagate(captured, _tied_names(model))
    return Analysis(captured, found, Solver(found.space.size, found.constraints, exact=exact).solve())


def analyze(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    exact: bool = True,
    dynamic_shapes: Any = None,
) -> DependencyGraph:
    """Find which parameter indices of `model` live and die together.

    model:  any module that `torch.export` can capture; its mode and weights are left as they are (meta device works).
    args, kwargs: example inputs, as in `model(*args, **kwargs)`.
    exact:  True = a family is prunable only if zeroing a group gives exactly the output of the model without it.
            False = also allows dimensions that a mean or a LayerNorm runs over; such families say so in `inexact`.
    dynamic_shapes: as for `torch.export.export`; None = the batch dimension is left open where the model allows it.
    Raises BadModelError if the model can't be captured on these inputs.

    Source: QADG analysis, GETA (arXiv 2502.16638) section 4. Deviation: coupling comes from labels propagated through
    ATen operators, not from a table of module classes.
    """
    args, kwargs = check_inputs(model, args, kwargs)
    captured = capture(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    solved = analyse_capture(model, captured, exact=exact)
    families = build_families(solved.propagation, solved.partition, model)
    return DependencyGraph(model, families, list(captured.notes), Example(args, kwargs, dynamic_shapes, exact))


def _tied_names(model: nn.Module) -> Any:
    """name -> the first name under which the same tensor is registered."""
    first: dict[int, str] = {}
    same: dict[str, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        same[canonical_name(name)] = first.setdefault(id(tensor), canonical_name(name))
    return lambda name: same.get(name, name)
