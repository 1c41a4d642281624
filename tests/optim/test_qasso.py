"""QASSO over real torch optimizers: identity when switched off, constraints met at every step, exact results at the end."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from geta.errors import ConfigError, GetaError
from geta.graph import analyze
from geta.graph.families import Family, Member
from geta.optim import QASSO, Schedule
from geta.quant import Bits, quantize, quantizers

STEPS = 24
SCHEDULE = Schedule(STEPS, warmup=4, projection=4, joint=8, projection_periods=1, joint_periods=2)


class Net(nn.Module):
    """Convolutions with BatchNorm, a residual join and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.hidden, self.head = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.outer(F.relu(self.inner(x))))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


class Graph:
    """A dependency graph of `Net` written by hand: analysing the same network for every test would only take time."""

    def __init__(self, model: nn.Module, families: list[Family] | None = None) -> None:
        self.model = model
        self.families = (
            families
            if families is not None
            else [
                family(
                    "stem",
                    8,
                    ["stem.weight", "norm.weight", "norm.bias", "norm.running_mean", "outer.weight", "outer.bias"],
                    ["inner.weight", "hidden.weight"],
                ),
                family("inner", 6, ["inner.weight", "inner.bias"], ["outer.weight"]),
                family("hidden", 10, ["hidden.weight", "hidden.bias"], ["head.weight"]),
            ]
        )


def family(name: str, size: int, produced: list[str], consumed: list[str], *, zero: bool = False) -> Family:
    index = torch.arange(size)[:, None]
    members = [Member(param, 0, index, "producer", True) for param in produced]
    members += [Member(param, 1, index, "consumer", zero) for param in consumed]
    return Family(name, "channels", size, True, "", tuple(members))


def batches(count: int = STEPS, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(count)]


def quantized(seed: int = 0, **settings) -> Net:
    torch.manual_seed(seed)
    model = Net()
    calibration = None if settings.get("activations", True) is None else [batches(1)[0][0]]
    quantize(model, **{"weights": (4, 8), "activations": (8, 8), "calibration": calibration, "exclude": (), **settings})
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data, after=lambda: None) -> None:
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()


BASES = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01),
}


def two_groups(model: nn.Module) -> list[dict]:
    parameters = list(model.parameters())
    return [{"params": parameters[:3], "lr": 0.05}, {"params": parameters[3:]}]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", sorted(BASES))
def test_switched_off_it_is_bitwise_the_base_optimizer(name, grouped):
    torch.manual_seed(0)
    plain = Net()
    wrapped = copy.deepcopy(plain)
    bare = BASES[name](two_groups(plain) if grouped else plain.parameters())
    optimizer = QASSO(
        BASES[name](two_groups(wrapped) if grouped else wrapped.parameters()), Graph(wrapped), sparsity=0.0, schedule=SCHEDULE
    )
    train(plain, bare, batches(10))
    train(wrapped, optimizer, batches(10))
    for (key, one), (_, two) in zip(plain.state_dict().items(), wrapped.state_dict().items(), strict=True):
        assert torch.equal(one, two), key


@pytest.mark.parametrize("base", [torch.optim.LBFGS, torch.optim.SGD])
def test_closures_are_called_as_the_base_calls_them(base):
    torch.manual_seed(0)
    plain = Net()
    wrapped = copy.deepcopy(plain)
    optimizers = {plain: base(plain.parameters(), lr=0.05)}
    optimizers[wrapped] = QASSO(base(wrapped.parameters(), lr=0.05), Graph(wrapped), sparsity=0.0, schedule=SCHEDULE)
    calls = {plain: 0, wrapped: 0}
    losses = {plain: [], wrapped: []}
    for model, optimizer in optimizers.items():
        for x, y in batches(10):

            def closure(model=model, optimizer=optimizer, x=x, y=y):
                calls[model] += 1
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            losses[model].append(optimizer.step(closure).item())
    assert calls[plain] == calls[wrapped] >= 10
    assert losses[plain] == losses[wrapped]
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), wrapped.parameters(), strict=True))


def test_warm_up_is_the_base_optimizer_whatever_comes_later():
    torch.manual_seed(0)
    plain = Net()
    wrapped = copy.deepcopy(plain)
    optimizer = QASSO(BASES["adamw"](wrapped.parameters()), Graph(wrapped), sparsity=0.5, schedule=Schedule(20, warmup=10))
    train(plain, BASES["adamw"](plain.parameters()), batches(10))
    train(wrapped, optimizer, batches(10))
    assert all(torch.equal(one, two) for one, two in zip(plain.parameters(), wrapped.parameters(), strict=True))


@pytest.mark.parametrize("forgetting", ["descent", "blend", "uniform"])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_whole_run_meets_both_constraints_exactly(name, forgetting):
    model = quantized()
    optimizer = QASSO(BASES[name](model.parameters()), Graph(model), sparsity=0.5, schedule=SCHEDULE, forgetting=forgetting)
    found = quantizers(model)
    seen = []

    def inspect() -> None:
        step = optimizer.progress()["step"] - 1
        stage = SCHEDULE.stage_at(step)
        seen.append(stage)
        for quantizer in found.values():
            width = quantizer.bit_width().detach()
            upper = SCHEDULE.upper_bits_at(step, quantizer.bits.upper)
            assert (width >= quantizer.bits.lower - 1e-3).all()
            assert (width <= upper + 1e-3).all(), (quantizer.name, stage)
            assert all(bool(p.isfinite().all()) for p in quantizer.parameters())
            if step + 1 >= SCHEDULE.cooldown_start:
                assert (width - width.round()).abs().max() < 1e-3
        zero = optimizer._index.zero_groups()
        assert int(zero.sum()) == optimizer.progress()["pruned_groups"]
        assert int(zero.sum()) == {"joint": (step >= 11) * 6 + (step >= 15) * 6, "cool-down": 12}.get(stage, 0)

    train(model, optimizer, batches(), inspect)
    optimizer.check()
    assert [seen.count(stage) for stage in ("warm-up", "projection", "joint", "cool-down")] == [4, 4, 8, 8]
    assert optimizer.target_groups == 12
    removed = optimizer.selection
    assert model.norm.running_mean[removed["stem"]].abs().sum() == 0
    assert model.head.weight.abs().sum(0).min() > 0, "consumers that need not be zero are left alone"
    assert all(value == int(value) for value in optimizer.bits.values())
    assert any("12 of 24 groups removed, 12 wanted" in line for line in optimizer.report())


@pytest.mark.parametrize("settings", [{"granularity": "channel"}, {"nonlinear": True}, {"activations": None}, {"weights": (2, 3)}])
def test_other_quantizers(settings):
    model = quantized(**settings)
    optimizer = QASSO(BASES["adamw"](model.parameters()), Graph(model), sparsity=0.4, schedule=SCHEDULE)
    train(model, optimizer, batches())
    optimizer.check()
    for name, quantizer in quantizers(model).items():
        widths = quantizer.bit_width().detach()
        assert (widths - optimizer.bits[name]).abs().max() < 1e-3, "one integer for all channels of a tensor"


def test_pruning_without_quantizers_and_quantizing_without_pruning():
    torch.manual_seed(0)
    model = Net()
    optimizer = QASSO(BASES["momentum"](model.parameters()), Graph(model), sparsity=0.5, schedule=SCHEDULE)
    train(model, optimizer, batches())
    optimizer.check()
    assert optimizer.bits == {}
    assert optimizer.progress()["mean_bits"] is None
    model = quantized()
    optimizer = QASSO(BASES["momentum"](model.parameters()), Graph(model), sparsity=0.0, schedule=SCHEDULE)
    train(model, optimizer, batches())
    optimizer.check()
    assert optimizer.progress()["pruned_groups"] == 0


def test_with_an_analysed_graph_and_alignment():
    torch.manual_seed(0)
    model = Net()
    graph = analyze(model, (torch.randn(2, 1, 6, 6),))
    quantize(model, weights=(4, 8), activations=None, exclude=())
    optimizer = QASSO(BASES["adamw"](model.parameters()), graph, sparsity=0.5, schedule=SCHEDULE, multiple_of=4)
    train(model, optimizer, batches())
    optimizer.check()
    kept = {name: int((~remove).sum()) for name, remove in optimizer.selection.items()}
    sizes = {one.name: one.size for one in graph.prunable_families}
    assert sum(sizes.values()) - sum(kept.values()) == optimizer.target_groups > 0
    assert all(count == sizes[name] or count % 4 == 0 for name, count in kept.items())
    assert graph.zero_groups(model).keys() >= kept.keys()


def test_zeroed_consumers_and_groups_of_two_families_in_one_tensor():
    model = quantized(activations=None)
    families = [
        family("inner", 6, ["inner.weight", "inner.bias"], ["outer.weight"], zero=True),
        family("outer", 8, ["outer.weight", "outer.bias"], [], zero=True),
    ]
    optimizer = QASSO(BASES["momentum"](model.parameters()), Graph(model, families), sparsity=0.5, schedule=SCHEDULE)
    train(model, optimizer, batches())
    optimizer.check()
    assert model.outer.weight[:, optimizer.selection["inner"]].abs().sum() == 0


def test_frozen_parameters_are_zeroed_with_their_group_and_unused_ones_stay():
    torch.manual_seed(0)
    model = Net()
    model.stem.weight.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(3))
    frozen = model.stem.weight.clone()
    optimizer = QASSO(BASES["momentum"](model.parameters()), Graph(model), sparsity=0.75, schedule=SCHEDULE)
    train(model, optimizer, batches())
    optimizer.check()
    removed = optimizer.selection["stem"]
    assert removed.any()
    assert model.stem.weight[removed].abs().sum() == 0
    assert torch.equal(model.stem.weight[~removed], frozen[~removed])
    assert torch.equal(model.unused, torch.ones(3))


def test_quantizer_parameters_get_their_own_group():
    model = quantized(nonlinear=True)
    mine = [p for quantizer in quantizers(model).values() for p in quantizer.parameters()]
    base = torch.optim.AdamW(two_groups(model), lr=0.01, weight_decay=0.1)
    optimizer = QASSO(base, Graph(model), schedule=SCHEDULE, quant_lr=2e-4)
    assert optimizer.param_groups is base.param_groups
    assert len(base.param_groups) == 3
    own = base.param_groups[-1]
    assert {id(p) for p in own["params"]} == {id(p) for p in mine}
    assert (own["lr"], own["weight_decay"]) == (2e-4, 0.0)
    everything = [id(p) for group in base.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def test_quantizers_missing_from_the_base_and_named_parameters():
    model = quantized()
    mine = {id(p) for quantizer in quantizers(model).values() for p in quantizer.parameters()}
    named = [(name, p) for name, p in model.named_parameters() if id(p) not in mine]
    base = torch.optim.SGD(named, lr=0.1)
    optimizer = QASSO(base, Graph(model), schedule=SCHEDULE)
    assert optimizer.param_groups[-1]["param_names"][0].endswith(("q_m", ".d"))
    assert "weight_decay" in optimizer.param_groups[-1]
    train(model, optimizer, batches())
    optimizer.check()


def test_explicit_bits_replace_those_of_the_quantizers():
    model = quantized()
    optimizer = QASSO(BASES["adamw"](model.parameters()), Graph(model), weight_bits=Bits(3, 5), activation_bits=6, schedule=SCHEDULE)
    train(model, optimizer, batches())
    optimizer.check()
    for quantizer in quantizers(model).values():
        assert quantizer.bits == (Bits(3, 5) if quantizer.kind == "weight" else Bits(6, 6))
        assert quantizer.bits.lower <= optimizer.bits[quantizer.name] <= quantizer.bits.upper


def test_learning_rate_schedulers_and_gradient_scalers_work():
    model = quantized()
    optimizer = QASSO(BASES["momentum"](model.parameters()), Graph(model), schedule=SCHEDULE)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for x, y in batches():
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    optimizer.check()
    assert all(group["lr"] == pytest.approx(0.0, abs=1e-9) for group in optimizer.param_groups)


def test_groups_added_later_belong_to_the_base():
    torch.manual_seed(0)
    model = Net()
    base = torch.optim.SGD(model.hidden.parameters(), lr=0.1)
    optimizer = QASSO(base, Graph(model), schedule=SCHEDULE)
    optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.3})
    assert [group["lr"] for group in base.param_groups] == [0.1, 0.3]
    before = model.head.weight.clone()
    train(model, optimizer, batches(1))
    assert not torch.equal(before, model.head.weight)
    optimizer.zero_grad()
    assert model.head.weight.grad is None


def test_progress_is_plain_data_and_moves_on():
    model = quantized()
    optimizer = QASSO(BASES["adamw"](model.parameters()), Graph(model), schedule=SCHEDULE)
    assert optimizer.stage == "warm-up"
    history = [optimizer.progress()]
    train(model, optimizer, batches(), lambda: history.append(optimizer.progress()))
    assert [entry["step"] for entry in history] == list(range(STEPS + 1))
    assert [entry["pruned_groups"] + entry["groups_left"] for entry in history] == [12] * (STEPS + 1)
    assert (history[9]["redundant_groups"], history[13]["redundant_groups"], history[-1]["redundant_groups"]) == (6, 6, 0)
    assert (history[0]["upper_bound"], history[-1]["upper_bound"]) == (16.0, 8.0)
    assert history[-1]["group_sparsity"] == 0.5
    assert {type(value) for entry in history for value in entry.values()} <= {int, float, str, type(None)}


def test_a_missed_target_is_noted():
    torch.manual_seed(0)
    model = Net()
    optimizer = QASSO(BASES["sgd"](model.parameters()), Graph(model), sparsity=0.9, schedule=SCHEDULE, multiple_of=4)
    assert optimizer.target_groups == 4 + 2 + 6
    assert "21 of 24 groups were to be removed; 12 is the nearest possible" in optimizer.notes[0]
    assert optimizer.notes[0] in optimizer.report()
    small = QASSO(BASES["sgd"](model.parameters()), Graph(model), sparsity=0.01, schedule=SCHEDULE)
    assert "less than one group" in small.notes[0]


def test_numbers_that_stop_being_finite_are_reported_at_the_next_period():
    torch.manual_seed(0)
    model = Net()
    optimizer = QASSO(BASES["sgd"](model.parameters()), Graph(model), schedule=SCHEDULE)
    train(model, optimizer, batches(8))
    with torch.no_grad():
        model.inner.weight[0] = float("nan")
    with pytest.raises(GetaError, match=r"before step 8 \(joint\) 1 parameters are no longer finite \(first: 'inner.weight'\).*checkpoint"):
        train(model, optimizer, batches(5))


def test_check_says_what_is_wrong():
    model = quantized()
    optimizer = QASSO(BASES["momentum"](model.parameters()), Graph(model), schedule=SCHEDULE)
    train(model, optimizer, batches(10))
    with pytest.raises(GetaError, match="stopped at step 10, in joint; targets are met from step 16"):
        optimizer.check()
    train(model, optimizer, batches(14))
    removed = optimizer.selection["hidden"]
    with torch.no_grad():
        model.hidden.bias[removed.nonzero()[0]] = 1.0
    with pytest.raises(GetaError, match="11 groups are zero, but exactly 12 should be"):
        optimizer.check()
    with torch.no_grad():
        model.hidden.bias[removed] = 0.0
        quantizers(model)["head.weight"].d.mul_(1.5)
    with pytest.raises(GetaError, match=r"'head.weight' has \d\.\d+ bits where"):
        optimizer.check()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.0}, r"sparsity is 1.0: it must be in \[0, 1\)"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"quant_lr": -1.0}, "quant_lr"),
        ({"weight_bits": (4, 8)}, r"no weight quantizers: call geta.quantize\(model, ...\) first"),
        ({"activation_bits": (8, 8)}, "no activation quantizers: call geta.quantize"),
        ({"schedule": "long"}, "give a Schedule"),
        ({"schedule": 0}, "total_steps is 0"),
        ({"schedule": Schedule(10, joint=0)}, "no joint stage"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"saliency": "size"}, "no criterion named 'size'"),
        ({"forgetting": "never"}, "forgetting is 'never'"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    model = Net()
    with pytest.raises(ConfigError, match=words):
        QASSO(BASES["sgd"](model.parameters()), Graph(model), **{"schedule": SCHEDULE, **settings})


def test_nothing_prunable_quotes_the_reasons():
    frozen = [
        Family(f"f{i}", "channels", 2, False, reason, ()) for i, reason in enumerate(["reaches the model output"] * 2 + ["is an input"])
    ]
    model = Net()
    with pytest.raises(ConfigError, match=r"no prunable group: reaches the model output \(2 families\); is an input \(1 families\)"):
        QASSO(BASES["sgd"](model.parameters()), Graph(model, frozen), schedule=SCHEDULE)
    optimizer = QASSO(BASES["sgd"](model.parameters()), Graph(model, frozen), sparsity=0.0, schedule=30)
    assert optimizer.schedule == Schedule(30)


def test_unusable_base_optimizers_are_refused():
    model = quantized()
    with pytest.raises(ConfigError, match="LBFGS holds a single parameter group"):
        QASSO(torch.optim.LBFGS(model.parameters()), Graph(model), schedule=SCHEDULE)
    with pytest.raises(ConfigError, match="base is list"):
        QASSO(list(model.parameters()), Graph(model), schedule=SCHEDULE)
    once = QASSO(torch.optim.SGD(model.parameters(), lr=0.1), Graph(model), schedule=SCHEDULE)
    with pytest.raises(ConfigError, match="already a QASSO"):
        QASSO(once, Graph(model), schedule=SCHEDULE)
    with pytest.raises(ConfigError, match=r"above schedule.initial_bits = 6"):
        QASSO(torch.optim.SGD(model.parameters(), lr=0.1), Graph(model), schedule=Schedule(STEPS, initial_bits=6))


class NoHostSync(TorchDispatchMode):
    """Fails on every operator that waits for the device or whose output shape depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("forgetting", ["descent", "blend", "uniform"])
def test_steps_inside_a_period_never_wait_for_the_device(forgetting):
    model = quantized()
    optimizer = QASSO(BASES["momentum"](model.parameters()), Graph(model), schedule=SCHEDULE, forgetting=forgetting)
    checked = []
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        inside = not SCHEDULE.is_period_start(step) and not SCHEDULE.is_period_start(step + 1)
        if inside:
            checked.append(SCHEDULE.stage_at(step))
            with NoHostSync():
                optimizer.step()
        else:
            optimizer.step()
    assert set(checked) == {"warm-up", "projection", "joint", "cool-down"}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("nonlinear", [False, True])
def test_tightening_keeps_bits_and_clips_nothing(granularity, nonlinear):
    model = quantized(granularity=granularity, nonlinear=nonlinear)
    schedule = Schedule(STEPS, warmup=1, projection=4, joint=8, projection_periods=1, joint_periods=2)
    optimizer = QASSO(torch.optim.SGD(model.parameters(), lr=0.0), Graph(model), schedule=schedule, quant_lr=0.0)
    train(model, optimizer, batches(1))
    weights = {name: q for name, q in quantizers(model).items() if q.kind == "weight"}
    with torch.no_grad():
        for quantizer in weights.values():
            ratio = quantizer.bit_width()
            quantizer.q_m.mul_(5.0)
            quantizer.d.mul_(5.0 ** float(quantizer.t.mean()))
            assert torch.allclose(quantizer.bit_width(), ratio, atol=1e-4)
    before = {name: q.bit_width().clone() for name, q in weights.items()}
    with torch.no_grad():
        optimizer._bank.tighten_(optimizer._tightened)
    for name, quantizer in weights.items():
        tensor = model.get_submodule(name.rpartition(".")[0]).parametrizations.weight.original.detach()
        limit = tensor.abs().amax() if granularity == "tensor" else tensor.abs().flatten(1).amax(1)
        assert torch.allclose(quantizer.q_m.detach().flatten(), limit.flatten())
        assert torch.allclose(quantizer.bit_width(), before[name], atol=1e-3)


def test_tightening_can_be_switched_off():
    model = quantized()
    optimizer = QASSO(
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5),
        Graph(model),
        schedule=SCHEDULE,
        quant_lr=0.0,
        tighten=False,
        follow=False,
    )
    before = {name: q.q_m.clone() for name, q in quantizers(model).items()}
    train(model, optimizer, batches())
    assert all(torch.equal(q.q_m, before[name]) for name, q in quantizers(model).items())
