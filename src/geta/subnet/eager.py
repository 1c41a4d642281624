"""The eager product: an instance of the user's own class with sliced tensors and attributes that fit them.

`isinstance`, names in `state_dict` and `save_pretrained` go on working. It exists only where running it gives the zeroed model's output.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from geta.errors import BadModelError
from geta.graph.configured import is_pretrained
from geta.graph.dependency import DependencyGraph, analysed
from geta.graph.families import Selection
from geta.graph.names import canonical_name, find_tensor, unwrap
from geta.graph.preserve import mode_of
from geta.graph.propagate import UNUSED
from geta.quant.fixed import FixedQuantizer
from geta.quant.quantizer import Quantizer
from geta.subnet.attributes import Change, Cut, Sizes, applied, apply, torch_changes
from geta.subnet.blocks import cut_blocks_of_modules
from geta.subnet.branches import selected_layers
from geta.subnet.comparison import max_difference
from geta.subnet.pretrained import Fit, UnfitError, fitting_configs
from geta.subnet.removal import TOLERANCE, checked_selection, kept_by_name, sliced, zeroed
from geta.subnet.rewrite import Kept
from geta.subnet.trials import Bench, type_and_line

TRAINING_TOLERANCE = 1e-3
"""Relative difference allowed in training mode, where BatchNorm divides by the deviation of a small batch."""


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
    """

    model: nn.Module
    changes: list[str]
    kept: dict[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)
    max_difference: float = 0.0
    attributes: list[Change] = field(default_factory=list)
    undescribed: str = ""


def compact_eager(model: nn.Module, graph: DependencyGraph, selection: Selection | None = None) -> EagerProduct:
    """Slice a copy of the user's own module tree, fit its attributes, and prove that it computes what the zeroed model computes.

    selection: {family: BoolTensor, True = remove}; None = the groups that are zero in `model`.
    Attributes of `torch.nn` layers follow from their tensors; a Hugging Face configuration is rewritten if one describes the result;
    numbers in other classes (`num_heads`, `split_size` ...) are found by trying, see `geta.subnet.trials`.
    Quantized models keep their quantizers and float weights (`compact` makes integers). `model` is not changed.
    Raises BadModelError with the module and the reason when there is no eager product; ConfigError for a selection that doesn't fit.
    """
    model = unwrap(model)
    selection = checked_selection(model, graph, selection)
    _check_comparable(model, graph, selection)
    cuts, notes = _cuts(model, graph, selection)
    maker = _Maker(model, graph, cuts, _nearby(graph, selection, cuts))
    with zeroed(model, graph, selection):
        described, unfit = maker.with_config()
        product = described or maker.make(None)
    if isinstance(product, str):
        raise BadModelError(f"there is no eager product of this {type(model).__name__}, use the graph product: {product}")
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
    for family in selected_layers(graph, selection):
        raise BadModelError(
            f"the eager product runs the forward of {type(model).__name__}, which can't leave out '{family.name}': use the graph product"
        )
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


def _nearby(graph: DependencyGraph, selection: Selection, cuts: Mapping[str, Cut]) -> Callable[[str], Sizes]:
    """What changed in a module and then in the block that it belongs to (its parent); for a path with a dot at its end, only inside it."""
    counts = {family.name: (family.size, int((~selection[family.name]).sum())) for family in graph.families if family.name in selection}
    members = {family.name: [member.param for member in family.members] for family in graph.families if family.name in counts}

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
        shapes = _shapes_without_quantizers(small)
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
        bench = self._bench(small)
        found, gap, problem = _fitted(bench)
        if problem:
            return problem
        if fit is None:
            found = [*found, *bench.describing(found)]
        for change in found:
            apply(small, change)
        notes, reason = self._trained(small)
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

    def _bench(self, small: nn.Module) -> Bench:
        """Where one flipped rounding step may show (quantizers, half precision) the comparison is made in float64, on copies."""
        example = self.graph.example
        inputs: tuple[Any, Any] = (example.args, dict(example.kwargs))
        tensors = [*self.model.parameters(), *self.model.buffers()]
        narrow = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)
        zeroed_model = self.model
        if narrow or any(isinstance(module, Quantizer | FixedQuantizer) for module in self.model.modules()):
            zeroed_model, small = copy.deepcopy(self.model).double(), copy.deepcopy(small).double()
            inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
        return Bench(zeroed_model, small, inputs, self.sizes_near, TOLERANCE[torch.float32])

    def _trained(self, small: nn.Module) -> tuple[list[str], str]:
        """Run both in training mode: (notes, "") or ([], why not). Where dropout draws, only that it runs can be checked."""
        try:
            first, second = (_train_run(self.model, self.graph, seed) for seed in (0, 1))
        except Exception as error:  # noqa: BLE001 - a model that can't train on its example inputs is not compared there
            return [f"not compared in training mode, because the model itself fails there: {type_and_line(error)}"], ""
        try:
            found = _train_run(small, self.graph, 0)
        except Exception as error:  # noqa: BLE001 - whatever it raises is the reason
            return [], f"it fails in training mode: {type_and_line(error)}"
        if max_difference(first, second)[1] > 0:
            return [], ""
        gap = max_difference(first, found)[1]
        return [], "" if gap <= TRAINING_TOLERANCE else f"in training mode the output differs by {gap:.2g} of the largest value"


def _shapes_without_quantizers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict as they would be without quantizers, which no configuration describes."""
    modules = model.named_modules(remove_duplicate=False)  # tied weights share a quantizer
    quantizers = tuple(f"{path}." for path, module in modules if isinstance(module, Quantizer | FixedQuantizer))
    stored = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(quantizers)}
    return {canonical_name(name): tuple(tensor.shape) for name, tensor in stored.items()}


def _fitted(bench: Bench) -> tuple[list[Change], float, str]:
    """Attribute changes that make the outputs agree, if any are needed, and the difference that is left."""
    gap = _difference(bench)
    if gap <= bench.tolerance:
        return [], gap, ""
    found, problem = bench.search()
    if problem:
        return [], gap, problem
    with applied(bench.small, found):
        return found, bench.difference(), ""


def _difference(bench: Bench) -> float:
    try:
        return bench.difference()
    except Exception:  # noqa: BLE001 - the search that follows meets the same error and reports its place
        return torch.inf


@contextlib.contextmanager
def _buffers_as_before(model: nn.Module) -> Iterator[None]:
    owned = [(module, dict(module._buffers)) for module in model.modules()]  # a forward may put another tensor in a buffer's place
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, buffers in owned:
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _train_run(model: nn.Module, graph: DependencyGraph, seed: int) -> list[Any]:
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (graph.example.args, dict(graph.example.kwargs)))
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices), _buffers_as_before(model), mode_of(model, True), torch.no_grad():
        torch.manual_seed(seed)
        return pytree.tree_leaves(model(*args, **kwargs))
