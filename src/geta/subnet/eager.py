"""The eager product: an instance of the user's own class with sliced tensors and attributes that fit them.

`isinstance`, names in `state_dict` and `save_pretrained` go on working. It exists only where running it gives the zeroed model's output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.utils._pytree as pytree
from torch import nn

from geta.errors import BadModelError
from geta.graph.configured import is_pretrained
from geta.graph.dependency import DependencyGraph, analysed
from geta.graph.families import Selection
from geta.graph.names import canonical_name, find_tensor, unwrap
from geta.graph.propagate import UNUSED
from geta.subnet.attributes import Change, Cut, Sizes, apply, torch_changes
from geta.subnet.blocks import cut_blocks_of_modules
from geta.subnet.pretrained import Fit, UnfitError, fitting_configs
from geta.subnet.proof import bench_of, fitted, shapes_without_quantizers, trained_alike
from geta.subnet.removal import checked_selection, kept_by_name, sliced, zeroed
from geta.subnet.rewrite import Kept
from geta.subnet.shorten import removed_blocks, shorter
from geta.subnet.shortening import Shortening
from geta.subnet.trials import type_and_line


@dataclass(frozen=True)
class EagerProduct:
    """A smaller instance of the user's class and how it came about.

    model:   same class, mode and names of tensors as the model it was made from; it shares nothing with it.
    changes: attributes that were set, one line each: "blocks.0.attn.num_heads: 12 -> 6".
    kept:    {family: indices of the groups that stayed}.
    notes:   what the user should know, in words.
    max_difference: max |zeroed - this| / max |zeroed| on the example inputs.
    attributes: the changes again, as data: those that are set on modules beside what a configuration decides.
    undescribed: why no configuration describes this Hugging Face model, in words (one of the notes ends in it); "" where one does.
    shortening: which blocks are left out, and what their neighbours are called now.
    """

    model: nn.Module
    changes: list[str]
    kept: dict[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)
    max_difference: float = 0.0
    attributes: list[Change] = field(default_factory=list)
    undescribed: str = ""
    shortening: Shortening = field(default_factory=Shortening)


def compact_eager(model: nn.Module, graph: DependencyGraph, selection: Selection | None = None) -> EagerProduct:
    """Slice a copy of the user's own module tree, fit its attributes, and prove that it computes what the zeroed model computes.

    selection: {family: BoolTensor, True = remove}; None = the groups that are zero in `model`.
    Attributes of `torch.nn` layers follow from their tensors; a Hugging Face configuration is rewritten if one describes the result;
    numbers in other classes (`num_heads`, `split_size` ...) are found by trying, see `geta.subnet.trials`.
    Blocks of which all residual branches go are taken out of their list (`geta.subnet.shorten`); a branch alone can't go.
    Quantized models keep their quantizers and float weights (`compact` makes integers). `model` is not changed.
    Raises BadModelError with the module and the reason when there is no eager product; ConfigError for a selection that doesn't fit.
    """
    model = unwrap(model)
    selection = checked_selection(model, graph, selection)
    _check_comparable(model, graph, selection)
    blocks = removed_blocks(model, graph, selection)
    whole, notes = _cuts(model, graph, selection)
    with zeroed(model, graph, selection):
        short = shorter(model, graph, blocks)
        named = {short.shortening.name(name): cut for name, cut in whole.items()}
        cuts = {name: cut for name, cut in named.items() if name is not None}
        maker = _Maker(short.model, graph, cuts, _nearby(graph, selection, cuts, short.shortening))
        described, unfit = (None, short.undescribed) if short.undescribed else maker.with_config()
        product = described or maker.make(None)
        if isinstance(product, str):
            raise BadModelError(f"there is no eager product of this {type(model).__name__}, use the graph product: {product}")
        if blocks:
            gap = bench_of(model, product.model, graph, maker.sizes_near).difference()
            product = replace(product, changes=[*short.lines, *product.changes], max_difference=gap, shortening=short.shortening)
            product = replace(product, attributes=[*short.changes, *product.attributes], notes=[*short.notes, *product.notes])
    if unfit:
        notes = [
            *notes,
            f"model.config no longer describes the weights, so save_pretrained and from_pretrained don't fit together: {unfit}",
        ]
    kept = {name: (~remove).nonzero().reshape(-1) for name, remove in selection.items()}
    return replace(product, kept=kept, notes=[*notes, *product.notes], undescribed=unfit)


def _check_comparable(model: nn.Module, graph: DependencyGraph, selection: Selection) -> None:
    leaves = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((graph.example.args, dict(graph.example.kwargs)))]
    if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in leaves):
        raise BadModelError("the eager product is decided by running the model, and this one has no values (meta device)")
    for family in graph.families:
        if family.inexact and family.name in selection and bool(selection[family.name].any()):
            raise BadModelError(
                f"the eager product must equal the zeroed model, and removing groups of '{family.name}' changes the result "
                f"({family.inexact}): use the graph product"
            )


def _cuts(model: nn.Module, graph: DependencyGraph, selection: Selection) -> tuple[dict[str, Cut], list[str]]:
    """How every tensor shrinks. The model is captured again only for tensors that the graph doesn't know.

    These are quantizers attached since, and what only training reads (an auxiliary head, say).
    """
    known = {member.param for family in graph.families for member in family.members}
    kept = _kept_by_members(model, graph, selection)
    if any(tensor.dim() and canonical_name(name) not in known for name, tensor in model.named_parameters()):
        kept = kept_by_name(model, analysed(model, graph, train=False), graph, selection)
    notes = []
    if any(family.reason == UNUSED for family in graph.families):
        try:
            trained = kept_by_name(model, analysed(model, graph, train=True), graph, selection)
        except BadModelError as error:
            notes.append(f"not captured in training mode: {error}")
        else:
            kept.update({name: cut for name, cut in trained.items() if name not in kept})
    stored = {name: _stored(model, name) for name in kept}
    return {name: Cut(tuple(tensor.shape), kept[name]) for name, tensor in stored.items() if tensor is not None}, notes


def _kept_by_members(model: nn.Module, graph: DependencyGraph, selection: Selection) -> dict[str, Kept]:
    gone: dict[tuple[str, int], list[torch.Tensor]] = {}
    for family in graph.families:
        remove = selection.get(family.name)
        for member in family.members if remove is not None and bool(remove.any()) and not family.is_layer else ():
            gone.setdefault((member.param, member.dim), []).append(member.index[remove].reshape(-1))
    kept: dict[str, Kept] = {}
    for (name, dim), indices in gone.items():
        tensor = _stored(model, name)
        if tensor is not None:
            stays = torch.ones(tensor.shape[dim], dtype=torch.bool, device="cpu")
            stays[torch.cat(indices)] = False
            kept.setdefault(name, {})[dim] = stays.nonzero().reshape(-1)
    return kept


def _stored(model: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter, a buffer, or a tensor that is a plain attribute; None for a constant that forward itself writes down."""
    path, _, leaf = name.rpartition(".")
    try:
        return find_tensor(model, name)
    except BadModelError:
        owner = dict(model.named_modules()).get(path)
        value = None if owner is None else vars(owner).get(leaf)
        return value if isinstance(value, torch.Tensor) else None


def _nearby(graph: DependencyGraph, selection: Selection, cuts: Mapping[str, Cut], shortening: Shortening) -> Callable[[str], Sizes]:
    """What changed in a module and then in the block that it belongs to (its parent); for a path with a dot at its end, only inside it."""
    counts = {family.name: (family.size, int((~selection[family.name]).sum())) for family in graph.families if family.name in selection}
    members = {
        family.name: [new for member in family.members if (new := shortening.name(member.param)) is not None]
        for family in graph.families
        if family.name in counts and not family.is_layer
    }

    def inside(*prefixes: str) -> Sizes:
        tensors = [pair for prefix in prefixes for name, cut in cuts.items() if name.startswith(prefix) for pair in cut.sizes()]
        groups = [counts[name] for prefix in prefixes for name, own in members.items() if any(p.startswith(prefix) for p in own)]
        return Sizes(tuple(dict.fromkeys(tensors)), tuple(dict.fromkeys(groups)))

    def near(path: str) -> Sizes:
        if path.endswith("."):
            return inside(path.removeprefix("."))
        own = f"{path}."
        while path:
            path = path.rpartition(".")[0]
            sizes = inside(own, f"{path}." if path else "")
            if sizes.tensors:
                return sizes
        return inside("")

    return near


@dataclass(frozen=True)
class _Maker:
    """Makes and checks a product; the model is zeroed during all of it."""

    model: nn.Module
    graph: DependencyGraph
    cuts: Mapping[str, Cut]
    sizes_near: Callable[[str], Sizes]

    def with_config(self) -> tuple[EagerProduct | None, str]:
        """The product with a Hugging Face configuration that describes it, or the reason why there is none ("" where none is due)."""
        if not is_pretrained(self.model) or not self.cuts:
            return None, ""
        small = self._sliced()
        if isinstance(small, str):
            return None, ""
        shapes = shapes_without_quantizers(small)
        reason = ""
        try:
            for fit in fitting_configs(small, shapes, self.sizes_near("")):
                product = self.make(fit)
                if isinstance(product, EagerProduct):
                    return product, ""
                reason = f"with {', '.join(fit.numbers)} it doesn't run as the zeroed model does, {product}"
        except UnfitError as error:
            reason = str(error)
        return None, reason

    def make(self, fit: Fit | None) -> EagerProduct | str:
        """The product, or in words why there is none."""
        small = self._sliced()
        if isinstance(small, str):
            return small
        changes = torch_changes(small, self.cuts)
        for change in changes:
            apply(small, change)
        if fit:
            fit.adopt(small)
        bench = bench_of(self.model, small, self.graph, self.sizes_near)
        found, gap, problem = fitted(bench)
        if problem:
            return problem
        if fit is None:
            found = [*found, *bench.describing(found)]
        for change in found:
            apply(small, change)
        notes, reason = trained_alike(self.model, small, self.graph)
        if reason:
            return reason
        lines = [str(change) for change in (*changes, *found)]
        if fit:
            lines += [*fit.numbers, *(str(change) for change in fit.changes if str(change) not in lines)]
        return EagerProduct(small, lines, {}, notes, gap, [*changes, *found])

    def _sliced(self) -> nn.Module | str:
        try:
            small = copy.deepcopy(self.model)
        except Exception as error:  # noqa: BLE001 - the user's classes may refuse a copy for any reason; it is reported
            return f"the model can't be copied ({type_and_line(error)})"
        stored = {name: _stored(small, name) for name in self.cuts}
        cut_blocks_of_modules(small, {id(tensor): self.cuts[name].kept for name, tensor in stored.items()})
        for name, cut in self.cuts.items():
            try:
                tensor = stored[name]
                assert tensor is not None
                tensor.data = sliced(
                    tensor, cut.kept
                ).detach()  # in place: tied tensors stay tied, optimizers and RNNs hold the same object
            except (RuntimeError, TypeError) as error:
                return f"'{name}' can't be sliced in place ({type_and_line(error)})"
        return small
