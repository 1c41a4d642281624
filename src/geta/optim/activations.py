"""How much do the layers that read a group depend on it, by their weights and by what flows through them?

    A_g = sum over layers that read group g of sum_{i, j in g} |w_ij| a_j        a_j = root mean square of input j over a window

Source: weights times activation norms after Wanda (arXiv 2306.11695).
Deviation: Wanda ranks single weights; here they are summed over the columns that read a group.

Legend: `G` groups, `I` inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from geta import ranks
from geta.errors import CheckpointError, ConfigError
from geta.graph.families import Family
from geta.graph.names import find_tensor, unwrap
from geta.optim.groups import Graph, GroupIndex
from geta.optim.observe import UNSEEN, register_observer
from geta.optim.shards import whole

_Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class _Site:
    """A layer that reads groups: its stored weight, (dimension, group of each of its rows), and what its input was so far.

    squares: sum of squares per input [I]. entries: how many numbers per input went into it. calls: forward passes seen.
    fresh:   the same three [I + 2] on this rank since the last step, in float64; None where every forward pass is counted at once.
    """

    path: str
    module: _Layer
    weight: Tensor
    groups: dict[int, Tensor]
    squares: Tensor
    entries: int = 0
    calls: int = 0
    fresh: Tensor | None = None

    @property
    def channel_dim(self) -> int:
        """The dimension of the layer's input along which its inputs lie."""
        return -1 if isinstance(self.module, nn.Linear) else -1 - len(self.module.kernel_size)

    def weighted(self) -> Tensor:
        """|w| a, of the weight's shape."""
        rms = (self.squares / max(self.entries, 1)).sqrt()
        weight = whole(self.weight).detach().to(rms.dtype).abs()
        trailing = [1] * (weight.dim() - 2)
        if isinstance(self.module, nn.Linear):
            return weight * rms
        if isinstance(self.module, _TRANSPOSED):
            return weight * rms.view(-1, 1, *trailing)
        blocks = rms.view(self.module.groups, -1).repeat_interleave(weight.shape[0] // self.module.groups, dim=0)
        return weight * blocks.view(*blocks.shape, *trailing)

    def see(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        if not torch.is_grad_enabled():
            return
        x = args[0] if args else kwargs["input"]
        with torch.no_grad():
            values = x.detach().to(self.squares.dtype).movedim(self.channel_dim, 0).flatten(1)
            squares = values.square().sum(dim=1)
            if ranks.count() > 1:
                fresh = torch.cat([squares.double(), squares.new_tensor([values.shape[1], 1], dtype=torch.float64)])
                self.fresh = fresh if self.fresh is None else self.fresh + fresh
                return
        self.add(squares, values.shape[1], 1)

    def add(self, squares: Tensor, entries: int, calls: int) -> None:
        """Count these inputs in."""
        self.squares = self.squares + squares.to(self.squares)
        self.entries += entries
        self.calls += calls


@register_observer("activation")
class ActivationObserver:
    """A_g: how much the layers that read group g depend on it, by the size of their weights and of what flows through them.

    Seen are inputs of Linear and (transposed) convolution modules through forward pre-hooks. A family that none of them reads, or
    whose readers are never called as modules (`nn.MultiheadAttention` uses its output projection's tensors directly), has
    `UNSEEN` and a note.

    Raises ConfigError when no family at all can be observed, and on reading when not one layer was called.
    """

    def __init__(self, index: GroupIndex, graph: Graph) -> None:
        self._index = index
        self._families_of: dict[str, list[int]] = {}
        self._sites = self._find_sites(graph)
        self._hooks: list[RemovableHandle] = []
        self.notes: list[str] = []
        if index.num_groups and not self._sites:
            raise ConfigError("saliency 'activation': no prunable family is read by a Linear or convolution module; use other criteria")
        self._note_unseen({number for members in self._families_of.values() for number in members})

    def start(self) -> None:
        """Forget all inputs; attach the hooks if they aren't."""
        for site in self._sites:
            site.squares, site.entries, site.calls, site.fresh = torch.zeros_like(site.squares), 0, 0, None
        if not self._hooks:
            self._hooks = [site.module.register_forward_pre_hook(site.see, with_kwargs=True) for site in self._sites]

    def stop(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def observe(self) -> None:
        """Add what all ranks' hooks have seen since the last step; on a single one it is counted already."""
        if ranks.count() == 1 or not self._sites:
            return
        seen = [
            site.squares.new_zeros(len(site.squares) + 2, dtype=torch.float64) if site.fresh is None else site.fresh for site in self._sites
        ]
        shared = ranks.total(torch.cat([part.to(self._index.device) for part in seen]))
        parts = torch.split(shared, [len(part) for part in seen])
        counts = torch.stack([part[-2:] for part in parts]).to(torch.int64).tolist()
        for site, part, count in zip(self._sites, parts, counts, strict=True):
            site.add(part[:-2], *count)
            site.fresh = None

    def read(self) -> Tensor:
        """A [G], UNSEEN where a family can't be observed."""
        called = [site for site in self._sites if site.calls]
        if self._sites and not called:
            raise ConfigError(
                "saliency 'activation' has seen no forward pass with gradients: was the model compiled before the optimizer was made, "
                "or is another copy of it trained? Use other criteria, or compile later"
            )
        seen = {number for site in called for number in self._families_of[site.path]}
        self._note_unseen(seen)
        total = torch.zeros(self._index.num_groups + 1, dtype=self._index.dtype, device=self._index.device)
        for site in called:
            weighted = site.weighted()
            for dim, groups in site.groups.items():
                rows = weighted.movedim(dim, 0).flatten(1).sum(dim=1)
                total.index_add_(0, groups.to(total.device), rows.to(total))
        hidden = [number not in seen for number in range(len(self._index.families))]
        flags = torch.tensor(hidden, device=total.device)[self._index.family_of_G] if any(hidden) else None
        found = total[: self._index.num_groups]
        return found if flags is None else torch.where(flags, UNSEEN, found)

    def state(self) -> dict[str, Any]:
        """Sums of squares, numbers per input and calls, by layer."""
        return {site.path: {"squares": site.squares.clone(), "entries": site.entries, "calls": site.calls} for site in self._sites}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises CheckpointError when the layers differ."""
        if sorted(state) != sorted(site.path for site in self._sites):
            raise CheckpointError("the checkpoint observed the activations of other layers: resume with the same model and graph")
        for site in self._sites:
            saved = state[site.path]
            site.squares, site.entries, site.calls = saved["squares"].to(site.squares).clone(), int(saved["entries"]), int(saved["calls"])

    def _note_unseen(self, seen: set[int]) -> None:
        for number, family in enumerate(self._index.families):
            note = (
                f"saliency 'activation': family '{family.name}' is read by no Linear or convolution module whose input can be observed; "
                f"its groups are compared by magnitude instead"
            )
            if number not in seen and note not in self.notes:
                self.notes.append(note)

    def _find_sites(self, graph: Graph) -> list[_Site]:
        readers = _readers(unwrap(graph.model))
        sites: dict[str, _Site] = {}
        for number, family in enumerate(self._index.families):
            for dim, weight, row_groups in self._read_members(graph.model, family, int(self._index.starts[number])):
                for path, module in readers.get(id(weight), []):
                    if path not in sites:
                        inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
                        squares = torch.zeros(inputs, dtype=self._index.dtype, device=weight.device)
                        sites[path] = _Site(path, module, weight, {}, squares)
                    known = sites[path].groups.get(dim)
                    sites[path].groups[dim] = row_groups if known is None else torch.minimum(known, row_groups)
                    numbers = self._families_of.setdefault(path, [])
                    if number not in numbers:
                        numbers.append(number)
        return list(sites.values())

    def _read_members(self, model: nn.Module, family: Family, start: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(dimension, weight, group of each row) of every tensor that reads the family; G where a row belongs to no group."""
        for member in family.members:
            if member.role != "consumer":
                continue
            weight = find_tensor(model, member.param)
            row_groups = torch.full((weight.shape[member.dim],), self._index.num_groups, device=weight.device)
            groups = start + torch.arange(family.size)[:, None].expand(member.index.shape)
            row_groups[member.index.flatten().to(weight.device)] = groups.flatten().to(weight.device)
            yield member.dim, weight, row_groups


def _readers(model: nn.Module) -> dict[int, list[tuple[str, _Layer]]]:
    """id of a stored weight -> the modules (with path) whose inputs it multiplies; tied weights have several."""
    found: dict[int, list[tuple[str, _Layer]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, _Layer):
            found.setdefault(id(find_tensor(module, "weight")), []).append((path, module))
    return found
