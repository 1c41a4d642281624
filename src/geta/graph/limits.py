"""What the user allows: protected tensors, kinds of families, granularity; and what would make more families prunable.

Legend: a *glob* is matched with `fnmatch` (case-sensitive, `*` also crosses dots) against a tensor's full name and against the
path of every module that contains it, so `layer1` and `layer1.*` both mean everything inside `layer1`, but not `layer10`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import fx, nn

from geta.errors import ConfigError
from geta.graph.families import LAYERS, Family
from geta.graph.labels import varying
from geta.graph.names import canonical_name, first_names
from geta.graph.propagate import Propagation, bind_arguments
from geta.graph.rules.registry import operator_name
from geta.graph.solver import Partition
from geta.hints import did_you_mean

GRANULARITIES = ("head", "head_dim", "group", "channel")
UNITS = ("channels", "heads", "head dims", "neurons", "norm groups", "features", "entries", "rows", LAYERS)
"""The words that `prune` understands; "heads" covers "key-value groups", the heads of grouped-query attention."""
_ONE_DIM = re.compile(r"^(?P<glob>.+):(?P<dim>\d+)$")
_UNKNOWN_OP = re.compile(r"^operator (\S+?)\.(\S+) at .* has no rule(?: and .*)?$")


@dataclass(frozen=True)
class Limits:
    """Restrictions on what may be removed; see `geta.analyze` for the meaning of each."""

    protect: tuple[str, ...] = ()
    prune: tuple[str, ...] | None = None
    granularity: tuple[tuple[str, str], ...] = ()
    depth: bool = False

    @staticmethod
    def of(
        protect: Sequence[str] | str = (),
        prune: Sequence[str] | str | None = None,
        granularity: Mapping[str, str] | str | None = None,
        *,
        depth: bool = False,
    ) -> Limits:
        """Read the arguments of `geta.analyze`; raises ConfigError for words that mean nothing."""
        if not isinstance(depth, bool):
            raise ConfigError(f"depth is {depth!r}: it must be True (whole residual branches may go) or False")
        wanted = None if prune is None else _texts("prune", prune)
        if wanted is not None and not wanted:
            raise ConfigError(f"prune is empty, so nothing could be pruned: leave it out, or name some of {', '.join(UNITS)}")
        if granularity is None:
            pairs: tuple[tuple[str, str], ...] = ()
        else:
            pairs = tuple({"*": granularity}.items() if isinstance(granularity, str) else granularity.items())
        for glob, value in pairs:
            if value not in GRANULARITIES:
                raise ConfigError(f"granularity '{value}' for '{glob}' is none of {', '.join(GRANULARITIES)}")
        if not depth and LAYERS in (wanted or ()):
            raise ConfigError(f"prune names '{LAYERS}', whole residual branches, which are found with depth=True alone: set that too")
        return Limits(_texts("protect", protect), wanted, pairs, depth)

    def granularity_at(self, path: str) -> str:
        """What a group is to be in the module `path`: the value of the first glob that matches it or a module around it, or ""."""
        return next((value for glob, value in self.granularity if _matches(glob, path)), "")

    def protected(self, model: nn.Module) -> dict[tuple[str, int], str]:
        """(canonical tensor name, dimension) -> what protects it. Raises ConfigError for a glob that matches no such dimension."""
        sizes = {name: tensor.dim() for name, tensor in named_tensors(model)}
        found: dict[tuple[str, int], str] = {}
        for given in self.protect:
            one = _ONE_DIM.match(given)
            glob = one["glob"] if one else given
            matched = [name for name in sizes if _matches(glob, name)]
            if not matched:
                raise ConfigError(f"protect='{given}' matches no tensor and no module that has one{nearest(glob, model)}")
            places = [(name, dim) for name in matched for dim in range(sizes[name]) if one is None or dim == int(one["dim"])]
            if not places and one is not None:
                raise ConfigError(f"protect='{given}': none of the {len(matched)} tensors has a dimension {one['dim']} (0 is the first)")
            found = {**dict.fromkeys(places, given), **found}
        return found

    def check(self, model: nn.Module) -> None:
        """Raise ConfigError for a glob that matches nothing in this model."""
        self.protected(model)
        paths = module_paths(model)
        for glob, _ in self.granularity:
            if not any(_matches(glob, path) for path in paths):
                raise ConfigError(f"granularity: '{glob}' matches no module{nearest(glob, model)}")


def _texts(setting: str, given: Sequence[str] | str) -> tuple[str, ...]:
    texts = (given,) if isinstance(given, str) else tuple(given)
    wrong = next((text for text in texts if not isinstance(text, str) or not text), None)
    if wrong is not None:
        raise ConfigError(f"{setting} holds {wrong!r}: it is a sequence of texts that are not empty")
    return texts


def _matches(glob: str, name: str) -> bool:
    """Whether a glob means this tensor or module, or a module around it."""
    while True:
        if fnmatchcase(name, glob):
            return True
        name, dot, _ = name.rpartition(".")
        if not dot:
            return False


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """All parameters and buffers with their canonical names, all names of tied ones included."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(canonical_name(name), tensor) for name, tensor in named]


def tensor_names(model: nn.Module) -> list[str]:
    """The names of `named_tensors`."""
    return [name for name, _ in named_tensors(model)]


def module_paths(model: nn.Module) -> list[str]:
    """The dotted paths of the user's own modules, without the containers that parametrizations add."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    return [path for path in paths if "parametrizations" not in path.split(".")]


def nearest(name: str, model: nn.Module) -> str:
    """The end of an error message: the names of this model that look most like `name`."""
    known = list(dict.fromkeys([*filter(None, module_paths(model)), *tensor_names(model)]))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(repr(one) for one in close)}?"
    shown = ", ".join(known[:6]) + (", ..." if len(known) > 6 else "")
    return f"; {type(model).__name__} has {shown}"


def protected_reason(glob: str) -> str:
    return f"was protected by protect='{glob}'"


def protection(model: nn.Module, limits: Limits) -> Callable[[str], str]:
    """Tensor name -> why it has to stay whole, or ""."""
    globs = {name: glob for (name, _), glob in limits.protected(model).items()} if limits.protect else {}
    return lambda name: protected_reason(globs[name]) if name in globs else ""


def protect_tensors(found: Propagation, model: nn.Module, limits: Limits) -> None:
    """Add to what propagation learnt that no protected dimension may shrink."""
    if not limits.protect:
        return
    first = first_names(model)
    globs = {(first[name], dim): glob for (name, dim), glob in limits.protected(model).items()}
    for owner in found.space.owners:
        if (owner.tensor, owner.dim) in globs:
            labels = np.arange(owner.start, owner.start + owner.size)
            found.constraints.wishes.append((labels, protected_reason(globs[owner.tensor, owner.dim])))


def unused_granularity(found: Propagation, limits: Limits) -> list[str]:
    """A note for every granularity that had nothing to decide."""
    if not limits.granularity:
        return []
    used: set[tuple[str, str]] = set()
    before = (0, 0, 0)
    for node, counts in found.learnt.items():
        if node.op == "call_function":
            path = found.capture.module_path(node)
            pair = next((pair for pair in limits.granularity if _matches(pair[0], path)), None)
            if pair is not None and _decides(found, node, pair[1], range(before[2], counts[2])):
                used.add(pair)
        before = counts
    kinds = {"head": "attention over heads", "head_dim": "attention over heads"}
    return [
        f"granularity '{value}' for '{glob}' decided nothing: there is no {kinds.get(value, 'convolution with groups')} there"
        for glob, value in limits.granularity
        if (glob, value) not in used
    ]


def _decides(found: Propagation, node: fx.Node, value: str, aligned: range) -> bool:
    if value in ("head", "head_dim"):
        items = [found.constraints.aligned[place] for place in aligned]
        shapes = [(set(varying(labels)), set(item.batch)) for item in items for _, labels in item.tracks]
        return any(dims & batch and dims - batch for dims, batch in shapes)
    if not operator_name(node.target).startswith(("aten::conv", "aten::_conv")):
        return False
    return bool(bind_arguments(node, lambda given: given).get("groups", 1) > 1)


def restrict(families: Sequence[Family], limits: Limits) -> list[Family]:
    """Exclude the families whose unit `prune` doesn't name. Raises ConfigError when it names a unit that no family has."""
    if limits.prune is None:
        return list(families)
    units = list(dict.fromkeys(_kind(family.unit) for family in families))
    for word in limits.prune:
        if word not in units:
            known = "" if word in UNITS else f" (possible are {', '.join(UNITS)})"
            raise ConfigError(f"prune names '{word}', but this model has families of {', '.join(units)}{known}{did_you_mean(word, units)}")
    allowed = ", ".join(limits.prune)
    return [
        family
        if _kind(family.unit) in limits.prune or not family.prunable
        else replace(family, prunable=False, reason=f"was excluded by prune='{allowed}'", suggestion=f"add '{_kind(family.unit)}' to prune")
        for family in families
    ]


def _kind(unit: str) -> str:
    return "heads" if unit == "key-value groups" else unit


def suggest(families: Sequence[Family], found: Propagation, limits: Limits, loose: Partition | None) -> list[Family]:
    """Say for every frozen family what would make it prunable. `loose`: the partition under exact=False, None if that is it already."""
    owners = {(owner.tensor, owner.dim): owner for owner in found.space.owners if owner.tensor}
    advice = {protected_reason(glob): f"take '{glob}' out of protect" for glob in limits.protect}

    def loosened(family: Family) -> bool:
        if loose is None or family.is_layer:
            return False
        member = family.members[0]
        labels = owners[member.param, member.dim].start + member.index.reshape(-1).numpy()
        roots = np.unique(loose.root[labels])
        return len(roots) > 1 and not any(int(root) in loose.frozen for root in roots)

    def text(family: Family) -> str:
        if family.reason in advice:
            return advice[family.reason]
        unknown = _UNKNOWN_OP.match(family.reason)
        if unknown:
            return f"write a rule for the operator: @geta.rule('{unknown[1]}::{unknown[2]}')"
        return "would become prunable with exact=False" if loosened(family) else ""

    return [family if family.prunable or family.suggestion else replace(family, suggestion=text(family)) for family in families]
