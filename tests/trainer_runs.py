"""Runs of the Trainer that tests compare; importable by spawned processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import geta
from geta.integrations.trainer import GetaCallback

TOKENS = torch.randint(0, 32, (32, 8), generator=torch.Generator().manual_seed(1))
LANGUAGE = [{"input_ids": row, "labels": row} for row in TOKENS]
X = torch.randn(48, 12, generator=torch.Generator().manual_seed(2))
ROWS = [{"x": row, "labels": row[:3].argmax()} for row in X]
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "logging_steps": 2,
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "weight_decay": 0.0,
    "save_strategy": "no",
}


class Mlp(nn.Module):
    """A module that is none of transformers'; its loss isn't told how many items a batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.last(F.relu(self.second(F.relu(self.first(x)))))
        return {"logits": scores} if labels is None else {"loss": F.cross_entropy(scores, labels), "logits": scores}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mlp":
        return Mlp()
    if kind == "gpt2":  # its embedding is its last layer
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 8}
    config = LlamaConfig(vocab_size=32, num_attention_heads=4, num_key_value_heads=2, attention_dropout=0.1, **sizes)
    return LlamaForCausalLM(config)


def made(kind: str, out: Path, **settings: Any) -> tuple[Trainer, GetaCallback]:
    """A Trainer and the callback that is attached to it."""
    model = model_of(kind)
    trainer = Trainer(model, TrainingArguments(str(out), **{**SETTINGS, **settings}), train_dataset=ROWS if kind == "mlp" else LANGUAGE)
    if kind == "mlp":
        compressor = geta.Compressor(model, kwargs={"x": X[:2]}, sparsity=0.5, weight_bits=(4, 8))
    else:
        ids = [{"input_ids": TOKENS[:8]}]
        bits: dict[str, Any] = {"weight_bits": (4, 8), "activation_bits": 8, "calibration": ids}
        compressor = geta.Compressor(model, kwargs={"input_ids": TOKENS[:2]}, sparsity=0.5, **bits)
    return trainer, GetaCallback(compressor).attach(trainer)


def on_a_rank(rank: int, folder: str) -> dict[str, Tensor]:
    """Train on two ranks that each see half of every batch."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}  # the two have met before this is called
    os.environ.update({name: str(value) for name, value in names.items()})
    trainer, callback = made("mlp", Path(folder), per_device_train_batch_size=2, num_train_epochs=2, ddp_backend="gloo", seed=3)
    trainer.train()
    small = callback.finish()
    history = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    facts = {
        "steps": torch.tensor(trainer.state.max_steps),
        "losses": torch.tensor(history),
        "ranks": torch.tensor(trainer.args.world_size),
    }
    return {**facts, **{name: tensor.clone() for name, tensor in small.tensors().items()}}
