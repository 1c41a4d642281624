"""The demo's work: the same network trained twice on real digits, once plainly and once while it compresses itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn

import geta
from geta.cli.demo_data import Digits
from geta.recipes.nets.resnet import ResNet, resnet20
from geta.cli.demo_settings import DemoSettings
from geta.errors import GetaError
from geta.optim import QASSO
from geta.report.curves import Epoch
from geta.report.progress import RunLog, Track
from geta.subnet import CompactModel

_CALIBRATION_BATCHES = 8


@dataclass(frozen=True)
class Trained:
    """What the two runs leave behind.

    zeroed: the network as trained, full size, its removed groups all zero. notes: what was not reached and why, in words.
    """

    dense: ResNet
    zeroed: nn.Module
    compact: CompactModel
    progress: dict[str, object]
    notes: list[str]
    dense_epochs: list[Epoch]
    compact_epochs: list[Epoch]


def train_both(settings: DemoSettings, digits: Digits, log: RunLog) -> Trained:
    """Train the dense network, then the self-compressing one: same start, same batches, same learning rates, same length."""
    steps = settings.epochs * digits.steps_per_epoch(settings.batch_size)

    geta.seed_everything(settings.seed)
    model = resnet20()
    graph = geta.analyze(model, example_input(digits))
    # Calibration sees the network in evaluation mode, and that of a fresh one is nothing like what training will see.
    torch.optim.swa_utils.update_bn(calibration_batches(digits, settings), model)
    geta.quantize(
        model,
        weights=geta.Bits(*settings.bits),
        activations=geta.Bits.of(settings.activation_bits),
        calibration=calibration_batches(digits, settings),
        results_of=graph,
    )
    optimizer = geta.QASSO(
        sgd(model, settings),
        graph,
        sparsity=settings.sparsity,
        weight_bits=settings.bits,
        activation_bits=(settings.activation_bits, settings.activation_bits),
        schedule=geta.Schedule(total_steps=steps),
        saliency=settings.saliency,
        quant_lr=settings.quantizer_learning_rate,
    )

    geta.seed_everything(settings.seed)
    dense = resnet20()
    with log.track("dense  ", steps) as track:
        dense_epochs = train(dense, sgd(dense, settings), digits, settings, track)
    with log.track("compact", steps) as track:
        compact_epochs = train(model, optimizer, digits, settings, track)

    optimizer.check()
    compact = geta.compact(model, graph)
    compact.save(settings.out / "compact")
    notes = [*optimizer.notes, *compact.info.notes]
    return Trained(dense, model, compact, optimizer.progress(), notes, dense_epochs, compact_epochs)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, digits: Digits, settings: DemoSettings, track: Track) -> list[Epoch]:
    """Run the ordinary training loop that both networks share: cosine learning rate, one row of numbers per epoch.

    Raises GetaError at the first step whose loss is not finite.
    """
    per_epoch = digits.steps_per_epoch(settings.batch_size)
    steps = settings.epochs * per_epoch
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    epochs: list[Epoch] = []
    total = 0.0
    for step, (images, labels) in enumerate(islice(digits.batches(settings.batch_size, settings.seed), steps)):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        total += checked_loss(loss, step, optimizer, settings)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % per_epoch == 0:
            epochs.append(epoch_row(step // per_epoch + 1, total / per_epoch, accuracy(model, digits), optimizer))
            track.milestone(describe(epochs[-1], settings.epochs))
            total = 0.0
        track.advance(describe(epochs[-1], settings.epochs) if epochs else {"loss": f"{loss.detach():.3f}"})
    model.eval()
    return epochs


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread for the time of the block, so that equal settings give equal numbers on any number of cores.

    Images this small gain next to nothing from more threads, and lose much when the cores are busy otherwise.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def example_input(digits: Digits) -> tuple[torch.Tensor]:
    """Two images: the smallest batch with which the captured batch size stays free."""
    return (digits.train_images[:2],)


def sgd(model: nn.Module, settings: DemoSettings) -> torch.optim.SGD:
    """Make the base optimizer of both runs."""
    return torch.optim.SGD(
        model.parameters(), lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay, nesterov=True
    )


def calibration_batches(digits: Digits, settings: DemoSettings) -> Iterator[torch.Tensor]:
    """Yield a few batches of real training images, for the ranges of the activations."""
    for images, _ in islice(digits.batches(settings.batch_size, settings.seed), _CALIBRATION_BATCHES):
        yield images


def checked_loss(loss: torch.Tensor, step: int, optimizer: torch.optim.Optimizer, settings: DemoSettings) -> float:
    """Return the loss as a number; raises GetaError with the step, the stage and a remedy when it is NaN or infinite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        stage = f" in stage '{optimizer.stage}'" if isinstance(optimizer, QASSO) else " of the dense network"
        raise GetaError(
            f"the training loss became {value} at step {step}{stage}: training has diverged; the log up to here is in "
            f"'{settings.out / 'log.txt'}'. Lower the learning rate ({settings.learning_rate:g}) or train longer (--epochs)"
        )
    return value


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Percentage of the test images that the model, in evaluation mode meanwhile, gives the right class."""
    was_training = model.training
    model.eval()
    right = int((model(digits.test_images).argmax(dim=1) == digits.test_labels).sum())
    model.train(was_training)
    return 100.0 * right / len(digits.test_labels)


def epoch_row(number: int, loss: float, percent: float, optimizer: torch.optim.Optimizer) -> Epoch:
    """Gather one epoch's numbers, with the state of the constraints when the optimizer has any."""
    if not isinstance(optimizer, QASSO):
        return Epoch(number, loss, percent)
    now = optimizer.progress()
    return Epoch(number, loss, percent, now["stage"], 100.0 * now["group_sparsity"], now["mean_weight_bits"], now["upper_bound"])


def describe(row: Epoch, epochs: int) -> dict[str, str]:
    """Word an epoch's numbers for the progress line."""
    fields = {"epoch": f"{row.epoch}/{epochs}", "loss": f"{row.loss:.4f}", "accuracy": f"{row.accuracy:.2f} %"}
    if row.stage:
        fields |= {"stage": row.stage, "zero groups": f"{row.sparsity:.1f} %"}
    if row.bits is not None:
        fields |= {"bits": f"{row.bits:.2f}", "bound": f"{row.bound:.1f}"}
    return fields
