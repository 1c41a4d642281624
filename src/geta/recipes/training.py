"""The training loop that both networks share: evaluated, checkpointed, stopped and resumed at any step, with the same numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import geta
from geta import ranks
from geta.errors import GetaError
from geta.integrations.distill import Distillation
from geta.optim import HESSOCRIC
from geta.recipes.batches import Batch
from geta.recipes.checkpoints import Checkpoints
from geta.recipes.evaluation import evaluate
from geta.recipes.leg import Leg
from geta.recipes.prepare import Job
from geta.recipes.record import Record
from geta.recipes.stopping import Interrupted, Stop
from geta.report.progress import Track

_GPU_CHECKS_EVERY = 20
"""Steps between two looks at the loss where looking means waiting for the device."""
_LIVE_SECONDS = 2.0
"""Between two looks at groups and bits."""


@dataclass
class Training:
    """Trains a leg from wherever it stands to its end. teacher: what the compact network also learns from."""

    job: Job
    leg: Leg
    record: Record
    checkpoints: Checkpoints
    stop: Stop
    teacher: nn.Module | None = None
    _pending: list[Tensor] = field(default_factory=list, init=False)
    _looked: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        train, device = self.job.recipe.train, self.job.place.device
        self._outer = self.job.place.outer(self.leg.model)
        self._scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "float16")
        self._distil = None
        if train.distill is not None and self.teacher is not None:
            wanted = train.distill
            self._distil = Distillation(self.teacher, weight=wanted.teacher_weight, temperature=wanted.temperature, measure=wanted.measure)
        if self.leg.scaler:
            self._scaler.load_state_dict(self.leg.scaler)

    def run(self) -> None:
        """Do all steps that are left.

        Raises GetaError at the first step whose loss is not finite; Interrupted, with a checkpoint written, when asked to stop.
        """
        job, leg = self.job, self.leg
        recipe, total, accumulate = job.recipe, job.batches.total_steps, job.recipe.train.accumulate
        leg.model.train()
        with (
            self.record.log.track(f"{leg.name:7}", total, leg.step) as track,
            closing(job.batches.between(leg.step * accumulate, total * accumulate)) as stream,
            self.stop.held(),
        ):
            while True:
                asked = self.stop.agreed(job.place.device)
                if not asked and self._due(recipe.train.evaluate_every) and not leg.evaluated:
                    asked = not self._evaluate(track)
                if asked or self._due(recipe.output.checkpoint_every):
                    self._save()
                if asked:
                    raise Interrupted(self.stop.requested or 0)
                if leg.step == total:
                    break
                self._step([next(stream) for _ in range(accumulate)])
                track.advance(self._now())
        leg.model.eval()

    def _step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step over the batches that it accumulates."""
        job, leg, train, start = self.job, self.leg, self.job.recipe.train, time.monotonic()
        optimizer = leg.optimizer
        geta.seed_everything(job.batches.step_seed(leg.step))
        for group, rate in zip(optimizer.param_groups, leg.rates, strict=True):
            group["lr"] = rate * train.lr_schedule.at(leg.step, job.batches.total_steps)
        optimizer.zero_grad()
        loss = torch.zeros((), device=job.place.device)
        for number, batch in enumerate(batches):
            with self._synchronised(number == len(batches) - 1):
                part = self._loss(job.place.move(batch)) / len(batches)
                self._scaler.scale(part).backward()
            loss = loss + part.detach()
        if train.clip_norm is not None:
            self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(leg.model.parameters(), train.clip_norm)
        told = {"loss": loss} if isinstance(optimizer, HESSOCRIC) else {}
        self._scaler.step(optimizer, **told)
        self._scaler.update()
        leg.step += 1
        leg.seconds += time.monotonic() - start
        self._pending.append(loss)
        if job.place.device.type == "cpu" or len(self._pending) >= _GPU_CHECKS_EVERY:
            self._look()

    def _loss(self, batch: Batch) -> Tensor:
        job, train = self.job, self.job.recipe.train
        args, kwargs = job.task.call(batch)
        with torch.autocast(job.place.device.type, train.dtype(), enabled=train.precision != "float32"):
            output = self._outer(*args, **kwargs)
            loss = job.task.loss(output, batch)
            return loss if self._distil is None else self._distil(loss, output, *args, **kwargs)

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Processes add up their gradients with the last of the accumulated batches."""
        return self._outer.no_sync() if isinstance(self._outer, DistributedDataParallel) and not last else nullcontext()

    def _look(self) -> None:
        """Read the losses of the steps since the last look. Raises GetaError with the step when one is not finite."""
        leg, first = self.leg, self.leg.step - len(self._pending)
        values = torch.stack(self._pending).tolist() if self._pending else []
        self._pending = []
        for step, value in enumerate(values, first):
            if not math.isfinite(value):
                where = f" in stage '{leg.stage}'" if leg.stage else " of the dense network"
                raise GetaError(
                    f"the training loss became {value} at step {step}{where}: training has diverged; the log up to here is in "
                    f"'{self.record.folder / 'log.txt'}'. Lower the learning rate (train.optimizer.lr = "
                    f"{self.job.recipe.train.optimizer.lr:g}) or train longer (train.epochs), in a new folder"
                )
            leg.loss_sum += value
            leg.losses += 1

    def _evaluate(self, track: Track) -> bool:
        """Measure, and add a row to the history; False when asked to stop on the way."""
        self._look()
        job, leg, start = self.job, self.leg, time.monotonic()
        score = evaluate(leg.model, job.task, job.data.test, job.evaluation_batch, job.place, self.stop)
        if score is None:
            return False
        loss = float(ranks.mean(torch.tensor(leg.loss_sum / max(leg.losses, 1), dtype=torch.float64, device=job.place.device)))
        leg.seconds += time.monotonic() - start
        row = leg.row(loss, score, job.batches.steps_per_epoch)
        leg.rows.append(row)
        leg.loss_sum, leg.losses = 0.0, 0
        self.record.row(row)
        track.milestone(self.record.words(row))
        return True

    def _due(self, epochs: float) -> bool:
        every = max(1, round(epochs * self.job.batches.steps_per_epoch))
        return self.leg.step == self.job.batches.total_steps or (self.leg.step > 0 and self.leg.step % every == 0)

    def _save(self) -> None:
        self._look()
        leg = self.leg
        leg.scaler = self._scaler.state_dict()
        if self.job.place.first:
            self.checkpoints.save(leg.number, leg.step, {"leg": leg.number, **leg.state()})

    def _now(self) -> dict[str, str]:
        """What the live view shows between evaluations; what waits for a device only now and then, and only where someone looks."""
        leg = self.leg
        found = {"loss": f"{leg.loss_sum / leg.losses:.4f}"} if leg.losses else {}
        if not leg.stage:
            return found
        found = {"stage": leg.stage, **found}
        if self.record.log.console.is_terminal and time.monotonic() - self._looked > _LIVE_SECONDS:
            self._looked = time.monotonic()
            found |= self.record.constraints(leg.progress())
        return found
