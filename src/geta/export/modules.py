"""What PyTorch's exporters are given: a module around a lowered graph, example inputs, names of the results, sizes that stay open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from geta.errors import BadModelError, ConfigError
from geta.export.cleanup import Network
from geta.subnet.structure import rebuild

if TYPE_CHECKING:
    from geta.subnet.model import CompactModel

_Program = TypeVar("_Program")
Dynamic = Literal["batch", "all", "none"]
_WISHES: dict[str, tuple[str, ...]] = {"all": ("all", "batch", "none"), "batch": ("batch", "none"), "none": ("none",)}


class Exportable(torch.nn.Module):
    """Runs a lowered graph. Tensors are buffers, called as files show them.

    shown: place and name of the results that are tensors.
    """

    def __init__(self, network: Network, shown: Sequence[tuple[int, str]]) -> None:
        super().__init__()
        self.places = [place for place, _ in shown]
        root = torch.nn.Module()
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in network.graph.nodes:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            if node.op == "get_attr":
                mapping[node].target = flat(str(node.target))
        for name in dict.fromkeys(str(node.target) for node in network.graph.nodes if node.op == "get_attr"):
            root.register_buffer(flat(name), network.tensors[name].detach().cpu().contiguous())
        self.run = fx.GraphModule(root, graph)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = pytree.tree_leaves(self.run(*inputs))
        return tuple(results[place] for place in self.places)


def flat(name: str) -> str:
    """A tensor's name in the file."""
    return name.replace(".", "__")


def example_inputs(graph: fx.Graph) -> list[Any]:
    """Inputs like those of the capture: numbers from a normal distribution, indices 0 and 1, plain values as they were."""
    generator = torch.Generator().manual_seed(0)
    return [_example(node, generator) for node in graph.find_nodes(op="placeholder")]


def _example(node: fx.Node, generator: torch.Generator) -> Any:
    recorded = node.meta.get("example")
    if recorded is None:
        return node.meta.get("val")
    dtype, shape = getattr(torch, recorded["dtype"]), recorded["shape"]
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def named_outputs(model: CompactModel, network: Network) -> list[tuple[int, str]]:
    """Place and name of every result that is a tensor: `logits` of a dict, `output_1` of a tuple, `output` of a single one."""
    results = pytree.tree_leaves(network.graph.output_node().args[0])
    spec = rebuild(model.programs["eval"].out_spec)
    named, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten([*range(len(results))], spec))
    names = ["_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys) for keys, _ in named]
    shown = [(place, name) for place, (name, result) in enumerate(zip(names, results, strict=True)) if isinstance(result, fx.Node)]
    single = len(shown) == 1 and not shown[0][1]
    return [(place, "output" if single else f"output_{name}" if name[:1].isdigit() else name) for place, name in shown]


def first_cause(error: BaseException) -> str:
    """What went wrong at the bottom of a chain of errors, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def check_wishes(target: Path, dynamic: str) -> None:
    """Raise ConfigError for a file that can't be written, or an unknown word for the sizes that are to stay open."""
    if dynamic not in _WISHES:
        raise ConfigError(f"dynamic is {dynamic!r}: it must be one of {', '.join(get_args(Dynamic))}")
    if not target.parent.is_dir() or target.is_dir():
        raise ConfigError(f"'{target}' can't be written: {'it is a folder' if target.is_dir() else f'there is no folder {target.parent}'}")


def with_open_sizes(exporter: str, leaves: Sequence[Any], dynamic: str, export: Callable[[Any], _Program]) -> _Program:
    """What `export(dynamic shapes of *leaves)` gives, with as many open sizes as were asked for and can be had.

    exporter: for the message. Raises BadModelError with the last reason where not even fixed sizes can be exported.
    """
    reason = ""
    for wish in _WISHES[dynamic]:
        try:
            return export(None if wish == "none" else (tuple(_open_sizes(leaf, wish) for leaf in leaves),))
        except Exception as error:  # noqa: BLE001 - whatever an exporter raises; what it says goes into ours
            reason = first_cause(error)
    raise BadModelError(f"{exporter} this model: {reason}")


def _open_sizes(leaf: Any, wish: str) -> dict[int, Any] | None:
    """The dimensions of an input that are to stay open."""
    if not isinstance(leaf, Tensor) or not leaf.dim():
        return None
    dims = range(leaf.dim()) if wish == "all" else range(1)
    return {dim: torch.export.Dim.AUTO for dim in dims if leaf.shape[dim] > 1} or None
