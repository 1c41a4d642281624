"""Which examples a step sees, and all that is random about it: functions of (seed, epoch, step) alone, so that a run resumes exactly."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from geta.errors import ConfigError
from geta.recipes.batches import Batch, Split
from geta.recipes.train_settings import TrainSettings

_ORDER, _AUGMENT, _STEP = range(3)


@dataclass
class Batches:
    """The training batches of a run by number: optimizer step s has the numbers s * accumulate ... (s + 1) * accumulate - 1.

    Each epoch shuffles the examples anew and drops the last incomplete step. rank, ranks: this process and how many there are; each takes
    every `ranks`-th example of a batch.

    Raises ConfigError when one step needs more examples than there are, or a batch can't be dealt out evenly.
    """

    split: Split
    settings: TrainSettings
    rank: int = 0
    ranks: int = 1
    _epoch: int = field(default=-1, init=False)
    _shuffled: list[int] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        train, needed = self.settings, self.settings.batch_size * self.settings.accumulate
        if needed > len(self.split):
            raise ConfigError(
                f"train.batch_size = {train.batch_size} (times accumulate = {train.accumulate}) is more than the {len(self.split)} "
                f"training examples: write at most {len(self.split) // train.accumulate}"
            )
        if train.batch_size % self.ranks:
            raise ConfigError(
                f"train.batch_size = {train.batch_size} can't be dealt out to {self.ranks} processes: write a multiple of {self.ranks}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the training examples."""
        return len(self.split) // (self.settings.batch_size * self.settings.accumulate)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.settings.steps or (self.settings.epochs or 0) * self.steps_per_epoch

    def __getitem__(self, number: int) -> Batch:
        """The batch with this number, augmented."""
        per_epoch = self.steps_per_epoch * self.settings.accumulate
        epoch, place = divmod(number, per_epoch)
        if epoch != self._epoch:
            self._epoch, self._shuffled = epoch, shuffled(len(self.split), self.settings.seed, epoch)
        size = self.settings.batch_size
        batch = self.split.batch(self._shuffled[place * size : (place + 1) * size][self.rank :: self.ranks])
        if self.settings.augment:
            generator = torch.Generator().manual_seed(seed_of(self.settings.seed, _AUGMENT, epoch, place, self.rank))
            for augmentation in self.settings.augment:
                batch = augmentation.apply(batch, generator)
        return batch

    def between(self, start: int, stop: int) -> Generator[Batch]:
        """The batches from `start` to before `stop`, fetched by `train.workers` processes or by this one; the same either way."""
        numbers = range(start, stop)
        if not self.settings.workers:
            yield from (self[number] for number in numbers)
            return
        loader: Any = torch.utils.data.DataLoader(
            self,  # type: ignore[arg-type]  # it has what a map-style data set needs
            batch_size=None,
            sampler=numbers,
            num_workers=self.settings.workers,
            worker_init_fn=_leave_signals_to_the_parent,
        )
        yield from loader

    def step_seed(self, step: int) -> int:
        """What all other randomness of a step (dropout ...) is seeded with; every process has its own."""
        return seed_of(self.settings.seed, _STEP, step, self.rank)


def _leave_signals_to_the_parent(_: int) -> None:
    """Ctrl-C goes to every process of a terminal; the step at hand needs its batches all the same."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def shuffled(count: int, seed: int, epoch: int) -> list[int]:
    """The numbers from 0 to count - 1 in the order of one epoch."""
    generator = torch.Generator().manual_seed(seed_of(seed, _ORDER, epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def seed_of(*numbers: int) -> int:
    """One seed in [0, 2**32) from several numbers, mixed so that neighbours have nothing in common (numpy's SeedSequence)."""
    return int(np.random.SeedSequence(list(numbers)).generate_state(1)[0])


def rows_in(count: int, size: int) -> Iterator[Sequence[int]]:
    """0 ... count - 1 in runs of `size`, the last one shorter where it has to be."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
