"""What a memory plan counts: tensors of a model as `fully_shard` would cut them, optimizer state, index maps of the groups.

Legend: `G` groups, `R` rows, `L` quantizers, `E` numbers of their parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from geta.errors import ConfigError
from geta.optim import quantizer_parameters
from geta.optim.groups import GroupIndex
from geta.optim.rehearsal import chunks
from geta.quant import Bits, BitsLike, Quantizer, quantize, quantizers
from geta.quant.attach import DEFAULT_EXCLUDE, _attach
from geta.quant.bits import allowed_widths
from geta.quant.targets import find_layers

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


def twin(model: nn.Module, dtype: torch.dtype | None, weights: BitsLike | None, activations: BitsLike | None) -> nn.Module:
    """A copy of the model's structure around its own tensors, with quantizers as asked for; another dtype puts it on the meta device.

    Raises ConfigError when there are quantizers already.
    """
    settings = {id(p) for p in quantizer_parameters(model)}
    tensors = [*model.parameters(), *model.buffers()]
    changed = {id(t) for t in tensors if dtype is not None and t.is_floating_point() and t.dtype != dtype and id(t) not in settings}
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    for tensor in tensors if changed else ():
        empty = torch.empty_like(tensor, dtype=dtype if id(tensor) in changed else tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    found = copy.deepcopy(model, memo)
    if weights is None and activations is None:
        return found
    present = next((name for name in quantizers(found)), None)
    if present is not None:
        raise ConfigError(f"the model has quantizers already (first: '{present}'): leave weight_bits and activation_bits out")
    layers = [layer for layer in find_layers(found, DEFAULT_EXCLUDE, strict=False) if layer.quantize_input]
    if weights is not None:
        quantize(found, weights=Bits.of(weights), activations=None)
    if activations is not None:
        one = torch.ones((), device=next(found.parameters()).device)
        _attach([], [(layer, Quantizer(f"{layer.path}:input", "activation", Bits.of(activations), one)) for layer in layers], [])
    return found


def find_blocks(model: nn.Module, globs: Sequence[str] | None) -> list[str]:
    """Paths of the modules that are sharded, gathered and checkpointed as one: those that a glob matches, or the repeated ones.

    Repeated are the members of each outermost `nn.ModuleList` that has several of one class; without any, the children of the model.
    Raises ConfigError for a glob that matches nothing, and for blocks inside of blocks.
    """
    named = {path: module for path, module in model.named_modules() if path and any(True for _ in module.parameters())}
    if globs is None:
        lists = [path for path, module in named.items() if isinstance(module, nn.ModuleList) and len(module) > len({*map(type, module)})]
        outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
        found = [path for path in named if path.rpartition(".")[0] in outer] or [path for path in named if "." not in path]
        return found
    missing = [glob for glob in globs if not any(fnmatchcase(path, glob) for path in named)]
    if missing:
        raise ConfigError(f"blocks: '{missing[0]}' matches no module with parameters; paths are such as {', '.join(list(named)[:3])}")
    found = [path for path in named if any(fnmatchcase(path, glob) for glob in globs)]
    inner = next(((path, other) for path in found for other in found if path.startswith(f"{other}.")), None)
    if inner is not None:
        raise ConfigError(f"blocks: '{inner[0]}' lies inside '{inner[1]}'; write globs that match one of them")
    return found


@dataclass(frozen=True)
class Layout:
    """A model as it lies on the first of `gpus` ranks; the others have as much or, where sizes don't divide, less.

    blocks: the parameters of each block, then those outside of all; quantizers': in none of them, whole on every rank.
    """

    model: nn.Module
    gpus: int
    units: tuple[tuple[nn.Parameter, ...], ...]
    quantizers: tuple[nn.Parameter, ...]

    @classmethod
    def of(cls, model: nn.Module, gpus: int, blocks: Sequence[str]) -> Layout:
        """The layout that `fully_shard` of each block, and then of the model, with `ignored_params` of the quantizers, gives."""
        own = quantizer_parameters(model)
        taken = {id(p) for p in own}
        units = []
        for path in [*blocks, ""]:
            mine = {id(p): p for p in model.get_submodule(path).parameters() if id(p) not in taken}
            taken |= mine.keys()
            units.append(tuple(mine.values()))
        return cls(model, gpus, tuple(units), tuple(own))

    @property
    def sharded(self) -> list[nn.Parameter]:
        """All parameters but those of quantizers."""
        return [p for unit in self.units for p in unit]

    def local(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of what is here of a sharded parameter: rows along dimension 0."""
        return (-(-tensor.shape[0] // self.gpus), *tensor.shape[1:]) if tensor.dim() else ()

    def shard_bytes(self, parameters: Iterable[Tensor]) -> int:
        """Of the parts that are here."""
        return sum(torch.Size(self.local(p)).numel() * p.element_size() for p in parameters)

    def state_bytes(self, factory: OptimizerFactory, shapes: Iterable[tuple[tuple[int, ...], torch.dtype]]) -> int:
        """What the optimizer keeps for parameters of these shapes, found by letting it take a step on tensors without numbers.

        Raises ConfigError when it can't.
        """
        made = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for shape, dtype in shapes]
        if not made:
            return 0
        for parameter in made:
            parameter.grad = torch.empty_like(parameter)
        try:
            base = factory(made)
            base.step()
        except Exception as error:  # whatever somebody's optimizer raises
            raise ConfigError(
                f"optimizer: its state can't be counted, because a step on tensors without numbers fails with {type(error).__name__}: "
                f"{error}; give a torch.optim optimizer that keeps as much"
            ) from error
        return sum(_bytes(value) for state in base.state.values() for value in state.values() if isinstance(value, Tensor))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the elements of distinct tensors."""
    return sum(_bytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def index_bytes(index: GroupIndex, gpus: int, found: Sequence[Quantizer]) -> int:
    """What an optimizer of geta keeps from its first step to its last: which row belongs to which group, flags, bounds of bits."""
    rows = scored = 0
    for entry in [*index.parameters, *index.buffers]:
        sizes = [len(groups) for groups in entry.groups]
        if entry.trained:
            sizes = [-(-size // gpus) if dim == 0 else size for size, dim in zip(sizes, entry.dims, strict=True)]
            scored += sum(sizes)
        rows += sum(sizes)
    families, groups, pairs = len(index.families), index.num_groups, index.num_pairs
    of_rows = 8 * rows + 2 * 8 * scored  # its group; the same again, and its pair, of scored ones
    of_groups = 8 * groups * (3 if index.layers else 1) + 2 * groups  # its family (with branches: its set, its rows); its two flags
    of_pairs = 4 * 8 * pairs  # parameter, family and quantizer; a count, of 4 bytes until groups are marked
    return of_rows + of_groups + of_pairs - 4 * pairs + 2 * 8 * (families + 1) + _bank_bytes(found)


def _bank_bytes(found: Sequence[Quantizer]) -> int:
    """Of the bank: bounds, signs and allowed widths of each quantizer [L]; the owner and sign of each of their numbers [E], and t."""
    if not found:
        return 0
    numbers, kind = sum(quantizer.d.numel() for quantizer in found), found[0].d.element_size()
    allowed = allowed_widths([quantizer.bits for quantizer in found], torch.device("cpu"))
    fixed = (kind + 8) * numbers if all(quantizer.linear for quantizer in found) else 0  # and, on the CPU, where each t lies
    return _bytes(allowed) + (2 * kind + 3) * len(found) + (8 + 1) * numbers + fixed


def largest_chunk(index: GroupIndex, layout: Layout) -> list[nn.Parameter]:
    """The parameters that are looked at together when groups are marked, of all such runs the largest."""
    runs = [[entry.stored for entry in run if isinstance(entry.stored, nn.Parameter)] for run in chunks(index.parameters)]
    return max(runs, key=layout.shard_bytes, default=[])
