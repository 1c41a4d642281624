"""Models fine-tuned through low-rank adapters (PEFT): merge the adapters, then cut."""

from __future__ import annotations

import copy
from typing import Any, Literal, overload

from torch import nn

from geta.errors import BadModelError, ConfigError
from geta.graph import analyze
from geta.graph.names import unwrap
from geta.integrations.compressor import Compressor
from geta.integrations.forward import own_forward
from geta.quant import fixed_quantizers, quantizers
from geta.subnet import CompactModel, compact
from geta.subnet.compact import Product


@overload
def finish_merged(compressor: Compressor, product: Literal["graph"] = "graph") -> CompactModel: ...


@overload
def finish_merged(compressor: Compressor, product: Literal["eager", "auto"]) -> nn.Module: ...


def finish_merged(compressor: Compressor, product: Product = "graph") -> nn.Module:
    """The compact model of a PEFT model after training, with its adapters merged into the weights: one matrix per layer again.

        W' = W + s B A:   a row of W' is zero where those of W and B are, a column where those of W and A are

    so that what was pruned through base and adapter together is zero in the merged model, and only that is removed. The trained model is
    left as it is; its copy is merged. Give the compressor `protect=["*.lora_A.*:0"]`: the adapters' ranks are gone after merging and
    shouldn't count among the groups. `compressor.finish()` instead keeps the adapters apart, with their ranks.

    product: as in `Compressor.finish`; the eager product of a transformers model is one of its own class, without PEFT.

    Raises BadModelError when the model has no adapters to merge; ConfigError for a quantized model, whose merged weights wouldn't be on the
    grid of its quantizers, and whatever `Compressor.finish` raises.
    """
    model = unwrap(compressor.model)
    if not callable(getattr(model, "merge_and_unload", None)):
        raise BadModelError(f"{type(model).__name__} has no adapters to merge (it isn't a PeftModel): use compressor.finish()")
    if quantizers(model) or fixed_quantizers(model):
        raise ConfigError(
            "the base weights are quantized and the adapters aren't: their sum would leave the grid. Keep them apart with "
            "compressor.finish(), or prune with weight_bits=None, merge, and quantize the merged model"
        )
    compressor.check()
    with own_forward(model):
        merged: Any = copy.deepcopy(model)
    merged = merged.merge_and_unload()
    example = compressor.graph.example
    graph = analyze(merged, example.args, example.kwargs, exact=example.exact, dynamic_shapes=example.dynamic_shapes)
    return compact(merged, graph, product=product)
