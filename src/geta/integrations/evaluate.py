"""How good a language model still is: exact perplexity over local tokens, and a door to lm-eval's tasks.

Legend: `N` tokens, `W` tokens of a window, `B` windows at once, `V` vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils import parametrize

from geta.errors import BadModelError, ConfigError, GetaError
from geta.graph.capture import mode_of
from geta.graph.names import unwrap
from geta.integrations.forward import logits_of
from geta.quant.fixed import FixedQuantizer
from geta.quant.quantizer import Quantizer
from geta.subnet import CompactModel

Model = nn.Module | Callable[[Tensor], Any]


def perplexity(model: Model, tokens: Sequence[int] | Tensor, *, window: int, stride: int, batch_size: int = 1) -> float:
    """Perplexity of a causal language model over one sequence, every token weighted equally.

        PPL = exp( - 1/|S| * sum over i in S of log p(x_i | x_b(i) ... x_(i-1)) )

    Windows of W = min(window, N) tokens begin at 0, stride, 2 stride ... and, the last one, at N - W; b(i) is the beginning of the first
    window that reaches token i, and S holds every token that has something before it there: all but x_0 as long as stride < window, all but
    the first of each window for stride = window. The smaller the stride, the more a token sees of what is before it: at least
    window - stride tokens, once there are that many. Logarithms and sums are in float64.

    model:      a causal language model that returns logits [B, W, V] or an object with `logits`: a Hugging Face model, a module that takes
                the tokens alone, a `CompactModel`, or a function from tokens [B, W] to logits. Modules run in evaluation mode.
    tokens:     N >= 2 whole numbers, as one sequence or tensor [N].
    batch_size: windows per call; it changes nothing but the time and memory.

    Raises ConfigError for settings out of range and models that can't be called with tokens alone; GetaError when logits aren't finite.
    Source: the usual strided evaluation; a last window is moved back rather than cut short, so that all windows have one length.
    """
    tokens_N = _checked(tokens, window, stride, batch_size)
    length = min(window, len(tokens_N))
    begins = [*range(0, len(tokens_N) - length, stride), len(tokens_N) - length]
    total, count = torch.zeros((), dtype=torch.float64), 0
    for logits_BWV, ids_BW, first_B in _windows(model, tokens_N, begins, length, batch_size):
        log_p_BW = torch.log_softmax(logits_BWV[:, :-1].double(), dim=-1).gather(2, ids_BW[:, 1:, None]).squeeze(2)
        scored_BW = torch.arange(1, length, device=ids_BW.device) >= first_B[:, None]
        total += log_p_BW[scored_BW].sum().cpu()
        count += int(scored_BW.sum())
    result = float(torch.exp(-total / count))
    if math.isnan(result):
        raise GetaError("the model's logits aren't finite on these tokens, so there is no perplexity: was training stable?")
    return result


def lm_eval_model(model: nn.Module, tokenizer: Any, **options: Any) -> Any:
    """A copy of an eager compact model as lm-eval takes it.

        lm_eval.simple_evaluate(model=lm_eval_model(small, tokenizer), tasks=["hellaswag"])

    model:     a transformers model, such as `compressor.finish("eager")`. Weights become the values that their quantizers compute;
               activations stay quantized.
    tokenizer: its tokenizer. options: settings of lm-eval's `HFLM`, e.g. `batch_size=8, max_length=512`.

    Raises ConfigError when lm-eval isn't installed, BadModelError for other models.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(f"this needs lm-eval, which can't be imported here ({error}): pip install 'geta[lm-eval]'") from error
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise BadModelError(
            f"lm-eval calls the methods of a transformers model and this is a {type(model).__name__}: take the eager product, "
            "finish('eager') or geta.compact(..., product='eager')"
        )
    return HFLM(pretrained=_with_plain_weights(copy.deepcopy(model)), tokenizer=tokenizer, **options)


def _checked(tokens: Sequence[int] | Tensor, window: int, stride: int, batch_size: int) -> Tensor:
    found = torch.as_tensor(tokens)
    if found.dim() != 1 or len(found) < 2 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ConfigError(f"tokens are {found.dtype} of shape {tuple(found.shape)}: give one sequence of at least two whole numbers")
    if bool((found < 0).any()):
        raise ConfigError(f"tokens hold the negative number {int(found.min())}: give ids of the vocabulary, without padding or masks")
    if window < 2:
        raise ConfigError(f"window is {window} tokens: at least 2 are needed, one to see and one to predict")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride is {stride}: it must be from 1 to window = {window}, or tokens between two windows would be left out")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: at least one window is needed per call")
    return found.long()


def _windows(
    model: Model, tokens_N: Tensor, begins: Sequence[int], length: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits [B, W, V], tokens [B, W], and the first place of each window that no earlier window reached [B]."""
    call, device = _caller(model), _device(model)
    ends = [0, *(begin + length for begin in begins[:-1])]
    for start in range(0, len(begins), batch_size):
        chosen = begins[start : start + batch_size]
        ids_BW = torch.stack([tokens_N[begin : begin + length] for begin in chosen]).to(device)
        with torch.no_grad():
            logits = logits_of(call(ids_BW), "perplexity needs a causal language model")
        if logits.dim() != 3 or logits.shape[:2] != ids_BW.shape:
            raise ConfigError(
                f"the model returned scores of shape {tuple(logits.shape)} for tokens {tuple(ids_BW.shape)}: [B, W, V] is needed"
            )
        first_B = torch.tensor([ends[start + place] - begin for place, begin in enumerate(chosen)], device=ids_BW.device)
        yield logits, ids_BW, first_B


def _device(model: Model) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return tensors[0].device if tensors else torch.device("cpu")


def _caller(model: Model) -> Callable[[Tensor], Any]:
    """How to call the model with tokens alone."""
    if not isinstance(model, nn.Module):
        return model
    own = unwrap(model)
    made: Callable[[Tensor], tuple[tuple[Any, ...], Mapping[str, Any]]]
    if isinstance(own, CompactModel):
        made = _captured_call(own)
    elif "input_ids" in inspect.signature(own.forward).parameters:
        made = _by_name
    else:
        made = _by_position

    def call(ids_BW: Tensor) -> Any:
        args, kwargs = made(ids_BW)
        with mode_of(model, False):
            return model(*args, **kwargs)

    return call


def _by_name(ids_BW: Tensor) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return (), {"input_ids": ids_BW}


def _by_position(ids_BW: Tensor) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    return (ids_BW,), {}


def _captured_call(model: CompactModel) -> Callable[[Tensor], tuple[tuple[Any, ...], Mapping[str, Any]]]:
    """As the compact model was captured: with the tokens alone, or with a mask of ones beside them."""
    args, kwargs = pytree.tree_unflatten([0] * model.input_spec.num_leaves, model.input_spec)
    if len(args) == 1 and not kwargs:
        return _by_position
    if not args and set(kwargs) == {"input_ids"}:
        return _by_name
    if not args and set(kwargs) == {"input_ids", "attention_mask"}:
        return lambda ids_BW: ((), {"input_ids": ids_BW, "attention_mask": torch.ones_like(ids_BW)})
    raise ConfigError(
        f"this compact model was captured with {len(args)} arguments and {sorted(kwargs)}, not with tokens alone: pass a function instead, "
        "lambda ids: small(input_ids=ids, ...)"
    )


def _with_plain_weights(model: nn.Module) -> nn.Module:
    """The copy `model` with ordinary parameters that hold the quantized values; whoever calls `tie_weights` ties them again.

    `parametrize.remove_parametrizations` would take the property off the class, which copies share with the model they were made from.
    """
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        lists: Any = module.parametrizations
        if any(isinstance(step, Quantizer | FixedQuantizer) for steps in lists.values() for step in steps):
            values = {leaf: getattr(module, leaf).detach().clone() for leaf in lists}
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module._modules["parametrizations"]
            for leaf, value in values.items():
                module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return model
