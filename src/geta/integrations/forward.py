"""What training frameworks put around a model's `forward`, and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

from geta.errors import ConfigError
from geta.graph.names import unwrap


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """The model without the autocast that accelerate's `prepare` puts around `forward`, which is put back afterwards.

    accelerate keeps the wrapped function as `forward` and the method as `_original_forward` on the instance.
    """
    own = unwrap(model).__dict__
    names: tuple[str, ...] = ("forward", "_original_forward")
    kept = {name: own[name] for name in names if name in own}
    if len(kept) == 2:
        del own["_original_forward"]
        forward = kept["forward"]
        while forward != kept["_original_forward"] and hasattr(forward, "__wrapped__"):
            forward = forward.__wrapped__
        if forward == kept["_original_forward"] and getattr(forward, "__func__", None) is type(unwrap(model)).forward:
            del own["forward"]
        else:
            own["forward"] = forward if isinstance(forward, MethodType) else MethodType(forward, unwrap(model))
    try:
        yield
    finally:
        own.update(kept)


def logits_of(output: Any, remedy: str) -> Tensor:
    """The scores that a model returned: the output itself, or its `logits`. Raises ConfigError that ends with `remedy` otherwise."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ConfigError(f"the model returned {type(output).__name__}, which is no tensor and has no 'logits': {remedy}")
    return found
