"""Training runs that exist once on one process and once on two that share the same global batch; importable by spawned processes."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import geta
from geta.quant import quantizers

STEPS = 44
SCHEDULE = geta.Schedule(STEPS, warmup=6, projection=6, joint=26, projection_periods=3, joint_periods=3, initial_bits=8)


def make_model() -> nn.Module:
    """Two convolutions and two linear layers in double precision, without statistics over the batch."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 9, 3), nn.ReLU(), nn.Conv2d(9, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 3)]
    return nn.Sequential(*layers).double()


def global_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return x, x.view(16, 3, 12).mean(2).argmax(1)


def my_part(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """This rank's share of a global batch; all of it on one process."""
    if not dist.is_initialized():
        return list(tensors)
    return [tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in tensors]


def make(kind: str) -> tuple[nn.Module, Any]:
    """The model and its optimizer."""
    model = make_model()
    graph = geta.analyze(model, (global_batch(0)[0],))
    settings: dict[str, Any] = {"schedule": SCHEDULE, "sparsity": 0.5}
    if kind.startswith("qasso"):
        batches = [global_batch(1000 + i)[0] for i in range(4)]
        if dist.is_initialized():
            batches = batches[dist.get_rank() :: dist.get_world_size()]
        geta.quantize(model, weights=(3, 6), activations=(6, 8), calibration=batches, granularity="channel", exclude=(), initial_bits=8)
        if kind == "qasso-outgrown":
            with torch.no_grad():
                for quantizer in quantizers(model).values():
                    if quantizer.kind == "activation":
                        quantizer.q_m.mul_(0.1)
                        quantizer.d.mul_(0.1)
        settings["quant_lr"] = 1e-5  # at a high rate tiny differences of step sizes grow in every step
    if kind == "qasso-budget":
        settings = {**settings, "sparsity": None, "target": geta.Budget(bops=0.015, params=0.4)}
    if kind == "qasso-momentum":
        settings["forgetting"] = "descent"
        return model, geta.QASSO(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), graph, **settings)
    base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    if kind.startswith("qasso"):
        return model, geta.QASSO(base, graph, **settings)
    if kind == "cric":
        return model, geta.HESSOCRIC(base, graph, **settings, max_cycles=2, probe_weight=0.5)
    saliency = {"hesso": None, "hesso-fisher": "fisher", "hesso-activation": "activation"}[kind]
    return model, geta.HESSO(base, graph, **settings, saliency=saliency)


def steps(model: nn.Module, optimizer: Any, first: int, last: int) -> list[float]:
    """Steps `first` .. `last - 1` under DistributedDataParallel, where there are ranks."""
    return trained(DistributedDataParallel(model) if dist.is_initialized() else model, optimizer, first, last)


def trained(model: nn.Module, optimizer: Any, first: int, last: int) -> list[float]:
    """Steps `first` .. `last - 1` as every training loop has them; the losses of the global batches."""
    losses = []
    for step in range(first, last):
        x, y = my_part(*global_batch(step))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if isinstance(optimizer, geta.HESSOCRIC):
            optimizer.step(loss=loss)
        else:
            optimizer.step()
        shown = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(shown)
            shown /= dist.get_world_size()
        losses.append(shown.item())
    return losses


def outcome(model: nn.Module, optimizer: Any, losses: list[float], weights: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a run came to. weights: the whole state of a model that is sharded."""
    optimizer.check()
    found = {
        "losses": losses,
        "selection": optimizer.selection,
        "weights": {name: tensor.clone() for name, tensor in (weights or model.state_dict()).items()},
        "signed": {name: quantizer.signed for name, quantizer in quantizers(model).items()},
    }
    return {**found, "bits": optimizer.bits} if isinstance(optimizer, geta.QASSO) else found


def same(one: dict[str, Any], two: dict[str, Any], tolerance: float) -> None:
    """Same groups and bits; losses and weights equal to `tolerance`."""
    assert one["selection"].keys() == two["selection"].keys()
    for name, removed in one["selection"].items():
        assert torch.equal(removed, two["selection"][name]), name
    assert one["signed"] == two["signed"]
    assert one.get("bits") == two.get("bits")
    assert one["losses"] == pytest.approx(two["losses"], rel=tolerance, abs=0)
    assert one["weights"].keys() == two["weights"].keys()
    for name, tensor in one["weights"].items():
        torch.testing.assert_close(tensor, two["weights"][name], rtol=tolerance, atol=tolerance, msg=name)


def whole_run(kind: str) -> dict[str, Any]:
    model, optimizer = make(kind)
    return outcome(model, optimizer, steps(model, optimizer, 0, STEPS))


def state_of(model: nn.Module, optimizer: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file.getvalue()


def saved_at(kind: str, stop: int) -> bytes:
    """The first `stop` steps, and what a checkpoint holds then."""
    model, optimizer = make(kind)
    steps(model, optimizer, 0, stop)
    return state_of(model, optimizer)


def resumed_at(kind: str, stop: int, state: bytes) -> dict[str, Any]:
    """The rest of a run from a checkpoint."""
    model, optimizer = make(kind)
    saved = torch.load(io.BytesIO(state), weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return outcome(model, optimizer, steps(model, optimizer, stop, STEPS))


def whole_runs(rank: int, kinds: list[str], stops: dict[str, int], foreign: dict[str, bytes]) -> dict[str, Any]:
    """On two ranks: all runs, runs cut at `stops` and resumed from rank 0's checkpoint, and runs that began on one process."""
    found: dict[str, Any] = {"whole": {kind: whole_run(kind) for kind in kinds}}
    saved = {kind: saved_at(kind, stop) for kind, stop in stops.items()}
    found["states"] = {kind: torch.frombuffer(bytearray(state), dtype=torch.uint8) for kind, state in saved.items()}
    found["resumed"] = {}
    for kind, stop in stops.items():
        length = torch.tensor(len(saved[kind]))
        dist.broadcast(length, 0)
        state = found["states"][kind].clone() if rank == 0 else torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(state, 0)
        found["resumed"][kind] = resumed_at(kind, stop, state.numpy().tobytes())
    found["taken over"] = {kind: resumed_at(kind, stops[kind], state) for kind, state in foreign.items()}
    return found


def disagreement(rank: int) -> str:
    """Rank 1 has another sparsity: what every rank hears of it."""
    model = make_model()
    graph = geta.analyze(model, (global_batch(0)[0],))
    optimizer = geta.HESSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, sparsity=0.5 - 0.2 * rank, schedule=SCHEDULE)
    try:
        steps(model, optimizer, 0, STEPS)
    except geta.GetaError as error:
        return f"{optimizer.progress()['step']}: {error}"
    return "nothing"


def calibrations(rank: int) -> list[str]:
    """Data that only one rank has: unseen or unusable inputs are the same error everywhere."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    batches = [torch.full((5, 4), float("nan"))] if rank else [torch.randn(5, 4)]
    try:
        geta.quantize(model, calibration=batches, exclude=())
    except geta.ConfigError as error:
        return [str(error)]
    return []


def everything(rank: int, *arguments: Any) -> dict[str, Any]:
    return {**whole_runs(rank, *arguments), "disagreement": disagreement(rank), "calibrations": calibrations(rank)}
