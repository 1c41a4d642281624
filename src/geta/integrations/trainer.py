"""Compression inside the Trainer of Hugging Face transformers (and whatever is derived from it).

    trainer = Trainer(model=model, args=args, train_dataset=data)
    compressor = geta.Compressor(model, kwargs={"input_ids": ids}, sparsity=0.5, weight_bits=(4, 8))
    callback = GetaCallback(compressor).attach(trainer)
    trainer.train()
    small = callback.finish()

The optimizer is the one that the Trainer makes from its own arguments (`optim`, `weight_decay`, ...), wrapped at the moment it is made,
which is when the Trainer knows the number of its optimizer steps.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import torch
from torch import nn

from geta.errors import ConfigError
from geta.graph.names import canonical_name, unwrap
from geta.integrations.compressor import Compressor
from geta.integrations.logs import check_length, facts, unfinished
from geta.integrations.sharding import prepare_sharding
from geta.optim import QASSO, Schedule
from geta.optim.wrapper import WrappingOptimizer
from geta.subnet import CompactModel
from geta.subnet.compact import Product

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ConfigError(f"geta.integrations.trainer needs transformers ({error}): pip install 'geta[trainer]'") from error


class GetaCallback(TrainerCallback):
    """Gives a Trainer the optimizer of a `geta.Compressor`, logs where the run stands, and hands out the compact model.

    compressor:  made over the model that the Trainer trains, before `trainer.train()`.
    schedule:    the stages, from the number of optimizer steps that the Trainer plans: `lambda steps: geta.Schedule(steps, joint=0.5)`;
                 None = the default stages.
    compression: further settings of `geta.QASSO` by name.

    Every entry of the Trainer's logs gets `stage`, `group_sparsity` and, with quantizers, `mean_bits`. The number of steps is the
    Trainer's own `max_steps`, after epochs, gradient accumulation and processes. Checkpoints of the Trainer hold all that a run needs to
    go on bitwise (`resume_from_checkpoint`).
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        schedule: Callable[[int], Schedule] | None = None,
        compression: Mapping[str, Any] | None = None,
    ) -> None:
        self.compressor = compressor
        self.optimizer: QASSO | None = None
        self._schedule = schedule or Schedule
        self._compression = compression
        self._attached = False
        self._steps = 0

    def attach(self, trainer: Any) -> GetaCallback:
        """Let `trainer` train with the compressor's optimizer; returns this callback.

        With FSDP2 (`fsdp=True, fsdp_config={"version": 2}`) the model is sharded before the optimizer is wrapped, and `finish` gathers it.

        Raises ConfigError for a Trainer of another model, one whose optimizer is wrapped already, and settings that can't work:
        `load_best_model_at_end` (the best model may be one from before the cool-down), `auto_find_batch_size`, DeepSpeed, and what
        `geta.integrations.sharding.prepare_sharding` refuses.
        """
        if self._attached:
            raise ConfigError("this callback already belongs to a Trainer: make a new Compressor and a new GetaCallback for another run")
        self._refuse(trainer)
        make, make_both = trainer.create_optimizer, trainer.create_optimizer_and_scheduler

        def create_optimizer(*args: Any, **kwargs: Any) -> Any:
            if self.optimizer is None and trainer.is_fsdp_enabled:
                prepare_sharding(self.compressor, trainer.accelerator)
                make(*args, **kwargs)  # the plain one: ours would hold on to whole weights while they are sharded
            elif self.optimizer is None:
                trainer.optimizer = self._wrapped(make(*args, **kwargs), self._steps or trainer.state.max_steps)
            return trainer.optimizer

        def create_optimizer_and_scheduler(num_training_steps: int) -> None:
            self._steps = num_training_steps
            make_both(num_training_steps)

        if trainer.is_fsdp_enabled:
            self._wrap_when_sharded(trainer)
        trainer.create_optimizer = create_optimizer
        trainer.create_optimizer_and_scheduler = create_optimizer_and_scheduler  # what older versions call, before `state` knows the steps
        trainer.callback_handler.callbacks.insert(0, self)  # before those that print or send the logs
        _name_tied(self.compressor.model)
        self._attached = True
        return self

    @overload
    def finish(self, product: Literal["graph"] = "graph") -> CompactModel: ...

    @overload
    def finish(self, product: Literal["eager", "auto"]) -> nn.Module: ...

    def finish(self, product: Product = "graph") -> nn.Module:
        """The compact model after training, see `Compressor.finish`. Raises ConfigError when training ended before the cool-down.

        With FSDP2 every rank has to call it (weights are gathered) and gets the same model.
        """
        return self.compressor.finish(product)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the run trains with our optimizer and goes on where it stands.

        Raises ConfigError after a resume that lost the optimizer's state or parts of the model (PEFT), or when too few steps are left
        for the cool-down.
        """
        if self.optimizer is None:
            raise ConfigError(
                "this Trainer didn't make its optimizer through create_optimizer(): attach GetaCallback before train(), and leave the "
                "optimizer to the Trainer or pass it as optimizers=(optimizer, None)"
            )
        if state.global_step > 0 and self.optimizer.progress()["step"] == 0:
            raise ConfigError(
                f"the Trainer goes on at step {state.global_step}, but its checkpoint holds no state of the optimizer, without which "
                "groups and bit widths would start again: save checkpoints with save_only_model=False"
            )
        if state.global_step > 0 and getattr(unwrap(self.compressor.model), "peft_config", None):
            raise ConfigError(
                "the Trainer resumes from a checkpoint of adapters alone, without the base weights that were pruned and the quantizers: "
                "a PEFT model that is pruned can only be resumed in a loop that saves all of its state_dict()"
            )
        check_length(self.optimizer, state.max_steps - state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add stage, sparsity and mean bits to what is logged, and to the state's history of it."""
        found = facts(self.compressor)
        for record in (logs, state.log_history[-1] if state.log_history else None):
            if record is not None:
                record.update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn when training ended before the cool-down: there is no compact model then."""
        message = unfinished(self.compressor)
        if message is not None:
            warnings.warn(message, stacklevel=2)

    def _wrapped(self, made: torch.optim.Optimizer, steps: int) -> QASSO:
        if steps < 1:
            raise ConfigError("the Trainer makes its optimizer and doesn't know its number of steps yet: call trainer.train() first")
        self.optimizer = self.compressor.wrap(made, schedule=self._schedule(steps), compression=self._compression)
        return self.optimizer

    def _wrap_when_sharded(self, trainer: Any) -> None:
        """Wrap the optimizer when the learning-rate scheduler is made, which the Trainer does once accelerate has sharded the model."""
        make = trainer.create_scheduler

        def create_scheduler(num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
            if self.optimizer is None:
                prepared = trainer.optimizer  # accelerate's, around the plain one
                prepared.optimizer = self._wrapped(prepared.optimizer, num_training_steps)
            return make(num_training_steps, *args, **kwargs)

        trainer.create_scheduler = create_scheduler

    def _refuse(self, trainer: Any) -> None:
        if trainer.model_init is not None:
            raise ConfigError("this Trainer makes its model itself (model_init=...), and another one for each run: pass it a model")
        if unwrap(trainer.model) is not unwrap(self.compressor.model):
            raise ConfigError(
                f"the Trainer trains a {type(trainer.model).__name__} that isn't the compressor's model: make geta.Compressor(model, ...) "
                "and Trainer(model=model, ...) with the same object"
            )
        if isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), WrappingOptimizer):
            raise ConfigError("the Trainer's optimizer is already wrapped: give it a plain torch optimizer, or leave it to the Trainer")
        if trainer.lr_scheduler is not None:
            raise ConfigError(
                "the Trainer was given a learning-rate scheduler, which knows nothing of the quantizers' parameter group: pass "
                "optimizers=(optimizer, None) and name the scheduler in TrainingArguments(lr_scheduler_type=...)"
            )
        if trainer.args.auto_find_batch_size:
            raise ConfigError("auto_find_batch_size changes the number of steps after the schedule was made for it: choose a batch size")
        if trainer.args.load_best_model_at_end:
            raise ConfigError(
                "load_best_model_at_end may bring back a model from before the cool-down, whose groups and bit widths aren't final: "
                "switch it off"
            )
        if trainer.is_deepspeed_enabled:
            raise ConfigError(
                "DeepSpeed puts an optimizer of its own around flattened copies of the weights, in which rows and channels can't be found: "
                "use FSDP2 (fsdp=True), which shards as well"
            )
        if trainer.is_fsdp_xla_enabled:
            raise ConfigError("FSDP of XLA (fsdp_config={'xla': True}) isn't supported: use DistributedDataParallel, or FSDP2 on GPUs")
        if trainer.args.fsdp and not trainer.is_fsdp_enabled:
            warnings.warn(
                f"fsdp={trainer.args.fsdp!r} has no effect: accelerate shards on accelerators only, so that here every process trains a "
                "whole copy",
                stacklevel=3,
            )


def _name_tied(model: nn.Module) -> None:
    """Tell `save_pretrained` which of the tied tensors' new names are the copies: safetensors refuses tensors that share memory."""
    if not hasattr(model, "_tied_weights_keys"):
        return
    declared: Any = model._tied_weights_keys or {}
    shared = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter):
            shared[id(tensor)].append(name)
    tied = {}
    for names in shared.values():
        source = next((name for name in names if not any(re.search(key, canonical_name(name)) for key in declared)), names[0])
        tied.update({re.escape(name): source for name in names if name != source and "parametrizations" in name.split(".")})
    if tied:
        model._tied_weights_keys = {**declared, **tied}  # type: ignore[assignment]
