"""A memory plan: what training a model with geta takes on each GPU, before anything is allocated.

Exact are the bytes of tensors that live from step to step: their shapes follow from the model, the optimizer and `fully_shard`.
Estimated is what comes and goes, because kernels, prefetching and which groups are marked decide it; what is assumed is said beside
each number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from geta.errors import ConfigError
from geta.graph.capture import capture, check_inputs
from geta.graph.dependency import DependencyGraph
from geta.graph.names import unwrap
from geta.optim import GroupIndex
from geta.optim.schedule import DEFAULT_JOINT_PERIODS
from geta.optim.setup import check_sparsity
from geta.quant import BitsLike, quantizers
from geta.report.memory_parts import Layout, OptimizerFactory, find_blocks, index_bytes, largest_chunk, tensor_bytes, twin
from geta.report.memory_saved import Saved, saved_bytes

MARGIN_SHARE, MARGIN_BYTES = 0.10, 2**30
"""What is added to a peak: fragments of the allocator, as a share, and the device's own context and communication buffers."""


@dataclass(frozen=True)
class MemoryLine:
    """Bytes on one GPU. exact: whether they are counted rather than estimated. words: of what, and what is assumed."""

    name: str
    bytes: int
    exact: bool
    words: str


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of training on each of `gpus` GPUs; all numbers are bytes on the first of them, which has the most.

    input_shapes: of the example inputs, one GPU's share of a batch. dtype, compute_dtype: of the model's parameters, held and
    computed with. blocks: paths of the modules that are
    sharded, gathered and checkpointed as one.
    held:         what lives from step to step.
    passes:       what the forward and backward passes need besides, without activation checkpointing.
    checkpointed: the same with each block checkpointed.
    step:         what the optimizer's step needs besides, when nothing of the passes is left; the one that marks groups needs the most.
    """

    gpus: int
    input_shapes: tuple[tuple[int, ...], ...]
    dtype: str
    compute_dtype: str
    optimizer: str
    parameters: int
    blocks: tuple[str, ...]
    held: tuple[MemoryLine, ...]
    passes: tuple[MemoryLine, ...]
    checkpointed: tuple[MemoryLine, ...]
    step: tuple[MemoryLine, ...]

    def line(self, name: str) -> MemoryLine:
        """A line by its name, those without checkpointing first. Raises ConfigError for a name that the plan hasn't got."""
        lines = (*self.held, *self.passes, *self.checkpointed, *self.step)
        found = next((line for line in lines if line.name == name), None)
        if found is None:
            raise ConfigError(f"the plan has no line '{name}'; it has {', '.join(dict.fromkeys(line.name for line in lines))}")
        return found

    def peak(self, *, checkpointing: bool) -> int:
        """The most that is needed at once: what is held, and the larger of passes and step. Without the margin."""
        passes = self.checkpointed if checkpointing else self.passes
        return _sum(self.held) + max(_sum(passes), _sum(self.step))

    def with_margin(self, *, checkpointing: bool) -> int:
        """The peak, 10 % and 1 GiB: what a GPU should have."""
        return int(self.peak(checkpointing=checkpointing) * (1 + MARGIN_SHARE)) + MARGIN_BYTES

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the peaks."""
        peaks = {
            name: {"peak": self.peak(checkpointing=on), "with_margin": self.with_margin(checkpointing=on)}
            for name, on in (("whole", False), ("checkpointed", True))
        }
        return {**asdict(self), "input_shapes": [list(shape) for shape in self.input_shapes], "peaks": peaks}

    def __str__(self) -> str:
        """A table in words."""
        shapes = ", ".join(str(list(shape)) for shape in self.input_shapes)
        ranks = "1 GPU" if self.gpus == 1 else f"each of {self.gpus} GPUs (FSDP2)"
        kind = self.dtype if self.dtype == self.compute_dtype else f"{self.dtype}, computing in {self.compute_dtype}"
        title = f"memory on {ranks}: {self.parameters:,} parameters in {kind}, {self.optimizer}, inputs {shapes} per GPU"
        parts = [("held from step to step", self.held), ("forward and backward pass", self.passes)]
        parts += [("the same with every block checkpointed", self.checkpointed), ("optimizer step that marks groups", self.step)]
        lines = [title]
        for heading, found in parts:
            lines.append(f"{heading}: {_readable(_sum(found))}")
            lines += [f"  {_readable(one.bytes):>11}  {'exact' if one.exact else 'about':5}  {one.name}: {one.words}" for one in found]
        for heading, on in (("peak", False), ("peak with checkpointing", True)):
            with_margin = _readable(self.with_margin(checkpointing=on))
            lines.append(f"{heading}: {_readable(self.peak(checkpointing=on))}; with 10 % and 1 GiB to spare {with_margin}")
        return "\n".join(lines)


def memory_plan(  # noqa: PLR0913 - keywords only, as they are given to what is planned
    graph: DependencyGraph,
    optimizer: OptimizerFactory = torch.optim.AdamW,
    *,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    gpus: int = 1,
    weight_bits: BitsLike | None = None,
    activation_bits: BitsLike | None = None,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    blocks: Sequence[str] | None = None,
    sparsity: float = 0.5,
    periods: int = DEFAULT_JOINT_PERIODS,
) -> MemoryPlan:
    """Plan the memory of training `graph.model` by `geta.QASSO` (or `geta.HESSO`, without quantizers) on inputs like these.

    graph:       of a model with or without quantizers, on any device (meta too).
    optimizer:   the base optimizer: a class or anything else that makes one from parameters.
    args, kwargs: one GPU's share of a batch, as in `model(*args, **kwargs)`; None = the example inputs of the graph. Only sizes count.
    gpus:        over how many `fully_shard` (FSDP2) spreads each block and then the model; 1 = nothing is sharded.
    weight_bits, activation_bits: plan for quantizers that `geta.quantize` would attach with these; None = those that the model has.
    dtype:       of the parameters, if another than the model's.
    compute_dtype: of forward and backward passes, if another than the parameters' (FSDP's `MixedPrecisionPolicy(param_dtype=...)`).
    blocks:      globs of module paths that are sharded and checkpointed as one; None = the members of the outermost module lists.
    sparsity, periods: share of the groups that goes, and in how many portions (`Schedule.joint_periods`).

    The model is captured once more, for training. Raises ConfigError for impossible settings; BadModelError and UnsupportedOpError when it
    can't be captured or counted.
    """
    check_sparsity(sparsity)
    for name, number in (("gpus", gpus), ("periods", periods)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{name} is {number!r}; it must be a whole number, at least 1")
    model = unwrap(graph.model)
    planned = twin(model, dtype, weight_bits, activation_bits)
    computing = planned if compute_dtype is None else twin(planned, compute_dtype, None, None)
    paths = find_blocks(planned, blocks)
    layout, gathered = (Layout.of(one, gpus, paths) for one in (planned, computing))
    given = (graph.example.args, dict(graph.example.kwargs)) if args is None and kwargs is None else check_inputs(model, args or (), kwargs)
    device = next(computing.parameters()).device
    example = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.to(device), given)
    captured = capture(computing, *example, dynamic_shapes={}, train=True)
    saved = saved_bytes(computing, captured, example, paths)
    index = GroupIndex(_Planned(planned, graph.families), skip={id(p) for p in layout.quantizers})
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, torch.Tensor)]
    return MemoryPlan(
        gpus=gpus,
        input_shapes=tuple(tuple(leaf.shape) for leaf in tensors),
        dtype=_dtypes(layout),
        compute_dtype=_dtypes(gathered),
        optimizer=getattr(optimizer, "__name__", type(optimizer).__name__),
        parameters=sum(p.numel() for p in layout.sharded),
        blocks=tuple(paths),
        held=_held(layout, optimizer, index),
        passes=(*_gathered(gathered), *_kept(saved, gpus)),
        checkpointed=(*_gathered(gathered), *_kept_of_blocks(saved)),
        step=_step(layout, index, optimizer, sparsity / periods),
    )


@dataclass(frozen=True)
class _Planned:
    """The graph's families over the model that is planned for."""

    model: torch.nn.Module
    families: Sequence[Any]


def _held(layout: Layout, optimizer: OptimizerFactory, index: GroupIndex) -> tuple[MemoryLine, ...]:
    sharded, trained = layout.sharded, [p for p in layout.sharded if p.requires_grad]
    own = list(layout.quantizers)
    learned = [p for p in own if p.requires_grad]
    whole = "whole on every GPU"
    part = "whole" if layout.gpus == 1 else f"1/{layout.gpus} of each, rows rounded up"
    base = layout.state_bytes(optimizer, [(layout.local(p), p.dtype) for p in trained])
    moments = layout.state_bytes(optimizer, [(tuple(p.shape), p.dtype) for p in learned])
    found = list(quantizers(layout.model).values())
    return (
        MemoryLine("parameters", layout.shard_bytes(sharded), True, part),
        MemoryLine("buffers", tensor_bytes(layout.model.buffers()), True, whole),
        MemoryLine("gradients", layout.shard_bytes(trained), True, f"{part}, from the backward pass to zero_grad"),
        MemoryLine("optimizer state", base, True, "the base optimizer's, for the parameters"),
        MemoryLine("quantizers", tensor_bytes(own), True, f"step size, range and exponent of {len(found)}, {whole}"),
        MemoryLine("quantizer gradients and state", tensor_bytes(learned) + moments, True, whole),
        MemoryLine("groups", index_bytes(index, layout.gpus, found), True, f"rows of {index.num_groups:,} groups, flags, bounds of bits"),
    )


def _gathered(layout: Layout) -> tuple[MemoryLine, ...]:
    if layout.gpus == 1:
        return ()
    sizes = sorted((tensor_bytes(unit) for unit in layout.units[:-1]), reverse=True)
    root = tensor_bytes(layout.units[-1])
    trained = max((tensor_bytes(p for p in unit if p.requires_grad) for unit in layout.units), default=0)
    words = "what no block holds, and the two largest blocks, because the next one is gathered ahead"
    return (
        MemoryLine("gathered parameters", root + sum(sizes[:2]), False, words),
        MemoryLine("gradients before they are scattered", trained, False, "of the largest block, or of what no block holds"),
    )


def _kept(saved: Saved, gpus: int) -> tuple[MemoryLine, ...]:
    words = "whole, kept for the backward pass" + (", though their masters are sharded" if gpus > 1 else "")
    return (
        MemoryLine("activations", saved.activations, False, "what autograd saves, by the captured graph"),
        MemoryLine("quantized weights", saved.weights, False, words),
        _result(saved),
    )


def _kept_of_blocks(saved: Saved) -> tuple[MemoryLine, ...]:
    weights = _readable(saved.recomputed_weights)
    words = f"inputs of the blocks, the largest block's own with its quantized weights ({weights}), and all outside of blocks"
    return (MemoryLine("activations of checkpointed blocks", saved.checkpointed, False, words), _result(saved))


def _result(saved: Saved) -> MemoryLine:
    return MemoryLine("result and its gradient", 2 * saved.result, False, "of the model's output; the loss may keep as much again")


def _step(layout: Layout, index: GroupIndex, optimizer: OptimizerFactory, share: float) -> tuple[MemoryLine, ...]:
    """What comes and goes in the step that marks `share` of the groups."""
    chunk, wide = largest_chunk(index, layout), index.dtype.itemsize
    scored = [entry.stored for entry in index.parameters]
    largest = max((torch.Size(layout.local(p)).numel() for p in scored), default=0)
    states = layout.state_bytes(optimizer, [(layout.local(p), p.dtype) for p in chunk if p.requires_grad])
    marking = 2 * layout.shard_bytes(chunk) + states + 3 * wide * largest + 12 * wide * index.num_groups
    redundant = [share * _owned(entry, index.num_groups) for entry in index.parameters]
    rows = sum(size * (entry.tensor.element_size() + 3 * wide) for size, entry in zip(redundant, index.parameters, strict=True))
    rows = int(rows / layout.gpus + 5 * wide * max(redundant, default=0) / layout.gpus)
    words = "copies of the largest scored tensor, its gradient and state, and three results: no copy of the model"
    foreach = layout.shard_bytes(p for p in layout.sharded if p.requires_grad)
    return (
        MemoryLine("base optimizer's step", foreach, False, "one intermediate result of all its parameters' size, as foreach needs it"),
        MemoryLine("scores", marking, False, words),
        MemoryLine("redundant rows", rows, False, f"before the step, and what is computed of them: {share:.1%} of the groups"),
    )


def _owned(entry: Any, nobody: int) -> float:
    """Elements of a tensor that belong to some group along its first zeroed dimension."""
    groups = entry.groups[0]
    if groups.is_meta:
        return float(entry.tensor.numel())
    return float(entry.tensor.numel()) * float((groups != nobody).float().mean()) if groups.numel() else 0.0


def _dtypes(layout: Layout) -> str:
    return ", ".join(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in layout.sharded))


def _sum(lines: Sequence[MemoryLine]) -> int:
    return sum(line.bytes for line in lines)


def _readable(size: int) -> str:
    """Bytes with a unit of 1024."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{size} B" if unit == "B" else f"{value:.2f} {unit}"
