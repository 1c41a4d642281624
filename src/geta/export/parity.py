"""Does ONNX Runtime compute the network that was trained? Quantizer by quantizer, and at the results.

Two quantized networks that compute the same sums in another order differ by whole steps wherever a sum lies on a rounding boundary, and
what comes after such a step differs too. So every quantizer is compared on its own: PyTorch is given the integers that the runtime made
before it, and has to make the integers that the runtime made there, give or take one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from geta.export.cleanup import Network, clean_up, copied
from geta.export.modules import example_inputs, named_outputs
from geta.export.onnx import write_network
from geta.export.onnx_lower import lower
from geta.export.onnx_quant import EXACT_BLOCKS, activation_of

if TYPE_CHECKING:
    from geta.subnet.model import CompactModel


@dataclass(frozen=True)
class Parity:
    """steps: name of a quantizer's node -> largest difference of its codes, given equal codes before it.

    flips: share of all codes that differ. output: largest difference of a result, given equal codes before it, relative to the largest
    value. end_to_end: the same without help: each side computes with its own codes.
    """

    steps: dict[str, float]
    flips: float
    output: float
    end_to_end: float

    @property
    def largest_step(self) -> float:
        return max(self.steps.values(), default=0.0)


@torch.no_grad()
def parity(model: CompactModel, inputs: Sequence[Any] | None = None, *, uint8_weights: bool = True) -> Parity:
    """Compare a compact model with ONNX Runtime's integer kernels, on `inputs` (flattened) or on random ones of the captured sizes.

    Needs onnxruntime (`geta[onnx]`).
    """
    network = copied(model.programs["eval"].graph, model.tensors())
    clean_up(network)
    own = copied(network.graph, network.tensors)
    leaves = list(example_inputs(network.graph)) if inputs is None else list(inputs)
    shown = named_outputs(model, network)
    lowered = lower(network, uint8_weights=uint8_weights)
    names = [*lowered.activations]
    results = pytree.tree_leaves(network.graph.output_node().args[0])
    seen = [_copy_of(network.graph, lowered.activations[name]) for name in names]
    network.graph.output_node().args = ((*results, *seen),)
    exposed = [*shown, *((len(results) + place, f"quantizer_{place}") for place in range(len(names)))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_network(network, exposed, leaves, path, dynamic="none")
        found = run_file(path, leaves)
    theirs, codes = found[: len(shown)], dict(zip(names, found[len(shown) :], strict=True))
    forced, steps, differing = _forced(own, leaves, codes)
    plain, _, _ = _forced(own, leaves, {})
    count = sum(tensor.numel() for tensor in codes.values())
    places = [place for place, _ in shown]
    return Parity(steps, differing / max(1, count), _gap(theirs, [forced[p] for p in places]), _gap(theirs, [plain[p] for p in places]))


def _copy_of(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """What a node gives, before anything changes it in place."""
    with graph.inserting_after(node):
        return graph.call_function(torch.ops.aten.clone.default, (node,))


def run_file(path: Path, leaves: Sequence[Any]) -> list[Tensor]:
    """An ONNX file's results in ONNX Runtime, on one CPU thread."""
    return [torch.from_numpy(result) for result in runner(path)([leaf.cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves])]


def runner(path: Path, threads: int = 1) -> Callable[[Sequence[Any]], list[Any]]:
    """An ONNX file in ONNX Runtime on the CPU, as a function of flattened inputs; its results are numpy arrays."""
    session = opened(str(path), threads)
    names = [one.name for one in session.get_inputs()]

    def call(leaves: Sequence[Any]) -> list[Any]:
        arrays = [leaf.numpy() for leaf in leaves if isinstance(leaf, Tensor)]
        results: list[Any] = session.run(None, dict(zip(names, arrays, strict=True)))
        return results

    return call


def opened(model: str | bytes, threads: int) -> Any:
    """An ONNX file, by its path or its contents, in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT_BLOCKS)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _forced(network: Network, leaves: Sequence[Any], codes: Mapping[str, Tensor]) -> tuple[list[Any], dict[str, float], int]:
    """The graph's results where the named quantizers give `codes` instead of their own; and how far their own were from these, in steps."""
    values: dict[fx.Node, Any] = dict(zip(network.graph.find_nodes(op="placeholder"), leaves, strict=True))
    steps: dict[str, float] = {}
    differing = 0
    for node in network.graph.nodes:
        if node.op == "get_attr":
            values[node] = network.read(node)
        elif node.op == "call_function":
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
            found = activation_of(network, node) if node.name in codes else None
            if found is not None:
                shape = [1] * values[node].dim()
                if found.scale.dim():
                    shape[found.axis] = -1
                gap = ((values[node] - codes[node.name]) / found.scale.reshape(shape if found.scale.dim() else ())).abs()
                steps[node.name] = float(gap.max()) if gap.numel() else 0.0
                differing += int((gap > 0.5).sum())
                values[node] = codes[node.name]
    output = network.graph.output_node().args[0]
    return [values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in pytree.tree_leaves(output)], steps, differing


def _gap(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """max |a - b| / max |b|, over all pairs."""
    gaps = [
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
        for a, b in zip(some, others, strict=True)
        if b.numel()
    ]
    return max(gaps, default=0.0)
