"""What automatic differentiation keeps from a forward pass for the backward one, counted on the captured graph without computing it.

The training graph runs on tensors that have shapes and no numbers, while autograd works as ever; its hooks on saved tensors tell what it
keeps. Parameters, buffers and inputs exist anyway and don't count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from geta.cost.count import captured_tensors, flat_inputs, off_meta
from geta.errors import UnsupportedOpError
from geta.graph.capture import Capture

_QUANTIZERS = ("geta.fake_quantize.default", "geta.lsq_quantize.default")


@dataclass(frozen=True)
class Saved:
    """Bytes that are kept from forward to backward, without the model's own tensors and its inputs.

    activations:  all but `weights`. weights: quantized values of weights.
    block_inputs: activations that enter blocks, which is what activation checkpointing keeps of these.
    outside:      of the rest, what no block keeps. recomputed: what the largest block keeps, recomputed_weights of it quantized weights.
    result:       of the model's outputs.
    """

    activations: int
    weights: int
    block_inputs: int
    outside: int
    recomputed: int
    recomputed_weights: int
    result: int

    @property
    def checkpointed(self) -> int:
        """With every block checkpointed: their inputs, what lies outside of them, and one block that is computed again."""
        return self.block_inputs + self.outside + self.recomputed


def saved_bytes(model: nn.Module, captured: Capture, inputs: tuple[tuple[Any, ...], dict[str, Any]], blocks: Sequence[str]) -> Saved:
    """Run a training capture of `model`, made on these (args, kwargs), without numbers; blocks: module paths.

    Raises UnsupportedOpError for an operator whose shapes can't be found.
    """
    return _Run(model, captured, inputs, blocks).saved()


class _Run:
    def __init__(self, model: nn.Module, captured: Capture, inputs: tuple[tuple[Any, ...], dict[str, Any]], blocks: Sequence[str]) -> None:
        self._captured, self._blocks = captured, frozenset(blocks)
        self._places: dict[str, str] = {}
        self._seen: dict[int, Any] = {}  # storages, kept alive so that their addresses stay theirs
        self._place, self._result = "", 0
        self._quantized: set[int] = set()
        self._existing: set[int] = set()
        self._packed: dict[int, str] = {}  # storage -> the place that keeps it first
        self._made_in: dict[int, str] = {}  # storage -> the place that computes it
        self._entered: set[int] = set()
        tensors, names = captured_tensors(model, captured)
        self._stored = {node for node in captured.graph.find_nodes(op="placeholder") if node.name in names}
        with FakeTensorMode() as self._mode:
            self._go([tensors[name] for name in names.values()], flat_inputs(captured, *inputs), list(names))

    def _go(self, tensors: Sequence[Tensor], inputs: Sequence[Any], names: Sequence[str]) -> None:
        stored = dict(zip(names, tensors, strict=True))
        free = iter(inputs)
        values: dict[fx.Node, Any] = {}
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed):
            for node in self._captured.graph.nodes:
                if node.op == "placeholder":
                    values[node] = self._fake(stored[node.name] if node.name in stored else next(free))
                elif node.op == "call_function":
                    self._place = self._block(self._captured.module_path(node))
                    self._enter(node, values)
                    values[node] = self._call(node, values)
                    for leaf in _tensors(values[node]):
                        self._made_in.setdefault(self._key(leaf), self._place)
                        if str(node.target) in _QUANTIZERS and node.args[0] in self._stored:
                            self._quantized.add(self._key(leaf))
                elif node.op == "output":
                    result = [leaf for leaf in _tensors(fx.map_arg(node.args, values.__getitem__)) if leaf.is_floating_point()]
                    self._result = sum(leaf.numel() * leaf.element_size() for leaf in result)

    def saved(self) -> Saved:
        """What was kept, added up."""
        rest = {key: place for key, place in self._packed.items() if key not in self._entered}
        own = {place: [key for key in rest if rest[key] == place] for place in dict.fromkeys(rest.values())}
        outside = own.pop("", [])
        largest = max(own.values(), key=self._bytes, default=[])
        return Saved(
            activations=self._bytes(key for key in self._packed if key not in self._quantized),
            weights=self._bytes(key for key in self._packed if key in self._quantized),
            block_inputs=self._bytes(self._entered),
            outside=self._bytes(outside),
            recomputed=self._bytes(largest),
            recomputed_weights=self._bytes(key for key in largest if key in self._quantized),
            result=self._result,
        )

    def _bytes(self, keys: Iterable[int]) -> int:
        return sum(self._seen[key].nbytes() for key in keys)

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((off_meta(node.args), off_meta(node.kwargs)), values.__getitem__)
        assert callable(node.target)
        try:
            return node.target(*args, **kwargs)
        except Exception as error:  # whatever an operator's shape function raises
            raise UnsupportedOpError(
                f"what {node.target} in '{self._captured.module_path(node)}' keeps for the backward pass can't be counted, as its shapes "
                f"can't be computed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            ) from error

    def _fake(self, value: Any) -> Any:
        """The same tensor without numbers; whatever the user could train needs gradients."""
        if not isinstance(value, Tensor):
            return value
        device = "cpu" if value.device.type == "meta" else value.device
        fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        fake.requires_grad_(isinstance(value, nn.Parameter) and value.requires_grad)
        self._existing.add(self._key(fake))
        return fake

    def _pack(self, tensor: Tensor) -> Tensor:
        key = self._key(tensor)
        if key not in self._existing:
            self._packed.setdefault(key, self._place)
        return tensor

    def _enter(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Note what a block takes from outside."""
        for source in node.all_input_nodes if self._place else ():
            for leaf in _tensors(values[source]):
                key = self._key(leaf)
                if key not in self._existing and self._made_in.get(key) != self._place:
                    self._entered.add(key)

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        self._seen.setdefault(storage._cdata, storage)
        return int(storage._cdata)

    def _block(self, path: str) -> str:
        """The block that a module path lies in, or ""."""
        if path not in self._places:
            parts = path.split(".")
            prefixes = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
            self._places[path] = next((prefix for prefix in prefixes if prefix in self._blocks), "")
        return self._places[path]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
