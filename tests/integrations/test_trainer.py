"""The Trainer of transformers with our optimizer inside: the plain loop's result, its own checkpoints, its logs, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import get_scheduler

import geta
from geta.errors import ConfigError
from geta.integrations.trainer import GetaCallback
from trainer_runs import LANGUAGE, ROWS, SETTINGS, TOKENS, Mlp, X, made, model_of, on_a_rank
from two_ranks import on_two_ranks


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps one state per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def same_tensors(one: torch.nn.Module, two: torch.nn.Module) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_trains_as_the_plain_loop(tmp_path):
    """Clipping, a schedule with warm-up, accumulated gradients: bitwise what a loop of one's own computes."""
    settings = {"gradient_accumulation_steps": 2, "num_train_epochs": 4, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine"}
    trainer, callback = made("mlp", tmp_path, **settings, warmup_steps=3, train_sampling_strategy="sequential")
    trainer.train()

    model, total = model_of("mlp"), 24
    compressor = geta.Compressor(model, kwargs={"x": X[:2]}, sparsity=0.5, weight_bits=(4, 8))
    optimizer = compressor.wrap(torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True), total_steps=total)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=total)
    labels = torch.stack([row["labels"] for row in ROWS])
    for step in range(total):
        for part in range(2):
            rows = slice((8 * step + 4 * part) % 48, (8 * step + 4 * part) % 48 + 4)
            (model(X[rows], labels[rows])["loss"] / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    assert trainer.state.max_steps == callback.optimizer.schedule.total_steps == total
    same_tensors(trainer.model, model)


@pytest.mark.parametrize(
    ("kind", "product", "settings"), [("gpt2", "graph", {"max_steps": 14}), ("llama", "eager", {"num_train_epochs": 3, "bf16": True})]
)
def test_checkpoints_of_the_trainer_go_on_bitwise(kind, product, settings, tmp_path):
    """In the middle of the joint stage, with dropout, a shuffled data set, accumulation, tied weights (GPT-2), bfloat16 (Llama)."""
    settings = {**settings, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "linear"}
    whole, callback = made(kind, tmp_path / "whole", **settings)
    whole.train()
    resumed, second = made(kind, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))

    assert whole.state.max_steps == callback.optimizer.schedule.total_steps == settings.get("max_steps", 12)
    assert callback.optimizer.schedule.stage_at(5) == "joint"
    same_tensors(whole.model, resumed.model)
    losses = [[record["loss"] for record in one.state.log_history if "loss" in record][-3:] for one in (whole, resumed)]
    assert losses[0] == losses[1]

    forward = whole.model.forward
    small = callback.finish(product)
    assert whole.model.forward == forward  # accelerate's autocast is still there
    assert callback.compressor.progress() == second.compressor.progress()
    assert (type(small) is type(whole.model)) == (product == "eager")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in whole.model.parameters())
    with torch.no_grad():
        expected = whole.model.eval()(input_ids=TOKENS[:3]).logits
        given = small.eval()(input_ids=TOKENS[:3]).logits
    torch.testing.assert_close(given, expected.float(), rtol=0.05, atol=0.05)


def test_logs_say_where_the_run_stands(tmp_path):
    trainer, callback = made("mlp", tmp_path, max_steps=20, logging_steps=1)
    printed: list[dict[str, Any]] = []

    class Reads(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            printed.append(dict(logs))

    trainer.add_callback(Reads())
    trainer.train()
    metrics = trainer.evaluate(ROWS[:8])
    history = trainer.state.log_history
    steps = [record for record in history if "loss" in record]
    assert list(dict.fromkeys(record["stage"] for record in steps)) == ["warm-up", "projection", "joint", "cool-down"]
    assert steps[0]["group_sparsity"] == 0.0
    assert steps[-1]["group_sparsity"] == callback.optimizer.progress()["group_sparsity"] == 0.5
    assert steps[0]["mean_bits"] > steps[-1]["mean_bits"] == callback.optimizer.progress()["mean_bits"]
    assert [record["stage"] for record in printed] == [record["stage"] for record in history]
    assert metrics["stage"] == "cool-down"


def test_a_schedule_of_ones_own_and_settings_of_the_optimizer(tmp_path):
    model = model_of("mlp")
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **SETTINGS, max_steps=10), train_dataset=ROWS)
    compressor = geta.Compressor(model, kwargs={"x": X[:2]}, sparsity=0.5, weight_bits=(4, 8))
    callback = GetaCallback(compressor, schedule=lambda steps: geta.Schedule(steps, joint=0.5), compression={"quant_lr": 5e-4})
    callback.attach(trainer).compressor.graph  # noqa: B018 - attach hands the callback back
    trainer.train()
    assert callback.optimizer.schedule == geta.Schedule(10, joint=0.5)
    assert callback.optimizer.param_groups[-1]["initial_lr"] == 5e-4


def test_an_optimizer_of_ones_own_is_wrapped(tmp_path):
    model = model_of("mlp")
    compressor = geta.Compressor(model, kwargs={"x": X[:2]}, sparsity=0.5, weight_bits=(4, 8))
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    arguments = TrainingArguments(str(tmp_path), **SETTINGS, max_steps=10)
    trainer = Trainer(model, arguments, train_dataset=ROWS, optimizers=(base, None))
    callback = GetaCallback(compressor).attach(trainer)
    trainer.train()
    assert callback.optimizer.base is base
    callback.finish()


def test_steps_are_known_where_older_versions_tell_them(tmp_path):
    """transformers 5.0 calls `create_optimizer_and_scheduler` with the number of steps, before its state has it."""
    trainer, callback = made("mlp", tmp_path, max_steps=20)
    trainer.create_optimizer_and_scheduler(num_training_steps=20)
    assert trainer.optimizer is callback.optimizer
    assert callback.optimizer.schedule.total_steps == 20
    assert len(trainer.lr_scheduler.base_lrs) == len(callback.optimizer.param_groups)


def test_training_that_ends_early_is_told(tmp_path):
    trainer, callback = made("mlp", tmp_path, max_steps=20)
    trainer.add_callback(StopAt(6))
    with pytest.warns(UserWarning, match=r"training ended at step 6 of 20, in joint"):
        trainer.train()
    with pytest.raises(ConfigError, match="training stopped in stage 'joint' at step 6"):
        callback.finish()


def test_a_second_run_goes_on_in_the_cool_down(tmp_path):
    trainer, callback = made("mlp", tmp_path, max_steps=10)
    trainer.train()
    trainer.train()
    assert callback.optimizer.progress()["step"] == 20
    callback.finish()


def test_a_checkpoint_without_the_optimizers_state_is_refused(tmp_path):
    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    trainer, _ = made("mlp", tmp_path / "whole", **settings)
    trainer.train()
    saved = shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "checkpoint-6")
    (Path(saved) / "optimizer.pt").unlink()
    resumed, _ = made("mlp", tmp_path / "resumed", **settings)
    with pytest.raises(ConfigError, match="step 6, but its checkpoint holds no state of the optimizer"):
        resumed.train(resume_from_checkpoint=str(saved))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers for it
def test_an_adapters_checkpoint_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    settings = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}

    def adapted(out: Path) -> Trainer:
        model = get_peft_model(model_of("llama"), LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
        trainer = Trainer(model, TrainingArguments(str(out), **{**SETTINGS, **settings}), train_dataset=LANGUAGE)
        compressor = geta.Compressor(model, kwargs={"input_ids": TOKENS[:2]}, sparsity=0.25, weight_bits=None, protect=["*.lora_A.*:0"])
        GetaCallback(compressor).attach(trainer)
        return trainer

    adapted(tmp_path / "whole").train()
    with pytest.raises(ConfigError, match="a checkpoint of adapters alone"):
        adapted(tmp_path / "resumed").train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))


def refused(tmp_path: Path, why: str) -> None:
    model = model_of("mlp")
    compressor = geta.Compressor(model, kwargs={"x": X[:2]}, sparsity=0.5)
    settings: dict[str, Any] = {**SETTINGS, "max_steps": 10}
    optimizers: tuple[Any, Any] = (None, None)
    if why == "best":
        settings |= {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "metric_for_best_model": "loss"}
    if why == "finds":
        settings["auto_find_batch_size"] = True
    if why == "wrapped":
        optimizers = (compressor.optimizer(torch.optim.SGD, lr=0.1, total_steps=10), None)
    if why == "scheduled":
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizers = (base, torch.optim.lr_scheduler.LambdaLR(base, lambda _: 1.0))
    arguments = TrainingArguments(str(tmp_path), **settings)
    if why == "init":
        trainer = Trainer(None, arguments, train_dataset=ROWS, model_init=lambda: model)
    else:
        trained = Mlp() if why == "another" else model
        trainer = Trainer(trained, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], optimizers=optimizers)
    if why == "deepspeed":
        trainer.is_deepspeed_enabled = True
    if why == "xla":
        trainer.is_fsdp_xla_enabled = True
    callback = GetaCallback(compressor).attach(trainer)
    if why == "twice":
        callback.attach(trainer)
    if why == "short":
        settings["max_steps"] = 3
        trainer.args.max_steps = 3
        callback._schedule = lambda steps: geta.Schedule(10)
    if why == "early":
        trainer.create_optimizer()
    if why == "late":
        trainer.create_optimizer = lambda *_: torch.optim.SGD(model.parameters(), lr=0.1)
        trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.train()


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("another", "a Mlp that isn't the compressor's model"),
        ("best", "load_best_model_at_end may bring back"),
        ("finds", "auto_find_batch_size changes the number of steps"),
        ("wrapped", "already wrapped"),
        ("scheduled", "learning-rate scheduler, which knows nothing"),
        ("init", "makes its model itself"),
        ("twice", "already belongs to a Trainer"),
        ("short", "3 steps are left in this run and the schedule stands at step 0"),
        ("early", "doesn't know its number of steps yet"),
        ("deepspeed", "optimizer of its own around flattened copies of the weights"),
        ("xla", "FSDP of XLA"),
        ("late", r"didn't make its optimizer through create_optimizer"),
    ],
)
def test_what_cannot_work_is_refused(why, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        refused(tmp_path, why)


def test_two_processes_train_one_model(tmp_path):
    """Every rank ends with the same compact model, after half as many steps as one process would take."""
    one, two = on_two_ranks(on_a_rank, tmp_path / "ranks", str(tmp_path / "out"))
    assert int(one["steps"]) == 24
    assert int(one["ranks"]) == 2
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
