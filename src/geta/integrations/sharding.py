"""Models that accelerate shards itself (its FSDP2 plugin, also through the Trainer): what has to be done before, and whole weights after.

compressor = geta.Compressor(model, (x,), sparsity=0.5, weight_bits=(4, 8))
optimizer = compressor.optimizer(torch.optim.AdamW, lr=1e-3, total_steps=steps)
prepare_sharding(compressor, accelerator)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
...the training loop, unchanged...
small = compressor.finish()
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from geta import ranks
from geta.errors import ConfigError
from geta.graph import DependencyGraph
from geta.graph.names import find_tensor, unwrap, without_wrappers
from geta.optim import quantizer_parameters
from geta.optim.shards import is_sharded, reshard, whole
from geta.quant import Quantizer, fixed_quantizers, quantizers

if TYPE_CHECKING:
    from geta.integrations.compressor import Compressor


def shards(accelerator: Any) -> bool:
    """Whether an `accelerate.Accelerator` shards the models that it prepares.

    accelerate takes its plugin for accelerators only (`AcceleratorState`): on CPUs it trains whole copies, whatever was asked for.
    """
    return getattr(accelerator.state, "fsdp_plugin", None) is not None


def prepare_sharding(compressor: Compressor, accelerator: Any) -> None:
    """Call it before `accelerator.prepare(model, optimizer)`; does nothing unless the Accelerator has an FSDP2 plugin and shards.

    - The plugin leaves the quantizers' parameters whole (`ignored_modules`), on the accelerator's device.
    - `accelerator.backward` averages their gradients over the ranks, so that clipping comes to the same factor everywhere.
    - Tied embeddings come into one group of sharded parameters, and the state dict has their quantizer under its first name only:
      accelerate doesn't see the tie of quantized weights, and torch can't broadcast a module with two names.
    - A budget derives its costs from the whole model; the compressor keeps a copy of the model without weights, which
      `Compressor.finish` and `Compressor.gathered` fill.

    Raises ConfigError for what can't work: FSDP1, float16 (a rank alone would skip steps), `cpu_ram_efficient_loading` (it takes all
    tensors of the model for sharded ones), wrapping by size, and a model that is sharded already.
    """
    if not shards(accelerator):
        return
    model = unwrap(compressor.model)
    plugin = accelerator.state.fsdp_plugin
    _refuse(model, plugin, accelerator.mixed_precision)
    compressor.expect_sharding(Skeleton.of(model))
    own = [*quantizers(model).values(), *fixed_quantizers(model).values()]
    for module in own:
        module.to(accelerator.device)
    _name_once(model, own)
    plugin.ignored_modules = [*_modules(model, plugin.ignored_modules), *own]
    shared = [parameter for parameter in quantizer_parameters(model) if parameter.requires_grad]
    backward = accelerator.backward

    def reducing(*args: Any, **kwargs: Any) -> None:
        backward(*args, **kwargs)
        if accelerator.sync_gradients:
            ranks.share_gradients_(shared)

    if shared:
        accelerator.backward = reducing
    prepare = accelerator.prepare

    def preparing(*args: Any, **kwargs: Any) -> Any:
        with _one_group_for_tied_embeddings(model):
            return prepare(*args, **kwargs)

    accelerator.prepare = preparing


def _refuse(model: nn.Module, plugin: Any, precision: str) -> None:
    if plugin.fsdp_version != 2:
        raise ConfigError(
            "FSDP1 (fsdp_version=1) flattens parameters, so that rows and channels can't be told apart any more: choose fsdp_version=2"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "cpu_ram_efficient_loading=True makes accelerate send every tensor of the model as a sharded one, which those of quantizers "
            "and buffers aren't: switch it off"
        )
    if precision == "fp16":
        raise ConfigError(
            "mixed precision fp16 skips steps whose gradients overflow, which one rank may see and another not: use bf16 with sharded "
            "models"
        )
    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    if getattr(policy, "__name__", "") == "size_based_auto_wrap_policy" and any(is_parametrized(module) for module in model.modules()):
        raise ConfigError(
            "SIZE_BASED_WRAP makes accelerate shard the containers in which torch keeps quantized weights, which fully_shard refuses: "
            "choose TRANSFORMER_BASED_WRAP and name the layers' classes (transformer_cls_names_to_wrap)"
        )
    sharded = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if sharded:
        raise ConfigError(f"the model is sharded already (first: '{sharded[0]}'): call prepare_sharding before accelerator.prepare")


def _modules(model: nn.Module, chosen: Iterable[nn.Module] | str | None) -> list[nn.Module]:
    """The modules that a plugin leaves alone as yet: a list, or a pattern of whole paths."""
    if isinstance(chosen, str):
        return [module for path, module in model.named_modules() if re.fullmatch(chosen, path)]
    return list(chosen or ())


def _name_once(model: nn.Module, own: Iterable[nn.Module]) -> None:
    """Keep the other names of modules that have several out of `state_dict()`, and let `load_state_dict` do without."""
    mine, first, other = {id(module) for module in own}, dict[int, str](), dict[str, str]()
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in mine and first.setdefault(id(module), path) != path:
            other[path] = first[id(module)]
    if not other:
        return

    def leave_out(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        for key in [key for key in state for path in other if key.startswith(f"{prefix}{path}.")]:
            del state[key]

    def fill_in(_module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        for path, known in other.items():
            start = f"{prefix}{known}."
            state.update({f"{prefix}{path}.{key[len(start) :]}": value for key, value in list(state.items()) if key.startswith(start)})

    model.register_state_dict_post_hook(leave_out)
    model.register_load_state_dict_pre_hook(fill_in)


@contextmanager
def _one_group_for_tied_embeddings(model: nn.Module) -> Iterator[None]:
    """Let accelerate shard quantized embeddings that are tied together with what is left, in the root's group.

    It compares `weight` of input and output embeddings, which is another tensor each time it is computed from a quantized one, and would
    put the tied parameter into two groups, which `fully_shard` refuses.
    """
    hidden = []
    if callable(getattr(model, "get_input_embeddings", None)) and callable(getattr(model, "get_output_embeddings", None)):
        ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
        if all(isinstance(end, nn.Module) and is_parametrized(end, "weight") for end in ends):
            stored = [find_tensor(end, "weight") for end in ends]
            hidden = ["get_input_embeddings", "get_output_embeddings"] if stored[0] is stored[1] else []
    for name in hidden:
        model.__dict__[name] = lambda: None
    try:
        yield
    finally:
        for name in hidden:
            del model.__dict__[name]


@dataclass(frozen=True)
class Skeleton:
    """A model's modules with tensors on the meta device, taken before its parameters were spread over ranks.

    tensors: name -> (what stands for it, the device it was on); names of tied tensors stand for the same.
    """

    model: nn.Module
    tensors: dict[str, tuple[Tensor, torch.device]]

    @classmethod
    def of(cls, model: nn.Module) -> Skeleton:
        """Of a whole model, which isn't changed and whose weights aren't copied."""
        named = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
        empty = {id(tensor): _like(tensor, torch.empty_like(tensor, device="meta")) for tensor in named.values()}
        bare = copy.deepcopy(model, dict(empty))
        return cls(bare, {name: (empty[id(tensor)], tensor.device) for name, tensor in named.items()})

    def filled(self, live: nn.Module) -> nn.Module:
        """A whole model with the weights of `live`, on every rank (a collective operation); one tensor at a time is whole on its device."""
        reshard(live)
        found: dict[int, Any] = {}
        for name, (empty, device) in self.tensors.items():
            if id(empty) not in found:
                tensor = find_tensor(live, name)
                complete = whole(tensor).detach().to(device, copy=True)
                found[id(empty)] = _like(tensor, complete)
        filled = copy.deepcopy(self.model, found)
        theirs = {without_wrappers(path): module for path, module in live.named_modules()}
        for path, module in filled.named_modules():
            _take_over(module, theirs[path])
        return filled


def _take_over(mine: nn.Module, theirs: nn.Module) -> None:
    """What a module has besides parameters, as training left it."""
    mine.training = theirs.training
    for name, buffer in theirs._buffers.items():
        if mine._buffers.get(name) is None and buffer is not None:
            mine._buffers[name] = buffer.detach().clone()
    if type(mine).get_extra_state is not nn.Module.get_extra_state:
        mine.set_extra_state(theirs.get_extra_state())
    if isinstance(mine, Quantizer) and isinstance(theirs, Quantizer):
        mine.bits, mine.enabled = theirs.bits, theirs.enabled


def _like(tensor: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def gathered(skeleton: Skeleton, model: nn.Module, graph: DependencyGraph) -> tuple[nn.Module, DependencyGraph]:
    """The whole model and its graph, which says the same of it."""
    filled = skeleton.filled(model)
    return filled, replace(graph, model=filled, analyses={})
