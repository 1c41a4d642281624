"""What a modern training loop puts around an optimizer: mixed precision, scalers, accumulation, clipping, compiled and checkpointed
models, memory formats, schedulers, parameter groups, closures. Each against the plain loop or a reference written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import geta
from geta.optim import HESSO, QASSO, Saliency, Schedule
from geta.quant import quantize, quantizers
from optim_nets import ByHand, Net, batch, net

STEPS = 30
SCHEDULE = Schedule(STEPS, warmup=5, projection=6, joint=12, projection_periods=3, joint_periods=3, initial_bits=8)


def build(kind: str, *, double: bool = False, seed: int = 0, **settings: Any) -> tuple[nn.Module, ByHand, Any]:
    model, graph = net(seed)
    if double:
        model.double()
    base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    if kind == "hesso":
        return model, graph, HESSO(base, graph, schedule=SCHEDULE, sparsity=0.5, **settings)
    batches = [batch(100)[0].to(next(model.parameters()).dtype)]
    quantize(model, weights=(4, 8), activations=(6, 8), calibration=batches, exclude=(), initial_bits=8)
    base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return model, graph, QASSO(base, graph, schedule=SCHEDULE, sparsity=0.5, quant_lr=1e-5, **settings)


def data(step: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    x, y = batch(step)
    return x.to(next(model.parameters()).dtype), y


def loop(model: nn.Module, optimizer: Any, called: Callable[[Tensor], Tensor] | None = None, steps: range = range(STEPS)) -> None:
    """The plain training loop."""
    for step in steps:
        x, y = data(step, model)
        optimizer.zero_grad()
        F.cross_entropy(model(x) if called is None else called(x), y).backward()
        optimizer.step()


def same(one: tuple[nn.Module, Any], two: tuple[nn.Module, Any], tolerance: float = 0.0) -> None:
    """Same groups, bits and weights; both runs keep their promises."""
    for _, optimizer in (one, two):
        optimizer.check()
    assert one[1].progress()["step"] == two[1].progress()["step"]
    assert all(torch.equal(removed, two[1].selection[name]) for name, removed in one[1].selection.items())
    assert getattr(one[1], "bits", None) == getattr(two[1], "bits", None)
    for (name, mine), (_, theirs) in zip(one[0].state_dict().items(), two[0].state_dict().items(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=name)


# mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["hesso", "qasso"])
def test_autocast_keeps_the_promises_and_full_precision_masters(kind, dtype):
    model, _, optimizer = build(kind)
    seen = set()
    model.head.register_forward_hook(lambda _m, _a, out: seen.add(out.dtype))
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert seen == {dtype}
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    optimizer.check()
    assert all(torch.isfinite(tensor).all() for tensor in model.parameters())


def test_autocast_without_constraints_is_the_bare_optimizer():
    found = []
    for wrapped in (True, False):
        model, graph = net()
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        optimizer = QASSO(base, graph, schedule=SCHEDULE, sparsity=0.0) if wrapped else base
        for step in range(12):
            x, y = batch(step)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        found.append(model.state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("kind", ["hesso", "qasso"])
def test_skipped_steps_of_a_scaler_do_not_count(kind, clip):
    """Steps with infinite gradients (in every stage) leave no trace: the plain loop without their batches ends bitwise the same."""
    skipped = {2, 7, 12, 17, 25}
    model, _, optimizer = build(kind)
    model.eval()  # BatchNorm's statistics would see the skipped batches
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=10**6)
    counts = []
    for step in range(STEPS + len(skipped)):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) * (float("inf") if step in skipped else 1.0)
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        counts.append(optimizer.progress()["step"])
    assert [step for step, (a, b) in enumerate(zip([0, *counts], counts, strict=False)) if a == b] == sorted(skipped)
    assert scaler.get_scale() == 2.0 ** (12 - len(skipped))

    plain, _, second = build(kind)
    plain.eval()
    for step in range(STEPS + len(skipped)):
        if step not in skipped:
            x, y = batch(step)
            second.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
            second.step()
    same((model, optimizer), (plain, second))


# accumulation, clipping


@pytest.mark.parametrize("saliency", [None, "fisher", "activation"])
@pytest.mark.parametrize("kind", ["hesso", "qasso"])
def test_accumulated_micro_batches_are_one_step(kind, saliency):
    model, _, optimizer = build(kind, double=True, saliency=saliency)
    plain, _, second = build(kind, double=True, saliency=saliency)
    for one in (model, plain):
        one.eval()  # BatchNorm by its statistics: halves of a batch give the same activations
    loop(plain, second)
    for step in range(STEPS):
        x, y = data(step, model)
        optimizer.zero_grad()
        for half in (slice(0, 8), slice(8, 16)):
            (F.cross_entropy(model(x[half]), y[half]) / 2).backward()
        optimizer.step()
    same((model, optimizer), (plain, second), 1e-9)


def test_saliency_sees_clipped_gradients():
    seen: list[Tensor] = []

    def criterion(groups: Any) -> Tensor:
        seen.append(groups.direction)
        return groups.norm

    model, graph = net()
    optimizer = HESSO(torch.optim.SGD(model.parameters(), lr=0.5), graph, schedule=SCHEDULE, sparsity=0.5, saliency=Saliency(criterion))
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
    assert len(seen) == 3
    assert all(0 < float(direction.norm()) <= 0.5 * 1e-3 * 1.0001 for direction in seen)


# the model: compiled, checkpointed, channels last


@pytest.mark.parametrize("kind", ["hesso", "qasso"])
def test_a_compiled_model_trains_the_same(kind):
    model, _, optimizer = build(kind, double=True)
    plain, _, second = build(kind, double=True)
    torch._dynamo.reset()
    loop(model, optimizer, torch.compile(model, backend="aot_eager"))
    loop(plain, second)
    same((model, optimizer), (plain, second), 1e-9)


@pytest.mark.parametrize("kind", ["hesso", "qasso"])
def test_a_model_converted_after_the_optimizer_was_made(kind):
    """`model.to(...)` gives modules new buffers; those count, not the ones that the optimizer saw first."""
    model, _, optimizer = build(kind, saliency="relative_magnitude")
    old = model.norm.running_mean
    model.double()
    assert model.norm.running_mean is not old
    loop(model, optimizer)
    optimizer.check()
    removed = optimizer.selection["conv"]
    assert removed.any()
    assert torch.equal(model.norm.running_mean == 0, removed)


class Checkpointed(Net):
    """Computes its middle again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))

        def middle(x: Tensor) -> Tensor:
            return F.relu(self.second(F.relu(self.first(x))))

        return self.head(checkpoint(middle, x, use_reentrant=False))


@pytest.mark.parametrize("saliency", [None, "activation"])
@pytest.mark.parametrize("kind", ["hesso", "qasso"])
def test_activation_checkpointing_changes_nothing(kind, saliency):
    model, _, optimizer = build(kind, saliency=saliency)
    model.__class__ = Checkpointed
    plain, _, second = build(kind, saliency=saliency)
    loop(model, optimizer)
    loop(plain, second)
    same((model, optimizer), (plain, second))


@pytest.mark.parametrize("kind", ["hesso", "qasso"])
def test_channels_last_weights(kind):
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.two(F.relu(self.one(x)))).flatten(1))

    found = []
    for memory_format in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(3)
        model = Deep().double()
        graph = geta.analyze(model, (batch(0)[0].double(),))
        if kind == "qasso":
            quantize(model, weights=(4, 8), activations=None, granularity="channel", exclude=(), initial_bits=8)
        model.to(memory_format=memory_format)
        stored = model.two.parametrizations.weight.original if kind == "qasso" else model.two.weight
        assert stored.is_contiguous(memory_format=memory_format)
        base = torch.optim.AdamW(model.parameters(), lr=0.01)
        settings = {"schedule": SCHEDULE, "sparsity": 0.5}
        optimizer = QASSO(base, graph, quant_lr=1e-5, **settings) if kind == "qasso" else HESSO(base, graph, **settings)
        loop(model, optimizer, lambda x, model=model, kind=memory_format: model(x.to(memory_format=kind)))
        found.append((model, optimizer))
    same(*found, 1e-9)


# a reference written by hand: the base optimizer's own step, then what the joint stage does to redundant and removed rows


class Reference:
    """HESSO's rule, spelled out on a copy of the model that the bare base optimizer trains."""

    def __init__(self, model: nn.Module, graph: ByHand, optimizer: HESSO, base: Callable[[nn.Module], Any]) -> None:
        self.graph, self.optimizer = graph, optimizer
        self.model = copy.deepcopy(model)
        self.base = base(self.model)

    @torch.no_grad()
    def follow(self, redundant: dict[str, Tensor], removed: dict[str, Tensor], step: int) -> None:
        tensors = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        for family in self.graph.families:
            for member in family.zeroed:
                tensor = tensors[member.param]
                tensor[removed[family.name]] = 0
                if SCHEDULE.stage_at(step) == "joint" and isinstance(tensor, nn.Parameter):
                    _, k, length = SCHEDULE_OF_HESSO.joint_at(step)
                    tensor[redundant[family.name]] *= (length - k - 1) / (length - k)

    def compare(self, model: nn.Module) -> None:
        for (name, mine), (_, theirs) in zip(model.named_parameters(), self.model.named_parameters(), strict=True):
            assert torch.equal(mine, theirs), name


SCHEDULE_OF_HESSO = Schedule(STEPS, warmup=11, projection=0, joint=12, joint_periods=3)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Weights and biases with their own learning rate and weight decay; the head is frozen."""
    model.head.weight.requires_grad_(False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if p.dim() > 1], "lr": 0.02, "weight_decay": 0.2},
        {"params": [p for name, p in named if p.dim() == 1], "lr": 0.005, "weight_decay": 0.0},
    ]


BASES: dict[str, Callable[[nn.Module], Any]] = {
    "groups": lambda model: torch.optim.AdamW(groups_of(model)),
    "momentum": lambda model: torch.optim.SGD(groups_of(model), momentum=0.9, nesterov=True),
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=3),
    "lbfgs-search": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_hesso_is_the_base_optimizer_plus_the_rule(kind, scheduled):
    """Parameter groups, closures, schedulers that change the rate in every step, a layer without gradients in some steps."""
    model, graph = net()
    optimizer = HESSO(BASES[kind](model), graph, schedule=SCHEDULE, sparsity=0.5)
    reference = Reference(model, graph, optimizer, BASES[kind])
    chosen = (
        [torch.optim.lr_scheduler.CosineAnnealingLR(one, 9, eta_min=0.1 * (kind == "lbfgs-search")) for one in (optimizer, reference.base)]
        if scheduled
        else []
    )
    for step in range(STEPS):
        x, y = batch(step)

        def loss_of(one: nn.Module, base: Any, x: Tensor = x, y: Tensor = y, step: int = step) -> Tensor:
            base.zero_grad()
            hidden = F.relu(one.norm(one.conv(x))).mean((2, 3))
            hidden = F.relu(one.first(hidden))
            hidden = hidden.repeat(1, 2)[:, :10] if step % 4 == 1 else F.relu(one.second(hidden))  # no gradient for `second`
            loss = F.cross_entropy(one.head(hidden), y)
            loss.backward()
            return loss

        before = optimizer.redundant
        if kind.startswith("lbfgs"):
            losses = [
                optimizer.step(lambda: loss_of(model, optimizer)),
                reference.base.step(lambda: loss_of(reference.model, reference.base)),
            ]
        else:
            losses = [loss_of(model, optimizer), loss_of(reference.model, reference.base)]
            optimizer.step()
            reference.base.step()
        assert float(losses[0].detach()) == float(losses[1].detach())
        for one in chosen:
            one.step()
        last = SCHEDULE.stage_at(step) == "joint" and SCHEDULE_OF_HESSO.joint_at(step).k == 3
        reference.follow(before if last else optimizer.redundant, optimizer.selection, step)
        reference.compare(model)
    optimizer.check()


def test_quantizers_have_their_own_rate_beside_schedulers_and_groups():
    """A scheduler moves all rates alike; quantizers keep their own and no weight decay."""
    model, graph = net()
    quantize(model, weights=(4, 8), activations=None, exclude=(), initial_bits=8)
    optimizer = QASSO(torch.optim.AdamW(groups_of_quantized(model)), graph, schedule=SCHEDULE, sparsity=0.5, quant_lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.02, 0.2), (0.005, 0.0), (1e-3, 0.0)]
    mine = {id(p) for quantizer in quantizers(model).values() for p in quantizer.parameters() if p.requires_grad}
    assert {id(p) for p in optimizer.param_groups[2]["params"]} == mine
    for step in range(STEPS):
        loop(model, optimizer, steps=range(step, step + 1))
        scheduler.step()
        share = 1 - (step + 1) / STEPS
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02 * share, 0.005 * share, 1e-3 * share], abs=1e-12)
    optimizer.check()


def groups_of_quantized(model: nn.Module) -> list[dict[str, Any]]:
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if p.dim() > 1], "lr": 0.02, "weight_decay": 0.2},
        {"params": [p for name, p in named if p.dim() <= 1], "lr": 0.005, "weight_decay": 0.0},
    ]
