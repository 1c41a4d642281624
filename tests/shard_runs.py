"""Training runs of models that `fully_shard` (FSDP2) has spread over two ranks; importable by spawned processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import geta
import rank_runs
from geta.optim import quantizer_parameters
from rank_runs import SCHEDULE, STEPS, global_batch, make_model, my_part
from rank_runs import trained as steps

KINDS = ["qasso", "qasso-momentum", "qasso-budget", "hesso", "hesso-fisher", "hesso-activation"]
STOP = 25


def unsharded(kind: str) -> tuple[nn.Module, Any]:
    """The model, quantized or not, and its graph."""
    model = make_model()
    graph = geta.analyze(model, (global_batch(0)[0],))
    if kind.startswith("qasso"):
        batches = [global_batch(1000 + i)[0] for i in range(4)]
        geta.quantize(model, weights=(3, 6), activations=(6, 8), calibration=batches, granularity="channel", exclude=(), initial_bits=8)
    return model, graph


def optimizer_of(kind: str, model: nn.Module, graph: Any, budget: geta.Budget | None) -> Any:
    settings: dict[str, Any] = {"schedule": SCHEDULE, "sparsity": 0.5}
    if kind.startswith("qasso"):
        settings["quant_lr"] = 1e-5
    if kind == "qasso-budget":
        settings = {**settings, "sparsity": None, "target": budget}
    if kind == "qasso-momentum":
        return geta.QASSO(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), graph, **settings, forgetting="descent")
    base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    if kind.startswith("qasso"):
        return geta.QASSO(base, graph, **settings)
    saliency = {"hesso": None, "hesso-fisher": "fisher", "hesso-activation": "activation"}[kind]
    return geta.HESSO(base, graph, **settings, saliency=saliency)


def shard(model: nn.Module, **settings: Any) -> None:
    """Every layer by itself, then the rest; rows don't divide evenly among the ranks."""
    mesh, ignored = init_device_mesh("cpu", (dist.get_world_size(),)), set(quantizer_parameters(model))
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh, ignored_params=ignored, **settings)
    fully_shard(model, mesh=mesh, ignored_params=ignored, **settings)


def make(kind: str) -> tuple[nn.Module, Any]:
    model, graph = unsharded(kind)
    budget = geta.Budget(bops=0.015, params=0.4).bind(graph) if kind == "qasso-budget" else None
    if dist.is_initialized():
        shard(model)
    return model, optimizer_of(kind, model, graph, budget)


def outcome(model: nn.Module, optimizer: Any, losses: list[float]) -> dict[str, Any]:
    """What a run came to, with whole weights."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) if dist.is_initialized() else None
    return rank_runs.outcome(model, optimizer, losses, whole)


def whole_run(kind: str) -> dict[str, Any]:
    model, optimizer = make(kind)
    return outcome(model, optimizer, steps(model, optimizer, 0, STEPS))


@contextmanager
def quietly() -> Iterator[None]:
    """Without torch's warning that one process is a single one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def save(folder: Path, model: nn.Module, optimizer: Any) -> None:
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    with quietly():
        dcp.save(state, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(folder: Path, model: nn.Module, optimizer: Any) -> None:
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    with quietly():
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def saved_at(kind: str, stop: int, folder: Path) -> None:
    model, optimizer = make(kind)
    steps(model, optimizer, 0, stop)
    save(folder, model, optimizer)


def resumed_at(kind: str, stop: int, folder: Path) -> dict[str, Any]:
    model, optimizer = make(kind)
    load(folder, model, optimizer)
    assert optimizer.progress()["step"] == stop
    return outcome(model, optimizer, steps(model, optimizer, stop, STEPS))


def whole_runs(rank: int, here: Path, foreign: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"whole": {kind: whole_run(kind) for kind in KINDS}, "resumed": {}, "taken over": {}}
    for kind in ("qasso", "hesso-activation"):
        saved_at(kind, STOP, here / kind)
        found["resumed"][kind] = resumed_at(kind, STOP, here / kind)
        found["taken over"][kind] = resumed_at(kind, STOP, foreign / kind)
    return found


def refusals(rank: int) -> dict[str, str]:
    """What can't work says so before anything is trained."""
    found = {}

    def refused(name: str, call: Any) -> None:
        try:
            call()
        except geta.GetaError as error:
            found[name] = f"{type(error).__name__}: {error}"

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, graph = unsharded("hesso")
    early = optimizer_of("hesso", model, graph, None)
    shard(model)
    refused("made too early", lambda: steps(model, early, 0, 1))
    refused("cric", lambda: geta.HESSOCRIC(torch.optim.SGD(model.parameters(), lr=0.1), graph, schedule=SCHEDULE))
    refused("compact", lambda: geta.compact(model, graph))
    model, graph = unsharded("qasso")
    shard(model)
    refused("budget", lambda: optimizer_of("qasso-budget", model, graph, geta.Budget(bops=0.015)))
    model, graph = unsharded("qasso")
    for module in model.modules():
        if type(module).__name__ == "Quantizer" and module.d.dim():
            fully_shard(module, mesh=mesh)
    refused("quantizers", lambda: optimizer_of("qasso", model, graph, None))
    return found


def switched() -> dict[str, Any]:
    """The optimizer was made before sharding and its parameters were switched afterwards, as accelerate does it."""
    model, graph = unsharded("qasso")
    optimizer = optimizer_of("qasso", model, graph, None)
    old = dict(model.named_parameters())
    shard(model)
    new = {id(old[name]): parameter for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [new[id(parameter)] for parameter in group["params"]]
    return outcome(model, optimizer, steps(model, optimizer, 0, STEPS))


def low_precision(rank: int) -> dict[str, Any]:
    """bf16 in forward and backward passes, float32 masters; a model whose root stays whole after a forward pass without a backward one."""
    model = make_model().float()
    graph = geta.analyze(model, (global_batch(0)[0].float(),))
    geta.quantize(model, weights=(4, 8), activations=(8, 8), calibration=[global_batch(0)[0].float()], exclude=())
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    with torch.no_grad():
        model(my_part(global_batch(0)[0].float())[0])
    optimizer = geta.QASSO(torch.optim.AdamW(model.parameters(), lr=0.01), graph, sparsity=0.5, schedule=SCHEDULE)
    seen = set()
    model[2].register_forward_hook(lambda _m, _a, out: seen.add(str(out.dtype)))
    for step in range(STEPS):
        x, y = my_part(global_batch(step)[0].float(), global_batch(step)[1])
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
        torch.nn.utils.clip_grad_norm_(sharded, 1.0)
        optimizer.step()
    optimizer.check()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"seen": sorted(seen), "dtypes": sorted({str(p.dtype) for p in model.parameters()}), "weights": whole}


def everything(rank: int, here: Path, foreign: Path) -> dict[str, Any]:
    return {**whole_runs(rank, here, foreign), "switched": switched(), "refusals": refusals(rank), "low precision": low_precision(rank)}
