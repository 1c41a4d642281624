"""Runs in which accelerate's own FSDP2 plugin shards the model, through the Trainer and in a plain loop; importable by spawned processes.

accelerate takes its plugin where it sees accelerators and ignores it on CPUs, where its code works as well. `as_on_accelerators` changes
what it sees, and nothing else.
"""

from __future__ import annotations

import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from transformers import Trainer, TrainingArguments

import geta
from geta.integrations.sharding import prepare_sharding
from geta.integrations.trainer import GetaCallback
from geta.optim.shards import is_sharded
from trainer_runs import LANGUAGE, ROWS, SETTINGS, TOKENS, Mlp, X, model_of

STEPS, STOP = 12, 5
PLUGIN = {"version": 2, "activation_checkpointing": True, "reshard_after_forward": False}


def as_on_accelerators() -> None:
    """The next Accelerator of this process sees accelerators."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def made(out: Path, *, sharded: bool, **settings: Any) -> tuple[Trainer, GetaCallback]:
    """A Trainer of a GPT-2, whose embedding is its last layer, in double precision, so that one process and two compute the same."""
    if sharded:
        settings |= {"fsdp": True, "fsdp_config": dict(PLUGIN)}
    model: Any = model_of("gpt2").double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    common = {"max_steps": STEPS, "logging_steps": 1, "train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2}
    arguments = TrainingArguments(str(out), **{**SETTINGS, **common, **settings})  # which looks for devices
    if sharded:
        as_on_accelerators()
    trainer = Trainer(model, arguments, train_dataset=LANGUAGE)
    bits: dict[str, Any] = {"weight_bits": (4, 8), "activation_bits": 8, "calibration": [{"input_ids": TOKENS[:8]}]}
    compressor = geta.Compressor(model, kwargs={"input_ids": TOKENS[:2]}, sparsity=0.5, **bits)
    return trainer, GetaCallback(compressor, compression={"quant_lr": 1e-5}).attach(trainer)


def result(norms: list[float], compressor: geta.Compressor) -> dict[str, Any]:
    small = compressor.finish()
    progress = compressor.progress()
    return {"norms": norms, "kept": small.info.kept, "progress": progress, "tensors": {n: t.clone() for n, t in small.tensors().items()}}


def trained(trainer: Trainer, callback: GetaCallback, resume: Path | None = None) -> dict[str, Any]:
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    history = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return result([float(norm) for norm in history], callback.compressor)


def on_one(out: Path) -> dict[str, Any]:
    return trained(*made(out, sharded=False))


def on_two(out: Path) -> dict[str, Any]:
    saving = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": STOP}
    trainer, callback = made(out / "whole", sharded=True, **saving)
    model = trainer.model
    whole = trained(trainer, callback)
    gathered, graph = callback.compressor.gathered()
    saved = out / f"folder {dist.get_rank()}"
    geta.save_pretrained(gathered, graph, saved)  # which compares what it loads from there
    return {
        "whole": whole,
        "resumed": trained(*made(out / "resumed", sharded=True, **saving), out / "whole" / f"checkpoint-{STOP}"),
        "sharded": sorted({type(p).__name__ for p in model.parameters()}),
        "gathered": [type(gathered).__name__, graph.model is gathered, any(map(is_sharded, gathered.parameters()))],
        "saved": sorted(path.name for path in saved.iterdir()),
    }


def loop(accelerator: Accelerator, *, stop: int = STEPS, resume: Path | None = None) -> tuple[list[float], geta.Compressor]:
    """A plain loop with a budget; half of every batch on each rank, where there are two."""
    torch.manual_seed(0)
    model = Mlp().double()
    compressor = geta.Compressor(model, kwargs={"x": X[:2].double()}, target=geta.Budget(bops=0.05), weight_bits=(4, 8))
    optimizer = compressor.optimizer(torch.optim.AdamW, lr=3e-3, total_steps=STEPS, compression={"quant_lr": 1e-5})
    before = weakref.ref(compressor.model.get_parameter("first.parametrizations.weight.original"))
    prepare_sharding(compressor, accelerator)
    outer, wrapped = accelerator.prepare(model, optimizer)
    if resume is not None:
        accelerator.load_state(str(resume))
    labels, norms = torch.stack([row["labels"] for row in ROWS]), []
    part, parts = accelerator.process_index, accelerator.num_processes
    for step in range(optimizer.progress()["step"], stop):
        rows = torch.arange(8 * step, 8 * step + 8).chunk(parts)[part] % 48
        wrapped.zero_grad()
        accelerator.backward(F.cross_entropy(outer(X[rows].double())["logits"], labels[rows]))
        norms.append(float(accelerator.clip_grad_norm_(outer.parameters(), 0.3)))
        wrapped.step()
    assert (before() is None) == accelerator.is_fsdp2, "weights from before sharding are still held"
    return norms, compressor


def plugin_of(**settings: Any) -> Accelerator:
    as_on_accelerators()
    defaults = {"fsdp_version": 2, "cpu_ram_efficient_loading": False}
    return Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(**{**defaults, **settings}))


def plain(out: Path) -> dict[str, Any]:
    whole = result(*loop(plugin_of()))
    accelerator = plugin_of()
    loop(accelerator, stop=STOP)
    accelerator.save_state(str(out / "state"))
    return {"whole": whole, "resumed": result(*loop(plugin_of(), resume=out / "state"))}


def refusals(out: Path) -> dict[str, str]:
    found = {}

    def refused(name: str, run: Any) -> None:
        try:
            run()
        except geta.GetaError as error:
            found[name] = str(error)

    refused("version 1", lambda: loop(plugin_of(fsdp_version=1, reshard_after_forward="FULL_SHARD")))
    refused("meta", lambda: loop(plugin_of(cpu_ram_efficient_loading=True)))
    refused("size", lambda: loop(plugin_of(auto_wrap_policy="size_based_wrap", min_num_params=8)))
    accelerator = plugin_of()
    accelerator.state._mixed_precision = "fp16"
    refused("half", lambda: loop(accelerator))
    accelerator = plugin_of()
    _, compressor = loop(accelerator, stop=1)
    refused("late", lambda: prepare_sharding(compressor, accelerator))
    AcceleratorState._reset_state(reset_partial_state=True)  # as on CPUs again
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Mlp()
        arguments = TrainingArguments(str(out), **SETTINGS, max_steps=2, fsdp=True, fsdp_config={"version": 2}, ddp_backend="gloo")
        GetaCallback(geta.Compressor(model, kwargs={"x": X[:2]}, sparsity=0.5)).attach(Trainer(model, arguments, train_dataset=ROWS))
    found["on CPUs"] = "; ".join(str(one.message) for one in caught if "fsdp" in str(one.message))
    return found


def everything(rank: int, folder: Path) -> dict[str, Any]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}  # the two have met before this is called
    os.environ.update({name: str(value) for name, value in names.items()})
    found: dict[str, Any] = {"trainer": on_two(folder / "trainer"), "loop": plain(folder / "loop")}
    dist.barrier()
    return {**found, "refusals": refusals(folder / "refused")}
