"""Small models with the shapes that models have in the wild, for tests: wrappers, reparametrized weights, control flow, adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Wrap = Callable[[nn.Module], nn.Module]


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def tokens(limit: int, *shape: int) -> Tensor:
    return torch.randint(0, limit, shape, generator=torch.Generator().manual_seed(3))


def same(module: nn.Module) -> nn.Module:
    return module


class Mlp(nn.Module):
    """Three linear layers; `wrap` changes how the first keeps its weight."""

    def __init__(self, wrap: Wrap = same) -> None:
        super().__init__()
        self.first, self.second, self.head = wrap(nn.Linear(6, 12)), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Convs(nn.Module):
    """Two convolutions, kept as `wrap` says, and a head."""

    def __init__(self, wrap: Wrap = same) -> None:
        super().__init__()
        self.first, self.second, self.head = wrap(nn.Conv2d(3, 8, 3, padding=1)), wrap(nn.Conv2d(8, 12, 3)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class Masked(nn.Module):
    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.mask = nn.Parameter(rows(*shape).abs())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def parametrized() -> nn.Module:
    model = Mlp()
    parametrize.register_parametrization(model.first, "weight", Doubled())
    parametrize.register_parametrization(model.first, "weight", Masked(model.first.weight.shape))
    return model


class Attention(nn.Module):
    """nn.MultiheadAttention around a residual stream."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.inner, self.head = nn.Linear(16, 24), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(torch.relu(self.inner(x + mixed)))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.stem, self.body, self.reentrant = nn.Linear(6, 6), Mlp(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.body, self.stem(x), use_reentrant=self.reentrant)


class Rotary(nn.Module):
    """Rotary embedding in complex numbers (the first Llama's)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("turns", torch.polar(torch.ones(5, 4), rows(5, 4)))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.first(x).view(x.shape[0], 5, 2, 4, 2)
        turned = torch.view_as_real(torch.view_as_complex(heads) * self.turns[None, :, None]).flatten(3)
        return self.head(torch.relu(turned.flatten(2)))


class Fourier(nn.Module):
    """A global filter (GFNet): transform along space, multiply, transform back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.filter, self.head = nn.Conv2d(3, 8, 1), nn.Parameter(rows(8, 8, 5, 2)), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(self.stem(x), dim=(2, 3), norm="ortho") * torch.view_as_complex(self.filter)
        return self.head(torch.fft.irfft2(spectrum, s=(8, 8), dim=(2, 3), norm="ortho"))


class ComplexParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.angle, self.head = nn.Linear(16, 12), nn.Parameter(rows(5, 12)), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        turned = torch.complex(hidden, hidden * 0.5) * torch.polar(torch.ones_like(self.angle), self.angle)
        return self.head(turned.abs() + turned.imag + turned.conj().real)


class Mixing(nn.Module):
    """FNet: a Fourier transform along tokens and features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(torch.fft.fft2(self.first(x)).real)))


class Shared(nn.Module):
    """A layer that is called twice, a buffer, a parameter and a layer that nobody calls, a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.unused, self.lonely = nn.Linear(4, 4), nn.Parameter(torch.ones(3))
        self.register_buffer("scale", rows(8))
        self.again.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        for _ in range(2):
            hidden = torch.relu(self.again(hidden)) * self.scale
        return self.head(hidden)


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        return self.head(hidden + self.down(torch.relu(self.up(hidden))))


class Bag(nn.Module):
    """Keyword arguments only, nested; results with None, numbers and words between the tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()

    def forward(self, *, batch: dict[str, Any], flag: bool = True, name: str = "n", missing: Tensor | None = None) -> dict[str, Any]:
        hidden = self.body(batch["rows"]["x"])
        return {"logits": hidden, "missing": missing, "count": 3, "name": name, "flag": flag, "both": [hidden, 2.5]}


@dataclass
class Answer:
    logits: Tensor
    parts: tuple[Tensor, Tensor | None]


class ReturnsDataclass(nn.Module):
    """Its result is a dataclass that nobody registered with torch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()

    def forward(self, x: Tensor, y: Tensor) -> Answer:
        return Answer(self.body(x), (self.body(y), None))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden += 1
        hidden.relu_()
        hidden.mul_(2)
        return self.head(hidden)


class Autocast(nn.Module):
    """Mixed precision inside forward; one layer is kept out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Mlp(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = torch.softmax(self.body(x), -1)
            with torch.autocast("cpu", enabled=False):
                kept = self.head(hidden.float())
        return kept + hidden


class NoGrad(nn.Module):
    """A branch without gradients, as momentum encoders have it, and a write into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.slow = Mlp(), Mlp()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.slow(x)
            if self.training:
                self.seen.mul_(0.9).add_(target.mean(0))
        return self.body(x) * target + self.seen


class Chooses(nn.Module):
    """torch.cond."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.yes, self.no = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        return torch.cond(hidden.sum() > 0, self.yes, lambda h: self.no(h) * 2, (hidden,))


class Normalized(nn.Module):
    """Cosine similarity: features are divided by their norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(self.first(x), dim=-1), self.head.weight)


class Branches(nn.Module):
    """`if` on a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.yes, self.no = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        if hidden.sum() > 0:
            return self.yes(hidden)
        return self.no(hidden)


class Loops(nn.Module):
    """A number of rounds that a tensor gives, and a value that goes through NumPy; dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, rounds: Tensor, scale: float = 1.0) -> dict[str, Any]:
        hidden = F.dropout(self.norm(self.first(x)), 0.0, self.training)
        for _ in range(rounds.item()):
            hidden = hidden + torch.relu(hidden)
        with torch.no_grad():
            shift = float(x.detach().numpy().mean())
        return {"out": self.head(hidden) * scale + shift, "none": None}


class Selects(nn.Module):
    """Boolean masks, nonzero, sizes from a list: shapes depend on values, the control flow does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.first(x))
        chosen = torch.relu(self.second(hidden[x[:, 0] > 0]))
        where = (x[:, 1] > -9).nonzero().squeeze(1)
        means = [hidden[:length].mean(0) for length in lengths.tolist()]
        return self.head(chosen).sum(0), self.head(torch.stack(means)) + self.head(hidden[where]).sum(0)


IMAGE = rows(2, 3, 8, 8)
ROW = rows(4, 6)
SEQUENCE = rows(2, 5, 16)
MODELS: dict[str, Callable[[], Built]] = {
    "weight_norm": lambda: (Mlp(parametrizations.weight_norm), (ROW,), {}),
    "weight_norm_conv": lambda: (Convs(parametrizations.weight_norm), (IMAGE,), {}),
    "weight_norm_whole": lambda: (Mlp(lambda m: parametrizations.weight_norm(m, dim=None)), (ROW,), {}),
    "weight_norm_columns": lambda: (Convs(lambda m: parametrizations.weight_norm(m, dim=1)), (IMAGE,), {}),
    "weight_norm_hook": lambda: (Convs(nn.utils.weight_norm), (IMAGE,), {}),
    "spectral_norm": lambda: (Convs(parametrizations.spectral_norm), (IMAGE,), {}),
    "spectral_norm_hook": lambda: (Convs(nn.utils.spectral_norm), (IMAGE,), {}),
    "orthogonal": lambda: (Mlp(parametrizations.orthogonal), (ROW,), {}),
    "parametrized": lambda: (parametrized(), (ROW,), {}),
    "attention": lambda: (Attention(), (SEQUENCE,), {}),
    "attention_bias_kv": lambda: (Attention(add_bias_kv=True), (SEQUENCE,), {}),
    "checkpoint": lambda: (Checkpointed(reentrant=False), (ROW,), {}),
    "checkpoint_reentrant": lambda: (Checkpointed(reentrant=True), (ROW.clone().requires_grad_(),), {}),
    "rotary_complex": lambda: (Rotary(), (SEQUENCE,), {}),
    "fourier_filter": lambda: (Fourier(), (IMAGE,), {}),
    "fourier_mixing": lambda: (Mixing(), (SEQUENCE,), {}),
    "complex_parts": lambda: (ComplexParts(), (SEQUENCE,), {}),
    "shared": lambda: (Shared(), (ROW,), {}),
    "tied": lambda: (Tied(), (tokens(20, 2, 5),), {}),
    "keywords": lambda: (Bag(), (), {"batch": {"rows": {"x": ROW}}, "flag": False}),
    "dataclass": lambda: (ReturnsDataclass(), (ROW, ROW + 1), {}),
    "in_place": lambda: (InPlace(), (ROW,), {}),
    "autocast": lambda: (Autocast(), (ROW,), {}),
    "no_grad": lambda: (NoGrad(), (ROW,), {}),
    "cond": lambda: (Chooses(), (ROW,), {}),
    "normalized": lambda: (Normalized(), (ROW,), {}),
    "branches": lambda: (Branches(), (ROW,), {}),
    "loops": lambda: (Loops(), (ROW, torch.tensor(3)), {"scale": 2.0}),
    "selects": lambda: (Selects(), (ROW, torch.tensor([1, 2, 4])), {}),
}


def build(name: str) -> Built:
    """A model of `MODELS` in evaluation mode, with biases and norms that make zeros easy to tell from nothing."""
    torch.manual_seed(0)
    model, args, kwargs = MODELS[name]()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.add_(torch.rand_like(tensor) * 0.3)
    return model.eval(), args, kwargs
