"""The product: a smaller module that runs, trains, saves and explains itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from geta.errors import BadModelError
from geta.graph.preserve import mode_of, without_caches
from geta.subnet.comparison import max_difference, needs_float64, outputs
from geta.subnet.inference import lean
from geta.subnet.program import Program
from geta.subnet.structure import rebuild

if TYPE_CHECKING:
    from geta.cost import Cost
    from geta.export.compressed_tensors import CompressedTensorsReport
    from geta.export.onnx import OnnxReport
    from geta.export.torchao import TorchaoProduct


@dataclass(frozen=True)
class CompactInfo:
    """What a compact model knows about how it was made; plain JSON data.

    bits: {tensor name: bits}; weights by parameter name, activations as "<module path>:input" and "<module path>:output".
    signed: the same names -> whether the integers have a sign.
    kept: {family: indices that stayed}. family_sizes: {family: groups before}.
    dense_cost: cost of the uncut float model on the example inputs, as JSON.
    max_difference: max |zeroed - compact| / max |zeroed| on the example inputs; NaN if it could not be run.
    precision: the precision of that comparison.
    """

    bits: dict[str, int] = field(default_factory=dict)
    signed: dict[str, bool] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)
    family_sizes: dict[str, int] = field(default_factory=dict)
    dense_cost: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    max_difference: float = math.nan
    precision: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Tensors(nn.Module):
    """One level of a tree that holds tensors under the user's own dotted names; it has no attributes of its own to collide with."""


def _add_tensor(root: Tensors, name: str, tensor: torch.Tensor) -> None:
    owner: nn.Module = root
    *path, leaf = name.split(".")
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, Tensors())
        owner = owner.get_submodule(part)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def _reader(root: Tensors, names: list[str]) -> Callable[[], list[torch.Tensor | None]]:
    """Looks tensors up where they are stored, because moving a model to another device replaces its buffers."""
    places = [(root.get_submodule(path), leaf) for path, _, leaf in (name.rpartition(".") for name in names)]
    return lambda: [module._parameters.get(leaf, module._buffers.get(leaf)) for module, leaf in places]


class CompactModel(nn.Module):
    """Runs a cut graph over sliced tensors. `.train()` and `.eval()` switch between two captures over the same tensors.

    programs: "eval" and, if the model could be captured in training mode, "train", which may return something else (auxiliary outputs).
    tensors: by the names that the programs read; integer weights as `<param>_codes` with `<param>_scale`.
    out_specs: how each program's results are put together; None = as their JSON form says, with plain containers only.
    uncut: the zeroed model before the cut, for `verify`; it is not saved.
    """

    _uncut: CompactModel | None

    def __init__(
        self,
        programs: Mapping[str, Program],
        tensors: Mapping[str, torch.Tensor],
        info: CompactInfo,
        *,
        out_specs: Mapping[str, pytree.TreeSpec] | None = None,
        uncut: CompactModel | None = None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_uncut", uncut)  # not a submodule: it is no part of this model, only what it is compared with
        self.programs = dict(programs)
        self.info = info
        self.net = Tensors()
        for name, tensor in tensors.items():
            _add_tensor(self.net, name, tensor)
        first = programs["eval"]
        self._in_spec = rebuild(first.in_spec)
        self._out_specs = dict(out_specs or {mode: rebuild(program.out_spec) for mode, program in programs.items()})
        self._run: dict[str, Callable[..., Any]] = {mode: program.compile() for mode, program in programs.items()}
        self._run["lean"] = replace(first, graph=lean(first.graph)).compile()
        self._read = {mode: _reader(self.net, program.tensor_names()) for mode, program in programs.items()}
        self._read["lean"] = self._read["eval"]
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Called as the original model was in `analyze` (same arguments, any batch size)."""
        leaves = self._flatten(args, kwargs)
        mode = self._mode()
        outputs = self._run[mode](*self._read[mode](), *leaves)
        return pytree.tree_unflatten(pytree.tree_leaves(outputs), self._out_specs["train" if self.training else "eval"])

    def __deepcopy__(self, memo: dict[int, Any]) -> CompactModel:
        """Copies share the programs, which never change, and own their tensors."""
        tensors = {name: copy.deepcopy(tensor, memo) for name, tensor in self.tensors().items()}
        copied = CompactModel(self.programs, tensors, self.info, out_specs=self._out_specs, uncut=self._uncut)
        nn.Module.train(copied, self.training)
        return copied

    def _mode(self) -> str:
        if self.training:
            return "train"
        traced = torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.is_grad_enabled()
        return "eval" if traced else "lean"

    def train(self, mode: bool = True) -> CompactModel:
        """Raises BadModelError if the model could not be captured in training mode."""
        if mode and "train" not in self.programs:
            raise BadModelError("this compact model has no training graph; " + "; ".join(self.info.notes))
        super().train(mode)
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by the name that the programs read."""
        return {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}

    @property
    def bits(self) -> dict[str, int]:
        """{tensor name: bits} of everything that is quantized."""
        return dict(self.info.bits)

    @property
    def kept(self) -> dict[str, torch.Tensor]:
        """{family: indices of the groups that stayed}."""
        return {name: torch.tensor(indices, dtype=torch.int64) for name, indices in self.info.kept.items()}

    @property
    def cost(self) -> Cost:
        """MACs, BOPs, parameters and bytes, computed on this model's own graph for the captured input sizes."""
        from geta.cost import cost_of_graph

        return cost_of_graph(self.programs["eval"].graph, self.tensors())

    def verify(self, *args: Any, reference: nn.Module | None = None, **kwargs: Any) -> float:
        """Max |zeroed - this| over all outputs on the given inputs, in evaluation mode.

        reference: the model to compare with; None = the zeroed, uncut model that this one was made from, as long as this
        object was not read from disk. Against that one a quantized network is compared in float64 (see `geta.subnet.comparison`);
        `info.max_difference` is what `compact` measured in the same way on the example inputs, relative to the largest output.
        Raises BadModelError when there is nothing to compare with.
        """
        if reference is not None:
            with mode_of(reference, False), without_caches(reference), torch.no_grad():
                expected = reference(*args, **kwargs)
                return max_difference(pytree.tree_leaves(expected), pytree.tree_leaves(self.evaluate(*args, **kwargs)))[0]
        if self._uncut is None:
            raise BadModelError("this compact model no longer has the model that it was cut from: pass verify(..., reference=zeroed_model)")
        double = needs_float64(self)
        return max_difference(*[outputs(model, args, kwargs, double=double) for model in (self._uncut, self)])[0]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Forward in evaluation mode, whatever the present mode is."""
        with mode_of(self, False):
            return self(*args, **kwargs)

    def rebuilt(self, graphs: Mapping[str, fx.Graph], tensors: Mapping[str, torch.Tensor]) -> CompactModel:
        """The same model with other graphs (of the same inputs and outputs) and tensors."""
        programs = {mode: replace(self.programs[mode], graph=graph) for mode, graph in graphs.items()}
        return CompactModel(programs, tensors, self.info, out_specs=self._out_specs)

    def save(self, path: str | Path) -> None:
        """Write safetensors + JSON + graph, integers packed to their bits; atomic, no pickle."""
        from geta.export.storage import save

        save(self, path)

    @property
    def input_spec(self) -> pytree.TreeSpec:
        """How (args, kwargs) are put together from flattened inputs."""
        return self._in_spec

    def flattened(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """Inputs in the order of the graph's own. Raises BadModelError when they aren't those of the capture."""
        return self._flatten(args, dict(kwargs))

    def export_onnx(self, path: str | Path, *, integers: bool = True, **options: Any) -> OnnxReport:
        """Write one ONNX file, by default with integer weights: see `geta.export.onnx.export_onnx`."""
        from geta.export.onnx import export_onnx

        return export_onnx(self, path, integers=integers, **options)

    def export_pt2(self, path: str | Path, **options: Any) -> int:
        """Write one `.pt2` file with packed integers; returns its bytes: see `geta.export.pt2.export_pt2`."""
        from geta.export.pt2 import export_pt2

        return export_pt2(self, path, **options)

    def save_compressed_tensors(self, folder: str | Path, *, widths: Sequence[int] = (4, 8)) -> CompressedTensorsReport:
        """Write linear layers packed as inference servers read them: see `geta.export.compressed_tensors.save_compressed_tensors`."""
        from geta.export.compressed_tensors import save_compressed_tensors

        return save_compressed_tensors(self, folder, widths=widths)

    def to_torchao(self, **options: bool) -> TorchaoProduct:
        """The network with linear layers over torchao's tensors: see `geta.export.torchao.to_torchao`."""
        from geta.export.torchao import to_torchao

        return to_torchao(self, **options)

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec == self._in_spec:
            return leaves
        _, expected = pytree.tree_unflatten([0] * self._in_spec.num_leaves, self._in_spec)
        if set(expected) == set(kwargs):
            leaves, spec = pytree.tree_flatten((args, {name: kwargs[name] for name in expected}))
            if spec == self._in_spec:
                return leaves
        example = pytree.tree_unflatten(["*"] * self._in_spec.num_leaves, self._in_spec)
        raise BadModelError(
            f"the compact model was captured for the arguments {_signature(*example)} and was called with {_signature(args, kwargs)}; "
            "call it with the same arguments, or analyze the model with the ones you need"
        )


def _signature(args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    shown = ["*" if not isinstance(a, (tuple, list, dict)) else type(a).__name__ for a in args]
    return f"({', '.join([*shown, *[f'{name}=*' for name in kwargs]])})"
