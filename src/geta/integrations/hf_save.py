"""One call that writes a folder which `transformers` loads: `geta.save_pretrained`."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from geta.errors import BadModelError, CheckpointError, ConfigError
from geta.export.compressed_tensors import PackedFile, checked_widths, packed_file
from geta.graph import DependencyGraph
from geta.graph.configured import is_pretrained
from geta.graph.families import Selection
from geta.graph.names import canonical_name, unwrap
from geta.graph.preserve import mode_of, without_caches
from geta.integrations.hf_record import Record, attributes_of
from geta.quant import fixed_quantizers, quantizers
from geta.subnet import EagerProduct, compact, compact_eager
from geta.subnet.comparison import max_difference
from geta.subnet.removal import TOLERANCE, checked_selection

if TYPE_CHECKING:
    from geta.subnet.model import CompactModel

TENSORS, CONFIG = "model.safetensors", "config.json"
_HALF_TOLERANCE = 2e-2


@dataclass(frozen=True)
class PretrainedFolder:
    """What `save_pretrained` wrote; print it to read it in words.

    folder:     where. auto_class: the Auto class of `transformers` that loads the model (its own class where there is none).
    needs_geta: why `import geta.integrations.hf` has to come first; "" = transformers alone loads the folder.
    changes:    numbers of the configuration and attributes of modules that differ from the dense model's, one line each.
    max_difference: max |cut model - model loaded from the folder| / max |cut model| on the example inputs of the graph. The cut model
        is the eager product, or with quantizers the graph product with integer weights, whose activations are quantized.
    bytes:      size of the tensor files.
    packed, floating, inputs, lost: of quantized models, as in `CompressedTensorsReport`; empty otherwise.
    notes:      what else to know, in words.
    """

    folder: Path
    auto_class: str
    needs_geta: str
    changes: list[str]
    max_difference: float
    bytes: int
    packed: dict[str, int] = field(default_factory=dict)
    floating: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """How to load it, and what the folder doesn't say."""
        first = f"after `import geta.integrations.hf`, because {self.needs_geta}" if self.needs_geta else "with transformers alone"
        lines = [f"{self.auto_class}.from_pretrained('{self.folder}') loads it {first}", f"{self.bytes:,} bytes of tensors"]
        if self.packed:
            lines.append(f"{len(self.packed)} linear layers with weights of {_listed(sorted(set(self.packed.values())))} bits")
        lines += _by_kind("quantized weights are stored as floating-point values", self.floating)
        lines += _by_kind("quantizers of activations are not in the folder", self.lost)
        lines.append(f"the loaded model's output differs by {self.max_difference:.2g} of the largest value")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class _Plan:
    """A model class of transformers, a configuration for it, and the same model without weights (on the meta device)."""

    kind: Any
    config: Any
    shell: Any
    needs_geta: str


def save_pretrained(
    model: nn.Module,
    graph: DependencyGraph,
    folder: str | os.PathLike[str],
    *,
    selection: Selection | None = None,
    widths: Sequence[int] = (4, 8),
) -> PretrainedFolder:
    """Write `config.json`, `model.safetensors` and what generation needs, so that `from_pretrained` loads the cut model.

    model:     a model of `transformers` whose removed groups are zero (after training), maybe quantized by `geta.quantize`.
    graph:     its dependency graph. selection: {family: BoolTensor, True = remove}; None = the groups that are zero in `model`.
    widths:    bits that packed weights may have, as in `save_compressed_tensors`; without effect on a model without quantizers.

    Where one configuration describes the cut model (train with `uniform=True`), transformers alone loads the folder; whole layers that are
    gone are part of that, in its number of layers and in lists with an entry for each (docs/depth.md). Otherwise its model type is "geta",
    and `import geta.integrations.hf` has to come before `AutoModel....from_pretrained`. Integer weights are packed in the
    `compressed-tensors` layout. Before anything is put in its place the folder is loaded and compared with the cut model. A tokenizer is
    not touched: save it into the same folder. `model` is not changed.

    Raises ConfigError for a model that isn't one of transformers (5 or later), a selection that doesn't fit, impossible widths, or a
    folder that can't be written; BadModelError when there is no eager product or the folder would load as another model.
    """
    allowed = checked_widths(widths)
    model = unwrap(model)
    if not is_pretrained(model):
        raise ConfigError(f"{type(model).__name__} is no model of transformers: use geta.compact(model, graph).save(folder)")
    _check_version()
    selection = checked_selection(model, graph, selection)
    product = compact_eager(model, graph, selection)
    plan = _planned(product)
    reference: Any = product.model
    file = None
    if quantizers(model) or fixed_quantizers(model):
        reference = compact(model, graph, selection)
        file = _packed(reference, plan, allowed)
        if product.shortening:
            file.rename(product.shortening.name)
        file = _completed(file, plan, product.model)
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as staging, _quiet():
            _write(Path(staging), plan, product.model, file)
            loaded = _loaded(Path(staging), plan, next(product.model.parameters()).device)
            gap = _compared(loaded, reference, product.model, graph, exact=file is None)
            size = _moved(Path(staging), target)
    except OSError as error:
        raise ConfigError(f"the model can't be written to '{target}': {error}; choose a writable folder") from error
    from geta.integrations.hf import auto_class

    kind = plan.kind.__bases__[0] if plan.needs_geta else plan.kind
    notes = [note for note in product.notes if not (product.undescribed and note.endswith(product.undescribed))]
    report = PretrainedFolder(target, auto_class(kind), plan.needs_geta, product.changes, gap, size, notes=notes)
    if file is None:
        return report
    found = (file.packed, file.floating, file.input_bits, file.lost, [*notes, *file.notes, *_inexact(file, gap)])
    return PretrainedFolder(target, report.auto_class, plan.needs_geta, product.changes, gap, size, *found)


def _check_version() -> None:
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        raise ConfigError(f"geta.save_pretrained needs transformers 5 or later, {transformers.__version__} is installed: update it")


def _planned(product: EagerProduct) -> _Plan:
    """Which class and configuration build what the product is: the model's own if they do, else those with a record of the rest."""
    import transformers

    from geta.integrations.hf import GetaConfig, model_class, record_config

    small: Any = product.model
    kind, config, places = type(small), small.config, [(change.module, change.path) for change in product.attributes]
    if isinstance(config, GetaConfig):  # cut before: the record starts again from the base class
        earlier = Record.from_json(config.geta)
        places += [(path, tuple(name.split("."))) for path, own in earlier.attributes.items() for name in own]
        kind, config = kind.__bases__[0], config.base_config
    if getattr(transformers, kind.__name__, None) is not kind:
        raise ConfigError(
            f"{kind.__name__} is defined in '{kind.__module__}', not in transformers, so that no folder can name it: use "
            f"geta.compact(model, graph, product='eager') and its save_pretrained, and load with that class"
        )
    built = _shell(kind, config)
    wanted, given = _shapes(small), {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    if product.shortening and set(wanted) != set(given):
        raise BadModelError(
            f"there is no folder for this {kind.__name__} with fewer layers ({_listed(product.shortening.lines())}), because "
            f"{product.undescribed}: keep these branches, or use the graph product, geta.compact(model, graph).save(folder)"
        )
    if set(wanted) != set(given):
        other = sorted(set(wanted) ^ set(given))
        raise BadModelError(f"a new {kind.__name__} has other tensors than this one ({_listed(other[:3])}): were modules added to it?")
    shapes = {name: [None if a == b else a for a, b in zip(wanted[name], given[name], strict=True)] for name in wanted}
    shapes = {name: shape for name, shape in shapes.items() if wanted[name] != given[name]}
    try:
        attributes = attributes_of(dict.fromkeys(places), small, built)
    except CheckpointError as error:
        raise BadModelError(f"there is no folder for this {kind.__name__}, because a change can't be said in it: {error}") from error
    if not shapes and not attributes:
        return _Plan(kind, config, built, "")
    record = Record(str(kind.config_class.model_type), kind.__name__, shapes, attributes)
    own, described = model_class(kind), record_config(config, record)
    reason = product.undescribed or "layers differ in ways that no number of the configuration says"
    return _Plan(own, described, _shell(own, described), reason)


def _shell(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


def _plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it would be without quantizers."""
    modules = (*quantizers(model).values(), *fixed_quantizers(model).values())
    own = {id(module) for module in modules}
    inside = tuple(f"{path}." for path, module in model.named_modules(remove_duplicate=False) if id(module) in own)
    return {canonical_name(name): tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _plain_tensors(model).items()}


def _packed(small: CompactModel, plan: _Plan, widths: Sequence[int]) -> PackedFile:
    """The integer weights in a way in which transformers can compute with them.

    It unpacks weights when the whole model is called for the first time. Generation with an encoder and a decoder calls the encoder
    alone, so that weights have to be unpacked while they are loaded; then all have one width and one size of groups, and inputs are not
    quantized.
    """
    file = packed_file(small, widths)
    if not plan.config.is_encoder_decoder or not file.packed:
        return file
    reason = "transformers unpacks the weights of encoder-decoder models while it loads them, and quantizes no inputs then"
    file = packed_file(small, [max(file.packed.values())], no_inputs=reason, alike=True)
    file.config["dequantize"] = True
    return file


def _completed(file: PackedFile, plan: _Plan, small: nn.Module) -> PackedFile:
    """The file with exactly the tensors that the class reads: what only it has is added, constants of the graph go."""
    expected = set(plan.shell.state_dict())
    tied = dict(plan.shell.all_tied_weights_keys)
    packed = {f"{path}.weight" for path in file.packed}
    extra = tuple(f"{path}." for path in file.packed)
    stored = {name: tensor for name, tensor in file.tensors.items() if name in expected or name.startswith(extra)}
    for name, tensor in _plain_tensors(small).items():
        if name not in stored and name not in packed and tied.get(name) not in {*stored, *packed}:
            stored[name] = tensor
    file.tensors = stored
    return file


def _write(folder: Path, plan: _Plan, small: Any, file: PackedFile | None) -> None:
    """Everything into an empty folder."""
    shell = plan.shell
    if shell.can_generate():
        shell.generation_config = copy.deepcopy(small.generation_config)
    if file is None:
        shell.load_state_dict(small.state_dict(), assign=True)
        shell.save_pretrained(folder)
        return
    config = copy.deepcopy(plan.config)
    config.dtype = str(small.dtype).removeprefix("torch.")
    config.architectures = [plan.kind.__name__]
    if file.packed:
        config.quantization_config = file.config
    config.save_pretrained(folder)
    if shell.can_generate():
        shell.generation_config.save_pretrained(folder)
    stored = {name: file.tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(file.tensors)}
    safetensors.torch.save_file(stored, folder / TENSORS, metadata={"format": "pt"})


def _loaded(folder: Path, plan: _Plan, device: torch.device) -> Any:
    """The folder as transformers loads it; raises BadModelError unless it reads all of it."""
    try:
        loaded, info = plan.kind.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # whatever the library raises, the folder must not be handed out
        raise BadModelError(f"there is no folder for this {plan.kind.__name__}: transformers can't load it: {error}") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        words = "; ".join(f"{kind.replace('_', ' ')}: {_listed(names[:3])}" for kind, names in wrong.items())
        raise BadModelError(f"there is no folder for this {plan.kind.__name__}: transformers would not read all of it: {words}")
    return loaded.to(device)


def _compared(loaded: Any, reference: nn.Module, small: nn.Module, graph: DependencyGraph, *, exact: bool) -> float:
    """The largest relative difference of outputs. Raises BadModelError unless the loaded model is the cut one.

    exact: outputs must agree. Otherwise (with quantizers, of which some may be missing) all tensors must.
    """
    gap = max_difference(_run(reference, graph), _run(loaded, graph))[1]
    narrow = any(p.dtype in (torch.float16, torch.bfloat16) for p in reference.parameters())
    limit = _HALF_TOLERANCE if narrow else TOLERANCE[torch.float32]
    wrong = f"its output differs by {gap:.2g} of the largest value on the example inputs" if exact and not gap <= limit else ""
    if not exact:
        apart = {name: max_difference([_value(small, name)], [_value(loaded, name)])[1] for name in _plain_tensors(small)}
        name = max(apart, key=lambda one: apart[one])
        wrong = f"'{name}' differs by {apart[name]:.2g} of its largest value" if not apart[name] <= limit else ""
    if wrong:
        raise BadModelError(f"there is no folder for this {type(small).__name__}: what transformers loads is not the cut model: {wrong}")
    return gap


def _value(model: nn.Module, name: str) -> Tensor:
    """What the model computes with: a quantized parameter's values."""
    path, _, leaf = name.rpartition(".")
    value: Tensor = getattr(model.get_submodule(path), leaf)
    return value.detach()


def _run(model: nn.Module, graph: DependencyGraph) -> list[Tensor]:
    """Floating-point outputs on the example inputs, in evaluation mode."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), (graph.example.args, dict(graph.example.kwargs)))
    with mode_of(model, False), without_caches(model), torch.no_grad():
        found = pytree.tree_leaves(model(*args, **kwargs))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _inexact(file: PackedFile, gap: float) -> list[str]:
    """Why a quantized model may compute something else than the cut one, in words."""
    if file.lost:
        return [f"{len(file.lost)} quantizers of activations are not in the folder, so that the loaded model computes without them"]
    if file.input_bits and gap > 0:
        return ["quantized inputs at the edge between two codes may be rounded the other way"]
    return []


def _moved(staging: Path, folder: Path) -> int:
    """Put the files in their place, the configuration last, and remove tensors of an earlier model. Returns the bytes of the tensors."""
    made = sorted(path.name for path in staging.iterdir())
    size = sum((staging / name).stat().st_size for name in made if name.endswith(".safetensors"))
    for name in sorted(made, key=lambda name: name == CONFIG):
        os.replace(staging / name, folder / name)
    for old in sorted(folder.glob("model*.safetensors*")):
        if old.name not in made:
            old.unlink()
    return size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _by_kind(what: str, reasons: Mapping[str, str]) -> list[str]:
    """One line with the first reason, which names its own layer."""
    first = next(iter(reasons.items()), None)
    return [] if first is None else [f"{len(reasons)} {what} (first: '{first[0]}': {first[1]})"]


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))
