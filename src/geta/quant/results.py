"""Which layers' results get a quantizer too, so that runtimes can compute them in integers from end to end.

An integer convolution makes integers, so runtimes take one only where its result is quantized. Between two quantized layers the second
one's input quantizer does that. A convolution whose result is added to something, pooled or returned has none: its result gets a quantizer
of its own, on the module that makes it last:

    convolution                      its own result
    convolution, batch norm          the batch norm's
    convolution, batch norm, ReLU    the ReLU's (or ReLU6's ...), if it is a module that runs once in a forward pass; else the batch norm's

Padding with zeros before the next layer changes nothing of this. Linear layers need none: integer products give floating-point
numbers as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from geta.quant.targets import Layer

if TYPE_CHECKING:
    from geta.graph.capture import Capture

_aten = torch.ops.aten
CONVOLUTIONS = (
    *(_aten.conv1d.default, _aten.conv2d.default, _aten.conv3d.default, _aten.conv1d.padding, _aten.conv2d.padding, _aten.conv3d.padding),
    _aten.convolution.default,
)
"""Of any number of dimensions, not transposed."""
RELUS = (_aten.relu.default, _aten.relu_.default)
"""What may stand between an integer convolution and the quantizer of its result."""
RELU6 = (_aten.relu6.default, _aten.relu6_.default)
CLAMPS = (
    *(*RELU6, _aten.hardtanh.default, _aten.hardtanh_.default, _aten.clamp.default, _aten.clamp_.default),
    *(_aten.clip.default, _aten.clip_.default, _aten.clamp_min.default, _aten.clamp_min_.default),
)
"""So may these: the file has them act on codes (`geta.export.between`)."""
PADS = (_aten.pad.default, _aten.constant_pad_nd.default)


def find_results(model: nn.Module, capture: Capture, layers: Sequence[Layer]) -> list[Layer]:
    """The modules whose result is to be quantized, in the order in which they run.

    capture: of `model` in evaluation mode, before any quantizer. layers: those whose weights and inputs get quantizers.
    """
    graph = capture.graph
    quantized = {layer.path for layer in layers if layer.quantize_input}
    path = capture.module_path
    calls = Counter(path(node) for node in graph.nodes if node.target in (*CONVOLUTIONS, _aten.batch_norm.default, *RELUS, *CLAMPS))
    found: dict[str, Layer] = {}
    for node in graph.nodes:
        if node.target not in CONVOLUTIONS or path(node) not in quantized or calls[path(node)] != 1:
            continue
        chain = [node]
        for wanted in ((_aten.batch_norm.default,), (*RELUS, *CLAMPS), CLAMPS):
            reader = _only_reader(chain[-1])
            if reader is not None and reader.target in wanted:
                chain.append(reader)
        if all(_reads_first(reader, source) and path(reader) in quantized for reader, source in _readers(chain[-1])):
            continue
        owners = [link for link in chain if calls[path(link)] == 1 and _makes(model, path(link), link)]
        if owners:
            owner = path(owners[-1])
            found[owner] = Layer(owner, model.get_submodule(owner), (), quantize_input=False)
    return [*found.values()]


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(who reads a value, what it reads), looking through padding."""
    for user in node.users:
        if user.target in PADS and user.args[0] is node:
            yield from _readers(user)
        else:
            yield user, node


def _reads_first(reader: fx.Node, node: fx.Node) -> bool:
    """Whether a node is a quantized layer's data: its first argument."""
    return reader.target in (*CONVOLUTIONS, _aten.linear.default) and reader.args[0] is node


def _makes(model: nn.Module, path: str, node: fx.Node) -> bool:
    """Whether the module at `path` is the convolution, batch norm or (capped) ReLU whose result the node is, not a block around it."""
    kind: type[nn.Module] = nn.modules.conv._ConvNd
    if node.target is _aten.batch_norm.default:
        kind = nn.modules.batchnorm._BatchNorm
    elif node.target in RELUS:
        kind = nn.ReLU
    elif node.target in CLAMPS:
        kind = nn.Hardtanh
    return isinstance(model.get_submodule(path), kind)
