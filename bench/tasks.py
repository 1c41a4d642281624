"""The two jobs that methods are compared on, both with data that ships inside libraries: digits, and characters of Python's own text."""

from __future__ import annotations

import argparse
import functools
import math
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geta
from bench.digits import accuracy, load_digits

from .facts import RESULTS, results_folder
from .joint_stage import vgg7

_LINES = 60_000
_CONTEXT = 96
_TEXT_BATCH = 16
_DIGITS_BATCH = 64
_HELD_OUT = 64


@dataclass(frozen=True)
class Task:
    """A network and how to train it.

    build:    a new network. example: inputs for `geta.analyze`. batches(seed): endless (inputs, targets).
    loss:     (network, inputs, targets) -> loss. score: a network's quality on held-out data.
    unit:     what the score is; higher: whether more of it is better.
    optimizer: (parameter groups, factor of the learning rate) -> the base optimizer.
    """

    name: str
    build: Callable[[], nn.Module]
    example: tuple[Tensor, ...]
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    score: Callable[[nn.Module], float]
    unit: str
    higher: bool
    optimizer: Callable[[Any], torch.optim.Optimizer]
    normalized: bool = False
    """Whether running statistics have to be made before activations are calibrated."""
    scale_free: bool = False
    """Whether the optimizer's steps don't depend on how large gradients are, as Adam's."""

    def calibration(self, seed: int, count: int = 4) -> list[Tensor]:
        source = self.batches(seed)
        return [next(source)[0] for _ in range(count)]


def digits(build: Callable[[], nn.Module]) -> Task:
    """Recognising the 8x8 digits of scikit-learn; accuracy on 360 held-out ones."""
    data = load_digits()
    return Task(
        "digits",
        build,
        (data.train_images[:2],),
        lambda seed: data.batches(_DIGITS_BATCH, seed),
        lambda model, x, y: F.cross_entropy(model(x), y),
        lambda model: accuracy(model, data),
        "accuracy, %",
        True,
        lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9, weight_decay=5e-4, nesterov=True),
        normalized=True,
    )


def text() -> Task:
    """Guessing the next character of Python's standard library with a small Llama; bits per character on held-out files."""
    train, test = _characters()
    held_out = torch.stack([test[i : i + _CONTEXT + 1] for i in torch.linspace(0, len(test) - _CONTEXT - 1, _HELD_OUT).long().tolist()])

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(train) - _CONTEXT, (_TEXT_BATCH,), generator=generator)
            rows = train[starts[:, None] + torch.arange(_CONTEXT + 1)]
            yield rows[:, :-1], rows[:, 1:]

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def score(model: nn.Module) -> float:
        was = model.training
        model.eval()
        with torch.no_grad():
            found = float(loss(model, held_out[:, :-1], held_out[:, 1:])) / math.log(2.0)
        model.train(was)
        return found

    example = (held_out[:2, :-1].clone(),)
    return Task(
        "text",
        Llama,
        example,
        batches,
        loss,
        score,
        "bits per character",
        False,
        lambda groups: torch.optim.AdamW(groups, lr=3e-3),
        scale_free=True,
    )


class Llama(nn.Module):
    """A Llama of four layers and 96 channels over 128 characters, with two key-value heads for six query heads; gives logits."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=_CONTEXT,
            use_cache=False,
        )
        self.lm = LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm(input_ids=ids, use_cache=False).logits
        return logits


@functools.cache
def _characters() -> tuple[Tensor, Tensor]:
    """Character codes of the standard library's modules, in order of their names; every tenth file is held out."""
    texts: dict[bool, list[str]] = {False: [], True: []}
    for place, path in enumerate(sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))):
        texts[place % 10 == 9].append(path.read_text(encoding="utf-8", errors="replace"))
    codes = [torch.tensor([ord(c) if ord(c) < 128 else 0 for c in "".join(texts[held][:_LINES])]) for held in (False, True)]
    return codes[0], codes[1]


def task_named(name: str) -> Task:
    """ "digits", with the VGG7, or "text"."""
    return digits(vgg7) if name == "digits" else text()


def task_options(description: str | None, names: list[str]) -> argparse.ArgumentParser:
    """A parser of what every comparison on these tasks can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="steps of each run; 0 = the task's own number")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=results_folder, default=RESULTS)
    return parser


def train(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, seed: int, after: Callable[[], None] | None = None
) -> None:
    """Train with a cosine learning rate that starts at the optimizer's own."""
    model.train()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    source = task.batches(seed)
    for _ in range(steps):
        x, y = next(source)
        optimizer.zero_grad()
        task.loss(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if after is not None:
            after()


def quantized(task: Task, model: nn.Module, seed: int, **options: Any) -> None:
    """Attach quantizers; activation ranges from real batches and, where there are any, from running statistics that have seen some."""
    if options.get("activations") is None:
        geta.quantize(model, exclude=(), **options)
        return
    batches = task.calibration(seed)
    if task.normalized:
        torch.optim.swa_utils.update_bn(batches, model)
    geta.quantize(model, calibration=batches, exclude=(), **options)
