"""Compression inside the Trainer of Lightning.

    class Digits(lightning.LightningModule):
        def __init__(self): self.net = ...; self.compressor = geta.Compressor(self.net, (x,), sparsity=0.5, weight_bits=(4, 8))
        def configure_optimizers(self):
            return self.compressor.wrap(torch.optim.AdamW(self.parameters()), total_steps=self.trainer.estimated_stepping_batches)

    digits = Digits()
    lightning.Trainer(callbacks=[GetaCallback(digits.compressor)]).fit(digits, data)
    small = digits.compressor.finish()

`wrap` alone does the work; the callback logs where the run stands and watches over its length.
"""

from __future__ import annotations

import warnings
from typing import Any

from geta.errors import ConfigError
from geta.integrations.compressor import Compressor
from geta.integrations.logs import check_length, facts, unfinished
from geta.optim import QASSO

try:
    from lightning.pytorch import Callback
except ImportError as error:
    raise ConfigError(f"geta.integrations.lightning needs lightning ({error}): pip install 'geta[lightning]'") from error

STAGES = ("warm-up", "projection", "joint", "cool-down")
"""A logged `stage` of 2.0 is "joint": Lightning's loggers take numbers only."""


class GetaCallback(Callback):
    """Logs stage (its place in `STAGES`), group sparsity and mean bits, and watches over the length of the run.

    compressor: the one whose `wrap` is called in `configure_optimizers`.

    Written to the loggers every `log_every_n_steps` optimizer steps, and to `trainer.callback_metrics` at the end of every epoch.
    """

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raises ConfigError when no optimizer of this run is the compressor's, or too few steps are left for the cool-down."""
        mine = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, QASSO) and optimizer is self.compressor.trained_by]
        if not mine:
            raise ConfigError(
                "none of the optimizers of this run is the compressor's: return compressor.wrap(optimizer, "
                "total_steps=self.trainer.estimated_stepping_batches) from configure_optimizers()"
            )
        check_length(mine[0], trainer.estimated_stepping_batches - trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log now and then."""
        if trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics(self._numbers(), step=trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log for callbacks that look at metrics."""
        pl_module.log_dict(self._numbers(), on_step=False, on_epoch=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Warn when training ended before the cool-down: there is no compact model then."""
        message = unfinished(self.compressor)
        if message is not None:
            warnings.warn(message, stacklevel=2)

    def _numbers(self) -> dict[str, float]:
        found = facts(self.compressor)
        return {name: float(STAGES.index(value) if name == "stage" else value) for name, value in found.items()}
