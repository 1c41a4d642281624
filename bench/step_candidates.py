"""Ways to train one network, for `bench.step_overhead`: plainly, with geta in each of its stages, and with other tools' quantizers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import geta
from bench.step_nets import Task

PLAIN = "plain"
KINDS = {"w": "weights", "wa": "weights + activations"}
STAGES = ("warm-up", "projection", "joint", "joint, all at once", "cool-down")
_ENDLESS = 1_000_000
_SETTLE = 3
_SCHEDULES = {
    "warm-up": geta.Schedule(_ENDLESS, warmup=0.9, projection=1, joint=1),
    "projection": geta.Schedule(_ENDLESS, warmup=0, projection=0.9, joint=1),
    "joint": geta.Schedule(_ENDLESS, warmup=0, projection=1, joint=0.9),
    "joint, all at once": geta.Schedule(_ENDLESS, warmup=0, projection=1, joint=0.9, joint_periods=1),
    "cool-down": geta.Schedule(_ENDLESS, warmup=0, projection=1, joint=1),
}


@dataclass(frozen=True)
class Candidate:
    """One way to train: `whole` does a training step; `update` only the optimizer's part, `base` only the base optimizer's."""

    whole: Callable[[], object]
    update: Callable[[], object]
    base: Callable[[], object]


@dataclass(frozen=True)
class Peer:
    """Another tool. module: what it is imported as. kind: of `KINDS`. convolutions: whether it quantizes them.

    prepare: gives the network that is trained, from the plain one and one batch.
    """

    name: str
    module: str
    kind: str
    convolutions: bool
    prepare: Callable[[nn.Module, Task, dict[str, Tensor]], nn.Module]

    @property
    def installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.module) is not None


def names(task: Task) -> list[str]:
    """All candidates of a network by name, `plain` first, peers that do something else with it left out."""
    stages = [f"geta {kind}, {stage}" for kind in KINDS for stage in STAGES]
    return [PLAIN, *stages, *(peer.name for peer in PEERS if suits(peer, task))]


def suits(peer: Peer, task: Task) -> bool:
    """Whether the tool quantizes this network's main layers in the way that is compared here."""
    if peer.prepare is _torchao_pt2e:
        return task.convolutional
    return peer.convolutions or not task.convolutional


def is_peer(name: str) -> bool:
    """Whether the candidate is another tool."""
    return any(peer.name == name for peer in PEERS)


def missing(name: str) -> bool:
    """Whether the candidate is a tool that isn't installed."""
    return any(peer.name == name and not peer.installed for peer in PEERS)


def build(name: str, task: Task, share: float = 1.0, *, settle: bool = True) -> Candidate:
    """Make a candidate and lead it to its stage.

    share: of the usual batch size. settle: do the first steps there, which may differ; else the next step is the stage's first.
    """
    geta.seed_everything(0)
    model, inputs = task.build(), task.inputs(share)
    peer = next((peer for peer in PEERS if peer.name == name), None)
    if peer is not None:
        model = peer.prepare(model, task, inputs)
    optimizer: Optimizer
    optimizer = _geta(name, task, model, inputs) if name.startswith("geta ") else task.optimizer(model.parameters())

    def whole() -> None:
        optimizer.zero_grad()
        task.loss(call(model, task, inputs)).backward()
        optimizer.step()

    stage = name.split(", ")[1] if name.startswith("geta ") else ""
    if isinstance(optimizer, geta.QASSO) and stage == "joint":
        _reach_last_period(optimizer, whole)
    for _ in range(_SETTLE if settle or stage != "joint" else 0):
        whole()
    if isinstance(optimizer, geta.QASSO):
        if optimizer.stage != stage:
            raise RuntimeError(f"the optimizer is in stage {optimizer.stage}, not in {stage}: the schedule of this benchmark is wrong")
        return Candidate(whole, optimizer.step, optimizer.base.step)
    return Candidate(whole, optimizer.step, optimizer.step)


def call(model: nn.Module, task: Task, inputs: dict[str, Tensor]) -> Any:
    """The network's output. Images go by position, as containers name their argument otherwise than networks do."""
    return model(*inputs.values()) if task.convolutional else model(**inputs)


def _geta(name: str, task: Task, model: nn.Module, inputs: dict[str, Tensor]) -> geta.QASSO:
    kind, _, stage = name.removeprefix("geta ").partition(", ")
    few = {key: tensor[:2] for key, tensor in inputs.items()}
    graph = geta.analyze(model, tuple(few.values())) if task.convolutional else geta.analyze(model, kwargs=few)
    if kind == "w":
        geta.quantize(model, weights=geta.Bits(4, 8), activations=None)
    else:
        batch = tuple(inputs.values()) if task.convolutional else inputs
        geta.quantize(model, weights=geta.Bits(4, 8), activations=geta.Bits(8, 8), calibration=[batch])
    return geta.QASSO(task.optimizer(model.parameters()), graph, sparsity=0.5, schedule=_SCHEDULES[stage])


def _reach_last_period(optimizer: geta.QASSO, whole: Callable[[], None]) -> None:
    """In the joint stage, go on to the last period: most groups are removed by then, and the rest is being forgotten.

    Only the steps that decide something are done, the first and the last of each period; checkpoints lead from one to the next.
    """
    while optimizer.stage != "joint":
        whole()
    schedule = optimizer.schedule
    while True:
        here = schedule.joint_at(optimizer.progress()["step"])
        if here.period == schedule.num_joint_periods - 1:
            return
        whole()
        _jump(optimizer, here.length - 2)
        whole()


def _jump(optimizer: geta.QASSO, steps: int) -> None:
    if steps > 0:
        state = optimizer.state_dict()
        state["geta"]["step"] += steps
        optimizer.load_state_dict(state)


def _torchao(weights_only: bool) -> Callable[[nn.Module, Task, dict[str, Tensor]], nn.Module]:
    """torchao's fake quantizers on linear layers, 8 bits: weights per channel, activations per token."""

    def prepare(model: nn.Module, _task: Task, _inputs: dict[str, Tensor]) -> nn.Module:
        from torchao.quantization import quantize_
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        weights = IntxFakeQuantizeConfig(torch.int8, "per_channel")
        activations = None if weights_only else IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        quantize_(model, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
        return model

    return prepare


def _torchao_pt2e(model: nn.Module, _task: Task, inputs: dict[str, Tensor]) -> nn.Module:
    """torchao's quantization of exported graphs, with fake quantizers and observers for x86, BatchNorm folded into convolutions."""
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    exported = torch.export.export(model, tuple(inputs.values()), strict=False).module()
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(exported, quantizer)
    move_exported_model_to_train(prepared)
    found: nn.Module = prepared
    return found


def _brevitas(model: nn.Module, _task: Task, _inputs: dict[str, Tensor]) -> nn.Module:
    """brevitas' layers with 8-bit weights and activations; the activations' scales are learned."""
    from brevitas.graph.quantize import layerwise_quantize

    quantized: nn.Module = layerwise_quantize(model)
    return quantized.train()


def _nncf(model: nn.Module, task: Task, inputs: dict[str, Tensor]) -> nn.Module:
    """nncf's compiled fake quantizers with 8-bit weights and activations, learned ranges."""
    import nncf

    quantized: nn.Module = nncf.quantize(
        model, nncf.Dataset([next(iter(inputs.values())) if task.convolutional else inputs]), subset_size=1
    )
    return quantized.train()


PEERS = (
    Peer("torchao QAT w", "torchao", "w", False, _torchao(weights_only=True)),
    Peer("torchao QAT wa", "torchao", "wa", False, _torchao(weights_only=False)),
    Peer("torchao pt2e QAT wa", "torchao", "wa", True, _torchao_pt2e),
    Peer("brevitas wa", "brevitas", "wa", True, _brevitas),
    Peer("nncf wa", "nncf", "wa", True, _nncf),
)
