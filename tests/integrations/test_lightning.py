"""Lightning's Trainer with our optimizer inside: the plain loop's result, its checkpoints, its metrics, and what is refused."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import geta
from geta.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning"),  # Lightning asks for a LeafSpec, which torch 2.13 deprecates
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning"),  # none are needed here
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),  # a resumed run writes where the first did
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
import lightning  # noqa: E402 - after its logger is quiet
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from geta.integrations.lightning import STAGES, GetaCallback  # noqa: E402

X = torch.randn(48, 12, generator=torch.Generator().manual_seed(2))
Y = X[:, :3].argmax(1)
EPOCHS, STEPS = 5, 30


def network() -> tuple[nn.Module, geta.Compressor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    return net, geta.Compressor(net, (X[:2],), sparsity=0.5, weight_bits=(4, 8))


class Rows(lightning.LightningModule):
    def __init__(self, *, wraps: bool = True) -> None:
        super().__init__()
        self.net, self.compressor = network()
        self.wraps = wraps

    def training_step(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer: Any = torch.optim.AdamW(self.parameters(), lr=5e-3)
        steps = self.trainer.estimated_stepping_batches
        if self.wraps:
            optimizer = self.compressor.wrap(optimizer, total_steps=steps)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(folder: Path, *callbacks: Callback, module: Rows | None = None, resume: Path | None = None, **settings: Any) -> tuple[Any, Rows]:
    rows = Rows() if module is None else module
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options = {**quiet, "max_epochs": EPOCHS, "gradient_clip_val": 0.5, **settings}
    trainer = lightning.Trainer(**options, default_root_dir=folder, callbacks=[GetaCallback(rows.compressor), *callbacks])
    trainer.fit(rows, DataLoader(TensorDataset(X, Y), 8), ckpt_path=resume)
    return trainer, rows


def same_tensors(one: nn.Module, two: nn.Module) -> None:
    assert [name for name, tensor in one.state_dict().items() if not torch.equal(tensor, two.state_dict()[name])] == []


def test_trains_as_the_plain_loop(tmp_path):
    """Lightning passes a closure to `step`, which clips the gradients too."""
    trainer, rows = fit(tmp_path, enable_checkpointing=False)
    net, compressor = network()
    optimizer = compressor.optimizer(torch.optim.AdamW, lr=5e-3, total_steps=STEPS)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    for step in range(STEPS):
        part = slice(8 * step % 48, 8 * step % 48 + 8)

        def closure(part: slice = part) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(X[part]), Y[part])
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
            return loss

        optimizer.step(closure)
        scheduler.step()
    assert rows.compressor.trained_by.schedule.total_steps == trainer.estimated_stepping_batches == STEPS
    same_tensors(rows.net, net)
    assert {name: float(value) for name, value in trainer.callback_metrics.items()} == pytest.approx(
        {"stage": 3.0, "group_sparsity": 0.5, "mean_bits": compressor.progress()["mean_bits"]}
    )
    assert rows.compressor.finish().bits == compressor.finish().bits


def test_its_checkpoints_go_on_bitwise(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    _, whole = fit(tmp_path, keep)
    for epoch in (1, 3):  # in the joint stage, and after it
        again = ModelCheckpoint(tmp_path, filename="again-{epoch}", save_top_k=-1)
        _, resumed = fit(tmp_path, again, resume=tmp_path / f"epoch={epoch}.ckpt")
        same_tensors(whole.net, resumed.net)
        assert resumed.compressor.progress() == whole.compressor.progress()
    assert [whole.compressor.trained_by.schedule.stage_at(6 * (epoch + 1)) for epoch in (1, 3)] == ["joint", "cool-down"]


def test_accumulated_batches_are_one_step(tmp_path):
    _, rows = fit(tmp_path, enable_checkpointing=False, accumulate_grad_batches=2)
    assert rows.compressor.progress()["step"] == rows.compressor.trained_by.schedule.total_steps == STEPS // 2
    rows.compressor.finish()


def test_loggers_hear_where_the_run_stands(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, enable_checkpointing=False, logger=logger, log_every_n_steps=2)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        seen = list(dict.fromkeys(STAGES[int(float(row["stage"]))] for row in csv.DictReader(file) if row["stage"]))
    assert seen == ["warm-up", "projection", "joint", "cool-down"]


def test_an_optimizer_that_is_not_ours_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="none of the optimizers of this run is the compressor's"):
        fit(tmp_path, module=Rows(wraps=False), enable_checkpointing=False)


def test_training_that_ends_early_is_told(tmp_path):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    rows = Rows()
    with pytest.warns(UserWarning, match="training ended at step 6 of 30, in projection"):
        fit(tmp_path, Stop(), module=rows, enable_checkpointing=False)
    with pytest.raises(ConfigError, match="training stopped in stage 'projection'"):
        rows.compressor.finish()
