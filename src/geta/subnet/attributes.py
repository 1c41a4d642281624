"""Attributes of modules that must follow a cut: those of `torch.nn` are known, those of the user's own classes are proposed.

Nothing here decides whether a proposal is right: `geta.subnet.trials` runs the model and looks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from geta.subnet.rewrite import Kept

HEAD_COUNTS = frozenset(
    "num_heads num_attention_heads n_head n_heads nhead nheads heads num_key_value_heads num_kv_heads n_kv_heads n_local_heads "
    "n_local_kv_heads num_query_heads n_groups num_groups groups".split()
)
"""Usual names of numbers of groups."""
INNER_WIDTHS = frozenset(
    "all_head_size attention_head_size head_dim head_size inner_dim inner_size qkv_dim attn_dim attention_dim hidden_features "
    "intermediate_size intermediate_dim ffn_dim n_inner d_ff d_kv d_inner mlp_dim mid_channels hidden_channels split_size".split()
)
"""Usual names of widths inside a block."""
OTHER_SIZES = frozenset(
    "embed_dim hidden_size hidden_dim d_model dim dims width channels num_channels in_channels out_channels in_chs out_chs in_features "
    "out_features num_features in_dim out_dim input_dim output_dim nf nx num_key_value_groups normalized_shape unflattened_size".split()
)
"""Usual names of widths at the border of a block."""

_FITTED = frozenset(
    "in_features out_features in1_features in2_features in_channels out_channels groups num_features num_channels num_groups "
    "normalized_shape num_embeddings embedding_dim num_parameters hidden_size input_size proj_size embed_dim kdim vdim num_heads "
    "head_dim".split()
)
"""What `torch_changes` sets: no question is left about these in a layer that has tensors."""


@dataclass(frozen=True)
class Cut:
    """How one tensor shrank: its shape before, and what it keeps."""

    before: tuple[int, ...]
    kept: Kept

    @property
    def after(self) -> tuple[int, ...]:
        return tuple(len(self.kept[dim]) if dim in self.kept else size for dim, size in enumerate(self.before))

    def sizes(self) -> list[tuple[int, int]]:
        """(before, after) of every dimension that shrank."""
        return [(self.before[dim], len(indices)) for dim, indices in sorted(self.kept.items())]


@dataclass(frozen=True)
class Change:
    """One attribute to set. module: path of its owner; path: the attribute, with the objects that lead to it (`config`, `n_head`)."""

    module: str
    path: tuple[str, ...]
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{'.'.join((*filter(None, [self.module]), *self.path))}: {self.before} -> {self.after}"


def apply(model: nn.Module, change: Change) -> None:
    """Set the attribute; objects on the way are copied first, because other modules may share them."""
    target: Any = model.get_submodule(change.module)
    *outer, leaf = change.path
    for name in outer:
        own = copy.copy(vars(target)[name])
        _put(target, name, own)
        target = own
    _put(target, leaf, change.after)


def _put(target: Any, name: str, value: Any) -> None:
    if isinstance(target, nn.Module):
        setattr(target, name, value)
    else:
        object.__setattr__(target, name, value)  # frozen and validating dataclasses too: the copy is ours


@contextlib.contextmanager
def applied(model: nn.Module, changes: Sequence[Change]) -> Iterator[None]:
    """Set the attributes for the time of the block."""
    places = [(model.get_submodule(change.module), change.path[0]) for change in changes]
    before = [(module, name, vars(module)[name]) for module, name in places]
    try:
        for change in changes:
            apply(model, change)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


# --- torch.nn: what every layer's own attributes must be for the shapes that its tensors now have ---

_Tensors = Mapping[str, Cut]
_Fit = Callable[[Any, _Tensors], dict[str, Any]]
_FITS: dict[type[nn.Module], _Fit] = {}


def _fits(*classes: type[nn.Module]) -> Callable[[_Fit], _Fit]:
    def register(function: _Fit) -> _Fit:
        for one in classes:
            _FITS[one] = function
        return function

    return register


def torch_changes(model: nn.Module, cuts: Mapping[str, Cut]) -> list[Change]:
    """What the attributes of `torch.nn` layers (and of classes derived from them) in an already sliced model must become."""
    changes = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        fit = next((_FITS[one] for one in type(module).__mro__ if one in _FITS), None)
        own = {name.removeprefix(prefix): cut for name, cut in cuts.items() if name.startswith(prefix)}
        if fit is None or not own:
            continue
        for name, value in fit(module, own).items():
            if getattr(module, name) != value:
                changes.append(Change(path, (name,), getattr(module, name), value))
    return changes


def _weight(own: _Tensors, name: str = "weight") -> Cut | None:
    """The cut of a weight, also where weight normalisation stores its direction under another name."""
    return own.get(name) or own.get(f"parametrizations.{name}.original1") or own.get(f"{name}_v")


def _shape(module: nn.Module, own: _Tensors, name: str = "weight") -> tuple[int, ...]:
    cut = _weight(own, name)
    return cut.after if cut else tuple(getattr(module, name).shape)


def _groups(groups: int, cut: Cut | None) -> int:
    """Groups that keep at least one of their rows: whole groups go, or the same rows of each."""
    if groups == 1 or cut is None or 0 not in cut.kept:
        return groups
    return len(torch.unique(cut.kept[0] // (cut.before[0] // groups)))


@_fits(nn.Linear)
def _linear(module: nn.Linear, own: _Tensors) -> dict[str, Any]:
    rows, columns = _shape(module, own)
    return {"out_features": rows, "in_features": columns}


@_fits(nn.Bilinear)
def _bilinear(module: nn.Bilinear, own: _Tensors) -> dict[str, Any]:
    rows, first, second = _shape(module, own)
    return {"out_features": rows, "in1_features": first, "in2_features": second}


@_fits(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _conv(module: nn.Conv2d, own: _Tensors) -> dict[str, Any]:
    rows, columns = _shape(module, own)[:2]
    groups = _groups(module.groups, _weight(own))
    return {"out_channels": rows, "in_channels": columns * groups, "groups": groups}


@_fits(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _conv_transpose(module: nn.ConvTranspose2d, own: _Tensors) -> dict[str, Any]:
    rows, columns = _shape(module, own)[:2]
    groups = _groups(module.groups, _weight(own))
    return {"in_channels": rows, "out_channels": columns * groups, "groups": groups}


@_fits(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def _batch_norm(_: nn.BatchNorm2d, own: _Tensors) -> dict[str, Any]:
    return {"num_features": next(iter(own.values())).after[0]}


@_fits(nn.GroupNorm)
def _group_norm(module: nn.GroupNorm, own: _Tensors) -> dict[str, Any]:
    cut = next(iter(own.values()))
    return {"num_channels": cut.after[0], "num_groups": _groups(module.num_groups, cut)}


@_fits(nn.LayerNorm, nn.RMSNorm)
def _layer_norm(_: nn.LayerNorm, own: _Tensors) -> dict[str, Any]:
    return {"normalized_shape": next(iter(own.values())).after}


@_fits(nn.Embedding, nn.EmbeddingBag)
def _embedding(module: nn.Embedding, own: _Tensors) -> dict[str, Any]:
    rows, columns = _shape(module, own)
    return {"num_embeddings": rows, "embedding_dim": columns}


@_fits(nn.PReLU)
def _prelu(module: nn.PReLU, own: _Tensors) -> dict[str, Any]:
    return {"num_parameters": _shape(module, own)[0]}


@_fits(nn.RNNBase)
def _recurrent(module: nn.RNNBase, own: _Tensors) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    sizes = {
        "hidden_size": _shape(module, own, "weight_hh_l0")[0] // gates,
        "input_size": _shape(module, own, "weight_ih_l0")[1],
    }
    return {**sizes, "proj_size": _shape(module, own, "weight_hr_l0")[0]} if module.proj_size else sizes


@_fits(nn.MultiheadAttention)
def _multihead(module: nn.MultiheadAttention, own: _Tensors) -> dict[str, Any]:
    """The class wants num_heads * head_dim = embed_dim; where the cut is another one, its forward says so."""
    out_cut = own.get("out_proj.weight")
    width, inner = out_cut.after if out_cut else tuple(module.out_proj.weight.shape)
    if module._qkv_same_embed_dim:
        key, value = width, width
    else:
        key, value = _shape(module, own, "k_proj_weight")[1], _shape(module, own, "v_proj_weight")[1]
    heads = inner // module.head_dim if inner % module.head_dim == 0 else module.num_heads
    return {"embed_dim": width, "kdim": key, "vdim": value, "num_heads": heads, "head_dim": inner // heads}


# --- the user's classes: numbers that equal a size which changed ---


@dataclass(frozen=True)
class Sizes:
    """What changed around a module: sizes of tensors, and how many groups the families have, as (before, after)."""

    tensors: tuple[tuple[int, int], ...]
    counts: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Proposal:
    """A change and why it is proposed. kind: "size" or "count" (equal to one that changed), "ratio" (a factor or multiple of one)."""

    change: Change
    kind: str
    rank: int


def proposals(path: str, module: nn.Module, sizes: Sizes) -> list[Proposal]:
    """Integer attributes of a module and of the plain objects that it holds, each with what it may have to become; best first."""
    found: dict[tuple[tuple[str, ...], str], Proposal] = {}
    for name, value in _numbers(module):
        for kind, after in _follow(value, sizes):
            change = Change(path, name, value, after)
            rank = _rank(name[-1], kind) + 3 * (len(name) - 1)
            found.setdefault((name, repr(after)), Proposal(change, kind, rank))
    return sorted(found.values(), key=lambda proposal: proposal.rank)


def _rank(name: str, kind: str) -> int:
    if name in HEAD_COUNTS:
        return {"count": 0, "ratio": 1, "size": 2}[kind]
    known = 0 if name in INNER_WIDTHS else 1 if name in OTHER_SIZES else 10
    return known + {"size": 0, "count": 2, "ratio": 1}[kind]


def _numbers(module: nn.Module) -> Iterator[tuple[tuple[str, ...], Any]]:
    settled = any(one in _FITS for one in type(module).__mro__) and next(module.parameters(), None) is not None
    if settled and type(module).__module__.startswith("torch.nn."):
        return
    for name, value in vars(module).items():
        if name.startswith("_") or (settled and name in _FITTED):
            continue
        if _is_size(value):
            yield (name,), value
        elif _is_record(value):
            for inner, number in vars(value).items():
                if _is_size(number) and not inner.startswith("_"):
                    yield (name, inner), number


def _is_size(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(type(item) is int for item in value)
    return type(value) is int and value > 0


def _is_record(value: object) -> bool:
    """An object of some class of the user's that holds settings: not a tensor, module, function, class or container."""
    if isinstance(value, (nn.Module, torch.Tensor, type, dict, list, tuple, str)) or callable(value):
        return False
    return hasattr(value, "__dict__") and not type(value).__module__.startswith("torch")


def _follow(value: Any, sizes: Sizes) -> list[tuple[str, Any]]:
    """(kind, new value), without repetition."""
    if not isinstance(value, (tuple, list)):
        return _follow_one(value, sizes)
    found = []
    for place, item in enumerate(value):
        for kind, after in _follow_one(item, sizes) if item > 0 else []:
            found.append((kind, type(value)([*value[:place], after, *value[place + 1 :]])))
    return found


def _follow_one(value: int, sizes: Sizes) -> list[tuple[str, int]]:
    found = [("size", after) for before, after in sizes.tensors if before == value]
    found += [("count", after) for before, after in sizes.counts if before == value]
    for before, after in sizes.tensors:
        related = before % value == 0 or value % before == 0
        if related and before != value and value * after % before == 0:
            found.append(("ratio", value * after // before))
    return [(kind, after) for kind, after in dict.fromkeys(found) if after not in (0, value)]
