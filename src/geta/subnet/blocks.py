"""Columns are cut out of weights whose rows have one scale per block: the blocks get shorter, and those that lose all columns go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from geta.errors import BadModelError
from geta.graph.propagate import bind_arguments
from geta.quant.blocks import Blocks, Cutting, shortest_form
from geta.quant.fixed import FixedQuantizer
from geta.quant.quantizer import Quantizer
from geta.subnet.rewrite import Kept

_PARAMETERS = {
    torch.ops.geta.fake_quantize.default: ("x", ("d", "q_m", "t")),
    torch.ops.geta.lsq_quantize.default: ("x", ("scale",)),
    torch.ops.geta.dequantize.default: ("codes", ("scale",)),
}
"""Operators with blocks -> the argument that is cut into them, and those that hold a number for each."""


def cut_blocks(graph: fx.Graph, tensors: dict[str, torch.Tensor], whole: Callable[[str], torch.Tensor], cut: Mapping[str, Kept]) -> None:
    """Let the quantizers of a graph follow the columns that their weights keep, in place.

    tensors: those that the graph reads, cut to what `cut` keeps of the `whole` ones; of the scales the blocks without columns go here.
    """
    done: set[str] = set()
    for node in graph.nodes:
        if node.target not in _PARAMETERS or not node.kwargs.get("blocks"):
            continue
        data, names = _PARAMETERS[node.target]
        bound = bind_arguments(node, lambda arg: arg)
        weight, parameters = str(bound[data].target), [str(bound[name].target) for name in names]
        axis, widths = _shortened(whole(weight).shape, whole(parameters[0]).shape, bound["blocks"], cut[weight])
        blocks, stays = _left(widths)
        others = {name: value for name, value in node.kwargs.items() if name != "blocks"}
        node.kwargs = {**others, "blocks": [*blocks]} if blocks else others
        for name in parameters:
            if name not in done:
                tensors[name] = _without_empty(tensors[name], axis, stays)
        done.update(parameters)


def cut_blocks_of_modules(model: nn.Module, kept_of: Mapping[int, Kept]) -> None:
    """The same for the quantizers of a model whose tensors aren't cut yet. kept_of: id of a tensor -> what it keeps."""
    done: set[int] = set()
    for module in model.modules():
        for stages in module.parametrizations.values() if parametrize.is_parametrized(module) else ():  # type: ignore[operator]
            quantizer, weight = stages[0], stages.original
            if not isinstance(quantizer, Quantizer | FixedQuantizer) or not quantizer.blocks or id(quantizer) in done:
                continue
            done.add(id(quantizer))
            parameters = list(quantizer.parameters())
            axis, widths = _shortened(weight.shape, parameters[0].shape, quantizer.blocks, kept_of.get(id(weight), {}))
            quantizer.blocks, stays = _left(widths)
            for parameter in parameters:
                parameter.data = _without_empty(parameter.data, axis, stays)


def _shortened(shape: Sequence[int], parameter: Sequence[int], blocks: Sequence[int], kept: Kept) -> tuple[int, list[int]]:
    """The dimension that is cut into blocks, and how many columns each keeps."""
    whole = Cutting.of(shape, parameter, blocks)
    if whole.axis not in kept:
        return whole.axis, list(whole.widths)
    block_of = np.repeat(np.arange(len(whole.widths)), whole.widths)
    return whole.axis, np.bincount(block_of[kept[whole.axis].numpy()], minlength=len(whole.widths)).tolist()


def _left(widths: Sequence[int]) -> tuple[Blocks, torch.Tensor]:
    """Blocks in their shortest form, and which of them have columns."""
    stays = torch.tensor(widths, device="cpu").nonzero().reshape(-1)
    if not len(stays):
        raise BadModelError("a weight that is quantized in blocks would lose all of its columns; please report this model")
    return shortest_form([width for width in widths if width]), stays


def _without_empty(tensor: torch.Tensor, axis: int, stays: torch.Tensor) -> torch.Tensor:
    if len(stays) == tensor.shape[axis]:
        return tensor
    data = tensor.detach().index_select(axis, stays.to(tensor.device))
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
