"""Networks of the zoo that no library provides: detectors, super-resolution, recurrent nets, generators, graph and point networks.

`ZOO_NETS[name]() -> (model, args, kwargs)`, like `nets.NETS` but not yet in evaluation mode; weights are as their modules draw them.
Legend of shapes: `B` batch, `C` channels, `H`, `W` height and width, `T` time, `S` sequence, `N` points or nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo_vision_nets import VISION_NETS

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
BATCH = 2


def _ids(length: int = 10, vocabulary: int = 50) -> Tensor:
    return torch.randint(0, vocabulary, (BATCH, length))


class RecurrentClassifier(nn.Module):
    """Embedding, LSTM or GRU, mean over time, linear."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], layers: int = 1, *, bidirectional: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.rnn = kind(16, 24, layers, batch_first=True, bidirectional=bidirectional, dropout=0.1 if layers > 1 else 0.0)
        self.fc1 = nn.Linear(24 * (2 if bidirectional else 1), 32)
        self.fc2 = nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.rnn(self.embed(ids))[0]
        return self.fc2(F.relu(self.fc1(hidden.mean(1))))


class CharLSTM(nn.Module):
    """Next-character model that takes and returns its state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 32, 2)
        self.head = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 50))

    def forward(self, ids: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, state = self.lstm(self.embed(ids.t()), state)
        return self.head(hidden), state


class AttentionNet(nn.Module):
    """`nn.MultiheadAttention` with a padding mask and a second, cross-attending one of other key and value sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.own = nn.MultiheadAttention(32, 4, batch_first=True, dropout=0.1)
        self.cross = nn.MultiheadAttention(32, 4, kdim=12, vdim=20, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5))

    def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(x)
        hidden = hidden + self.own(hidden, hidden, hidden, key_padding_mask=padding, need_weights=False)[0]
        found, weights = self.cross(self.norm(hidden), x, memory)
        return self.head(hidden + found), weights


class Translator(nn.Module):
    """`nn.Transformer` with embeddings, a causal target mask and tied output weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.place = nn.Parameter(torch.randn(16, 32) * 0.2)
        self.core = nn.Transformer(32, 4, 2, 2, 64, dropout=0.1, batch_first=True, activation="gelu")
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        places = [self.embed(ids) + self.place[: ids.shape[1]] for ids in (source, target)]
        return self.head(self.core(*places, tgt_mask=mask))


class TwoTowers(nn.Module):
    """Two towers into one space; returns a dict, as retrieval models do."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 24))
        self.item = nn.Sequential(nn.Linear(12, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 24))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, user: Tensor, item: Tensor) -> dict[str, Tensor]:
        a, b = F.normalize(self.user(user), dim=-1), F.normalize(self.item(item), dim=-1)
        return {"user": a, "item": b, "score": self.scale * a @ b.t()}


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residual and skip paths (van den Oord et al. 2016)."""

    def __init__(self, width: int = 16, skip: int = 24, layers: int = 5) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, width, 1)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**n) for n in range(layers))
        self.residuals = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.skips = nn.ModuleList(nn.Conv1d(width, skip, 1) for _ in range(layers))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, 32, 1), nn.ReLU(), nn.Conv1d(32, 20, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        total: Tensor | None = None
        for gate, residual, skip in zip(self.gates, self.residuals, self.skips, strict=True):
            signal, open_ = gate(F.pad(x, (gate.dilation[0], 0))).chunk(2, 1)
            inner = torch.tanh(signal) * torch.sigmoid(open_)
            total = skip(inner) if total is None else total + skip(inner)
            x = x + residual(inner)
        return self.end(total)


class MixerBlock(nn.Module):
    """MLP-Mixer's block: one MLP over tokens, one over channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


def mlp_mixer() -> Built:
    patches = nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.Flatten(2))
    body = nn.Sequential(MixerBlock(16, 24), MixerBlock(16, 24), nn.LayerNorm(24))

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.body, self.head = patches, body, nn.Linear(24, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.patches(x).transpose(1, 2)).mean(1))

    return Mixer(), (torch.randn(BATCH, 3, 16, 16),), {}


class PointNet(nn.Module):
    """Shared MLP over points with a learned 3x3 transform, maximum over points, global feature back to every point."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1))
        self.turn = nn.Linear(32, 9)
        self.local = nn.Sequential(nn.Conv1d(3, 24, 1), nn.BatchNorm1d(24), nn.ReLU())
        self.global_ = nn.Sequential(nn.Conv1d(24, 48, 1), nn.BatchNorm1d(48), nn.ReLU(), nn.Conv1d(48, 64, 1))
        self.head = nn.Sequential(nn.Conv1d(88, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 5, 1))

    def forward(self, points: Tensor) -> Tensor:
        matrix = self.turn(self.spatial(points).amax(-1)).view(-1, 3, 3) + torch.eye(3)
        local = self.local(torch.bmm(matrix, points))
        pooled = self.global_(local).max(-1, keepdim=True).values
        return self.head(torch.cat([local, pooled.expand(-1, -1, points.shape[-1])], 1))


class ConvLSTM(nn.Module):
    """A convolutional LSTM cell unrolled over the frames, then a per-pixel head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.width = width
        self.gates = nn.Conv2d(3 + width, 4 * width, 3, padding=1)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, frames: Tensor) -> Tensor:
        hidden = frames.new_zeros(frames.shape[0], self.width, *frames.shape[-2:])
        cell = torch.zeros_like(hidden)
        for frame in frames.unbind(1):
            i, f, o, g = self.gates(torch.cat([frame, hidden], 1)).chunk(4, 1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
            hidden = torch.sigmoid(o) * torch.tanh(cell)
        return self.head(hidden)


class NeRF(nn.Module):
    """Positional encoding, an MLP with a skip concatenation, density and view-dependent colour heads."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(27, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.second = nn.ModuleList([nn.Linear(width + 27, width), nn.Linear(width, width)])
        self.density, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        self.colour = nn.Sequential(nn.Linear(width + 27, 24), nn.ReLU(), nn.Linear(24, 3), nn.Sigmoid())

    @staticmethod
    def encode(x: Tensor) -> Tensor:
        scaled = x[..., None] * 2.0 ** torch.arange(4)
        return torch.cat([x, scaled.sin().flatten(-2), scaled.cos().flatten(-2)], -1)

    def forward(self, place: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        start, view = self.encode(place), self.encode(direction)
        x = start
        for layer in self.first:
            x = F.relu(layer(x))
        x = torch.cat([start, x], -1)
        for layer in self.second:
            x = F.relu(layer(x))
        return self.colour(torch.cat([self.feature(x), view], -1)), F.softplus(self.density(x))


class GraphNet(nn.Module):
    """Two graph convolutions and one attention layer over a dense adjacency matrix, then a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.in_ = nn.Linear(8, 24)
        self.self1, self.near1 = nn.Linear(24, 32), nn.Linear(24, 32, bias=False)
        self.self2, self.near2 = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.query, self.key = nn.Linear(32, 16), nn.Linear(32, 16)
        self.out = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        near = adjacency / adjacency.sum(-1, keepdim=True).clamp(min=1)
        x = F.relu(self.in_(nodes))
        x = F.relu(self.self1(x) + near @ self.near1(x))
        x = F.relu(self.self2(x) + near @ self.near2(x))
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / math.sqrt(16)
        x = x + scores.masked_fill(adjacency == 0, -1e4).softmax(-1) @ x
        return self.out(x.sum(1))


class DLRM(nn.Module):
    """Embedding bags and dense features, pairwise dot products, top MLP (Naumov et al. 2019)."""

    def __init__(self, tables: int = 3, width: int = 16) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(30, width, mode="sum") for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        pairs = torch.tril_indices(tables + 1, tables + 1, -1)
        self.register_buffer("row", pairs[0])
        self.register_buffer("column", pairs[1])
        self.top = nn.Sequential(nn.Linear(width + pairs.shape[1], 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        features = torch.stack([x, *(bag(sparse[:, n]) for n, bag in enumerate(self.bags))], 1)
        dots = torch.bmm(features, features.transpose(1, 2))[:, self.row, self.column]
        return torch.sigmoid(self.top(torch.cat([x, dots], 1)))


class ResidualMLP(nn.Module):
    """A tabular network: categorical embeddings, residual MLP blocks with BatchNorm, frozen input scaling, an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6) + 0.5, requires_grad=False)
        self.unused = nn.Linear(3, 3)
        self.category = nn.Embedding(12, 10)
        self.start = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 32)) for _ in range(2)
        )
        self.end = nn.Linear(32, 1)

    def forward(self, numbers: Tensor, category: Tensor) -> Tensor:
        x = self.start(torch.cat([numbers * self.scale, self.category(category)], -1))
        for block in self.blocks:
            x = x + block(x)
        return self.end(F.relu(x))


class Siamese(nn.Module):
    """One encoder used twice; the distance of the two codes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 12, 3, 2, 1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24 * 16, 20),
        )
        self.head = nn.Linear(20, 1)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        difference = (self.encoder(left) - self.encoder(right)).abs()
        return torch.sigmoid(self.head(difference)), difference.square().sum(-1)


def _attention_inputs() -> tuple[Tensor, Tensor, Tensor]:
    padding = torch.zeros(BATCH, 7, dtype=torch.bool)
    padding[1, 5:] = True
    return torch.randn(BATCH, 7, 12), torch.randn(BATCH, 7, 20), padding


def _adjacency(nodes: int = 9) -> Tensor:
    upper = torch.triu((torch.rand(BATCH, nodes, nodes) > 0.6).float(), 1)
    return upper + upper.transpose(1, 2) + torch.eye(nodes)


ZOO_NETS: dict[str, Callable[[], Built]] = {
    **VISION_NETS,
    "lstm": lambda: (RecurrentClassifier(nn.LSTM), (_ids(),), {}),
    "gru": lambda: (RecurrentClassifier(nn.GRU), (_ids(),), {}),
    "lstm_bidirectional": lambda: (RecurrentClassifier(nn.LSTM, bidirectional=True), (_ids(),), {}),
    "gru_two_layers": lambda: (RecurrentClassifier(nn.GRU, 2), (_ids(),), {}),
    "lstm_two_layers_bidirectional": lambda: (RecurrentClassifier(nn.LSTM, 2, bidirectional=True), (_ids(),), {}),
    "char_lstm": lambda: (CharLSTM(), (_ids(), (torch.randn(2, BATCH, 32), torch.randn(2, BATCH, 32))), {}),
    "multihead_attention": lambda: (AttentionNet(), _attention_inputs(), {}),
    "transformer": lambda: (Translator(), (_ids(9), _ids(7)), {}),
    "two_towers": lambda: (TwoTowers(), (), {"user": torch.randn(6, 20), "item": torch.randn(6, 12)}),
    "wavenet": lambda: (WaveNet(), (torch.randn(BATCH, 1, 64),), {}),
    "mlp_mixer": mlp_mixer,
    "pointnet": lambda: (PointNet(), (torch.randn(BATCH, 3, 40),), {}),
    "conv_lstm": lambda: (ConvLSTM(), (torch.randn(BATCH, 4, 3, 12, 12),), {}),
    "nerf": lambda: (NeRF(), (torch.randn(20, 3), torch.randn(20, 3)), {}),
    "graph_net": lambda: (GraphNet(), (torch.randn(BATCH, 9, 8), _adjacency()), {}),
    "dlrm": lambda: (DLRM(), (torch.randn(5, 10), torch.randint(0, 30, (5, 3, 4))), {}),
    "residual_mlp": lambda: (ResidualMLP(), (torch.randn(6, 6), torch.randint(0, 12, (6,))), {}),
    "siamese": lambda: (Siamese(), (torch.randn(BATCH, 1, 16, 16), torch.randn(BATCH, 1, 16, 16)), {}),
}
