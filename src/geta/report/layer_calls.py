"""One layer of given sizes as a function to time: in PyTorch, or alone in an ONNX file as `export_onnx` would write it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from geta.cost.layers import LayerShape
from geta.export.onnx_quant import OPSET
from geta.export.parity import opened
from geta.report.runtimes import has_dot_products

_IR_VERSION = 10
"""Of ONNX files with opset 21."""
_SCALE = 0.05

Call = Callable[[], object]


def eager_call(shape: LayerShape, values: Sequence[int]) -> Call:
    """The layer in PyTorch."""
    sizes, settings = shape.at(values), dict(shape.settings)
    tensors = [torch.randn(size) for size in sizes.values()]
    if shape.op.startswith("conv"):
        settings["groups"] = _groups(shape, sizes)
        if len(tensors) == 2:
            settings["bias"] = None
    elif shape.op == "scaled_dot_product_attention" and sizes["query"][-3] != sizes["key"][-3]:
        settings["enable_gqa"] = True
    home = torch.nn.functional if shape.op in ("linear", "scaled_dot_product_attention") else torch
    function = getattr(home, shape.op)

    def call() -> object:
        with torch.inference_mode():
            return function(*tensors, **settings)

    return call


def onnx_call(shape: LayerShape, values: Sequence[int], *, integers: bool, threads: int) -> Call:
    """The layer in ONNX Runtime, on the CPU. integers: 8-bit weights and input, and for convolutions an 8-bit result."""
    return _session(_Builder(shape, values, integers=integers).build(), threads)


def empty_call(threads: int) -> Call:
    """What calling ONNX Runtime takes that isn't the layer's time: a network of one number."""
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "empty", ends[:1], ends[1:])
    return _session(_serialized(graph), threads)


def _session(model: bytes, threads: int) -> Call:
    session = opened(model, threads)
    generator = np.random.default_rng(0)
    feeds = {}
    for one in session.get_inputs():
        if one.type == "tensor(uint8)":
            feeds[one.name] = generator.integers(0, 256, one.shape, dtype=np.uint8)
        else:
            feeds[one.name] = generator.standard_normal(one.shape, dtype=np.float32)

    def call() -> object:
        return session.run(None, feeds)

    return call


def _serialized(graph: Any) -> bytes:
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)
    found: bytes = model.SerializeToString()
    return found


class _Builder:
    """The graph of one layer."""

    def __init__(self, shape: LayerShape, values: Sequence[int], *, integers: bool) -> None:
        self._shape = shape
        self._sizes = shape.at(values)
        self._integers = integers
        self._uint8 = not has_dot_products()
        self._generator = np.random.default_rng(0)
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []

    def build(self) -> bytes:
        from onnx import TensorProto, helper

        op = self._shape.op
        if op.startswith("conv"):
            result = self._convolution()
        elif op == "scaled_dot_product_attention":
            result = self._attention()
        else:
            result = self._product()
        kind = TensorProto.UINT8 if op.startswith("conv") and self._integers else TensorProto.FLOAT
        output = helper.make_tensor_value_info(result, kind, None)
        return _serialized(helper.make_graph(self._nodes, "layer", self._inputs, [output], self._constants))

    def _convolution(self) -> str:
        rank = len(self._sizes["input"]) - 2
        settings = dict(self._shape.settings)
        words: dict[str, Any] = {"strides": list(settings["stride"]), "dilations": list(settings["dilation"])}
        words["group"] = _groups(self._shape, self._sizes)
        padding = settings["padding"]
        if isinstance(padding, str):
            words["auto_pad"] = {"same": "SAME_UPPER", "valid": "VALID"}[padding]
        else:
            words["pads"] = list(padding * 2)
        if "output_padding" in settings:
            words["output_padding"] = list(settings["output_padding"])
        operands = [self._operand("input"), self._operand("weight")]
        if "bias" in self._sizes:
            operands.append(self._bias())
        assert len(self._sizes["weight"]) == rank + 2
        result = self._node("ConvTranspose" if "transpose" in self._shape.op else "Conv", *operands, **words)
        return self._node("QuantizeLinear", result, *self._scale(128, np.uint8)) if self._integers else result

    def _product(self) -> str:
        names = [name for name, *_ in self._shape.tensors]
        bias = "bias" if "bias" in names else "self" if self._shape.op == "addmm" else None
        left, right = [name for name in names if name != bias]
        product = self._node("MatMul", self._operand(left), self._operand(right))
        return product if bias is None else self._node("Add", product, self._bias() if bias == "bias" else self._operand(bias))

    def _attention(self) -> str:
        query, key, value = (self._operand(name) for name in ("query", "key", "value"))
        rank = len(self._sizes["query"])
        turned = self._node("Transpose", key, perm=[*range(rank - 2), rank - 1, rank - 2])
        scores = self._node("MatMul", self._node("Mul", query, self._constant(np.float32(0.125))), turned)
        return self._node("MatMul", self._node("Softmax", scores, axis=-1), value)

    def _operand(self, name: str) -> str:
        """A tensor of the layer, as a float: an input or a constant, dequantized where the layer runs in integers."""
        from onnx import TensorProto, helper

        size = list(self._sizes[name])
        if name in ("key", "value"):
            size[-3] = self._sizes["query"][-3]  # key-value heads that several queries share are repeated
        if name == "weight" and self._shape.op == "linear":
            size = size[::-1]
        constant = {one: fixed for one, fixed, _ in self._shape.tensors}[name]
        if not constant:
            kind = TensorProto.UINT8 if self._integers else TensorProto.FLOAT
            self._inputs.append(helper.make_tensor_value_info(name, kind, size))
            return self._node("DequantizeLinear", name, *self._scale(128, np.uint8)) if self._integers else name
        if not self._integers:
            return self._constant(self._generator.standard_normal(size, dtype=np.float32))
        codes = self._generator.integers(1, 128, size)
        zero, stored = (128, np.dtype(np.uint8)) if self._uint8 else (0, np.dtype(np.int8))
        return self._node("DequantizeLinear", self._constant((codes + zero).astype(stored)), *self._scale(zero, stored))

    def _bias(self) -> str:
        size = self._sizes["bias"]
        if not self._integers:
            return self._constant(self._generator.standard_normal(size, dtype=np.float32))
        codes = self._generator.integers(-99, 99, size).astype(np.int32)
        return self._node("DequantizeLinear", self._constant(codes), self._constant(np.float32(_SCALE * _SCALE)))

    def _scale(self, zero: int, kind: Any) -> tuple[str, str]:
        return self._constant(np.float32(_SCALE)), self._constant(np.array(zero, dtype=kind))

    def _constant(self, value: Any) -> str:
        from onnx import numpy_helper

        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _node(self, op: str, *inputs: str, **words: Any) -> str:
        from onnx import helper

        name = f"n{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [name], **words))
        return name


def _groups(shape: LayerShape, sizes: dict[str, tuple[int, ...]]) -> int:
    return 1 if "transpose" in shape.op else sizes["input"][1] // sizes["weight"][1]
