"""Criteria that look at a window of steps, against loops; nothing is attached outside the window, and nothing is lost on resume."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geta.errors import CheckpointError, ConfigError
from geta.graph import analyze
from geta.graph.families import Family, Member
from geta.optim import CRITERIA, HESSO, OBSERVERS, QASSO, GroupIndex, GroupStatistics, Saliency, Schedule, register_observer
from geta.optim.observe import UNSEEN
from geta.quant import quantize
from optim_nets import ByHand, batch, family, net, through_a_file, train

SCHEDULE = Schedule(40, warmup=10, projection=0, joint=20, joint_periods=2)


def build(saliency, *, kind: type = HESSO, seed: int = 0, lr: float = 0.05):
    model, graph = net(seed)
    if kind is QASSO:
        quantize(model, weights=(4, 8), activations=None, exclude=())
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return model, kind(base, graph, sparsity=0.5, schedule=SCHEDULE, saliency=saliency)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def observed(model: nn.Module, graph: ByHand, name: str):
    return OBSERVERS[name](GroupIndex(graph), graph)


# fisher


def test_fisher_is_the_mean_squared_inner_product_of_parameter_and_gradient():
    model, graph = net()
    observer = observed(model, graph, "fisher")
    observer.start()
    expected = torch.zeros(24, dtype=torch.float64)
    for step in range(3):
        x, y = batch(step)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        observer.observe()
        for position, (row, names) in enumerate(
            [(i, ("conv.weight", "norm.weight", "norm.bias")) for i in range(8)]
            + [(i, ("first.weight", "first.bias")) for i in range(6)]
            + [(i, ("second.weight", "second.bias")) for i in range(10)]
        ):
            tensors = dict(model.named_parameters())
            inner = sum((tensors[name][row] * tensors[name].grad[row]).sum().item() for name in names)
            expected[position] += inner**2 / 3
    assert torch.allclose(observer.read().double(), expected, rtol=1e-3, atol=1e-12)
    observer.start()
    with pytest.raises(ConfigError, match="has seen no gradient"):
        observer.read()


def test_missing_and_sparse_gradients():
    model = nn.Module()
    model.table, model.idle = nn.Embedding(5, 4, sparse=True), nn.Linear(2, 4)
    index = torch.arange(4)[:, None]
    graph = ByHand(
        model,
        [Family("f", "channels", 4, True, "", (Member("table.weight", 1, index, "producer", True),)), family("g", 4, ["idle.weight"])],
    )
    observer = observed(model, graph, "fisher")
    observer.start()
    model.table(torch.tensor([1, 1, 3])).sum().backward()
    with torch.no_grad():
        observer.observe()
    weight = model.table.weight.detach()
    expected = (2 * weight[1] + weight[3]).square()
    assert torch.allclose(observer.read(), torch.cat([expected, torch.zeros(4)]))


# activation


def reference(weights: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum over readers of |w| a: pairs of [O, I, ...] and of the inputs [n, I]."""
    return sum((w.abs().flatten(2).sum(2) if w.dim() > 2 else w.abs()).sum(0) * x.square().mean(0).sqrt() for w, x in weights)


def test_activation_is_weight_times_input_of_every_reader():
    model, graph = net()
    observer = observed(model, graph, "activation")
    observer.start()
    inputs: dict[str, list[Tensor]] = {"first": [], "second": [], "head": []}
    for name, seen in inputs.items():
        getattr(model, name).register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0].detach()))
    for step in range(3):
        model(batch(step)[0])
    expected = [reference([(getattr(model, name).weight.detach(), torch.cat(seen))]) for name, seen in inputs.items()]
    assert torch.allclose(observer.read(), torch.cat(expected), rtol=1e-4)
    assert observer.notes == []
    observer.stop()
    assert hooks(model) == 3  # those of this test


class Convolutions(nn.Module):
    """A convolution read by a grouped and a transposed one and by a keyword call."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 8, 3)
        self.grouped, self.transposed, self.plain = nn.Conv2d(8, 4, 2, groups=2), nn.ConvTranspose2d(8, 3, 2), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.a(x))
        return [self.grouped(x), self.transposed(x), self.plain(input=x)]


def test_all_kinds_of_convolutions():
    torch.manual_seed(0)
    model = Convolutions()
    one = torch.arange(8)[:, None]
    members = (
        Member("a.weight", 0, one, "producer", True),
        Member("transposed.weight", 0, one, "consumer", False),
        Member("plain.weight", 1, one, "consumer", True),
    )
    halves = Family(
        "halves",
        "channels",
        4,
        True,
        "",
        (Member("grouped.bias", 0, one[:4], "producer", True), Member("grouped.weight", 1, one[:4], "consumer", False)),
    )
    x = torch.randn(3, 2, 7, 7)
    inputs = F.relu(model.a(x)).detach()
    rms = inputs.square().mean((0, 2, 3)).sqrt()
    for found, expected in (
        (
            Family("f", "channels", 8, True, "", members),
            (model.transposed.weight.detach().abs().sum((1, 2, 3)) + model.plain.weight.detach().abs().sum((0, 2, 3))) * rms,
        ),
        (halves, (model.grouped.weight.detach().abs().sum((2, 3)) * rms.view(2, 4).repeat_interleave(2, 0)).sum(0)),
    ):
        observer = observed(model, ByHand(model, [found]), "activation")
        observer.start()
        model(x)
        assert torch.allclose(observer.read(), expected, rtol=1e-4)
        observer.stop()


def test_forward_passes_without_gradients_are_not_seen_and_accumulated_ones_all_are():
    model, graph = net()
    twice, once = observed(model, graph, "activation"), observed(model, graph, "activation")
    model.eval()  # BatchNorm by its statistics: halves of a batch give the same activations
    x = batch(0)[0]
    twice.start()
    model(x[:8])
    with torch.no_grad():
        model(100.0 * x)
    model(x[8:])
    found = twice.read()
    twice.stop()
    once.start()
    model(x)
    assert torch.allclose(found, once.read(), rtol=1e-5)


class Attentive(nn.Module):
    """nn.MultiheadAttention uses its output projection without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.hidden, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.attend(x, x, x, need_weights=False)[0])))


def test_families_that_cannot_be_observed_are_named_and_compared_by_magnitude():
    torch.manual_seed(0)
    model = Attentive()
    families = [
        family("hidden", 6, ["hidden.weight", "hidden.bias"], ["head.weight"]),
        Family(
            "values",
            "channels",
            8,
            True,
            "",
            (
                Member("attend.in_proj_weight", 0, 16 + torch.arange(8)[:, None], "producer", True),
                Member("attend.out_proj.weight", 1, torch.arange(8)[:, None], "consumer", False),
            ),
        ),
    ]
    graph = ByHand(model, families)
    optimizer = HESSO(
        torch.optim.SGD(model.parameters(), lr=0.1), graph, sparsity=0.3, schedule=Schedule(12, warmup=2, joint=6), saliency="activation"
    )
    for step in range(12):
        optimizer.zero_grad()
        model(torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    optimizer.check()
    notes = [line for line in optimizer.report() if "family 'values' is read by no Linear" in line]
    assert len(notes) == 1
    assert not any("'hidden'" in line for line in optimizer.report())
    one = torch.ones(3)
    stats = GroupStatistics(
        norm=torch.tensor([2.0, 1.0, 3.0]),
        size=one,
        direction=one,
        inner=one,
        family=torch.tensor([0, 1, 1]),
        observed={"activation": torch.tensor([8.0, UNSEEN, UNSEEN])},
    )
    assert CRITERIA["activation"](stats).tolist() == pytest.approx([8.0, 8.0 * 1 / 2, 8.0 * 3 / 2])


def test_a_model_that_can_not_be_observed_at_all_is_refused():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(4))
    graph = ByHand(model, [family("f", 4, ["scale"])])
    with pytest.raises(ConfigError, match="no prunable family is read by a Linear or convolution module"):
        HESSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, schedule=SCHEDULE, saliency="activation")


def test_a_window_without_forward_passes_is_an_error():
    model, optimizer = build("activation")
    other = copy.deepcopy(model)
    with pytest.raises(ConfigError, match="has seen no forward pass with gradients"):
        for _ in range(11):
            other(batch(0)[0]).sum().backward()
            optimizer.step()


def test_tied_weights_are_seen_at_every_reader():
    torch.manual_seed(0)
    model = nn.Module()
    model.a, model.b, model.c = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
    model.c.weight = model.b.weight
    graph = ByHand(model, [family("f", 4, ["a.weight", "a.bias"], ["b.weight", "c.weight"])])
    observer = observed(model, graph, "activation")
    observer.start()
    x, y = torch.randn(5, 4), torch.randn(6, 4)
    model.b(x), model.c(y)
    weight = model.b.weight.detach()
    assert torch.allclose(observer.read(), reference([(weight, x), (weight, y)]))


# windows


@pytest.mark.parametrize("window", [1, 4, 12])
def test_hooks_exist_only_inside_windows(window):
    """Markings at steps 10 and 20: what the next step will see, after every step."""
    model, optimizer = build(Saliency("activation", window=window))
    attached = [hooks(model) > 0]
    train(model, optimizer, 0, 40, lambda: attached.append(hooks(model) > 0))
    expected = [any(m - window < step <= m for m in (10, 20)) for step in range(41)]
    assert attached == expected
    optimizer.check()


def test_each_window_starts_anew():
    model, optimizer = build(Saliency("fisher", window=4))
    steps = []
    train(model, optimizer, 0, 40, lambda: steps.append(optimizer._pruner.observation.state()["fisher"]["steps"]))
    assert steps[6:10] == [0, 1, 2, 3]
    assert steps[10:20] == [0] * 7 + [1, 2, 3]
    assert steps[20:] == [0] * 20


def test_the_marking_follows_the_window_and_not_the_snapshot():
    """HESSO's first marking by Fisher information equals that of sums made by hand over the window's gradients."""
    model, optimizer = build(Saliency("fisher", window=5))
    total = torch.zeros(24)
    for step in range(11):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if step > 10 - 5:
            named = dict(model.named_parameters())
            rows = [
                [("conv.weight", 8), ("norm.weight", 8), ("norm.bias", 8)],
                [("first.weight", 6), ("first.bias", 6)],
                [("second.weight", 10), ("second.bias", 10)],
            ]
            inner = [sum((named[n] * named[n].grad).detach().view(size, -1).sum(1) for n, size in family_rows) for family_rows in rows]
            total += torch.cat(inner).square() / 5
        optimizer.step()
    selector = optimizer._pruner.selector
    chosen = selector.mark(total.numpy(), torch.zeros(24, dtype=torch.bool).numpy(), 6)
    assert torch.cat(list(optimizer.redundant.values())).tolist() == chosen.tolist()


@pytest.mark.parametrize("saliency", ["fisher", "activation"])
def test_closures_and_plain_steps_observe_the_same(saliency):
    model, optimizer = build(saliency)
    twin, second = build(saliency)
    for step in range(40):
        x, y = batch(step)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        train(twin, second, step, step + 1)
    assert all(torch.equal(one, two) for one, two in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_accumulated_gradients_are_one_observation():
    model, optimizer = build(Saliency("fisher", window=20))
    for step in range(8):
        optimizer.zero_grad()
        for half in batch(step)[0].chunk(2):
            model(half).square().mean().backward()
        optimizer.step()
    assert optimizer._pruner.observation.state()["fisher"]["steps"] == 8


@pytest.mark.parametrize("kind", [HESSO, QASSO])
@pytest.mark.parametrize("stop", [3, 8, 10, 11, 17, 20, 25])
@pytest.mark.parametrize("name", ["fisher", "activation"])
def test_resume_inside_a_window_is_bitwise(kind, stop, name):
    saliency = Saliency({name: 1.0, "magnitude": 0.1}, window=6)
    model, optimizer = build(saliency, kind=kind)
    train(model, optimizer, 0, stop)
    saved = through_a_file(model, optimizer)
    losses = train(model, optimizer, stop, 40)
    resumed, second = build(saliency, kind=kind, seed=5)
    resumed.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    assert train(resumed, second, stop, 40) == losses
    assert all(torch.equal(one, two) for one, two in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True))
    second.check()


def test_another_window_or_another_observer_is_refused_on_resume():
    model, optimizer = build(Saliency("fisher", window=6))
    train(model, optimizer, 0, 12)
    for other in (Saliency("fisher", window=7), "activation", None):
        with pytest.raises(CheckpointError, match="made with observers"):
            build(other)[1].load_state_dict(optimizer.state_dict())


def test_criteria_that_observe_nothing_attach_and_save_nothing():
    model, optimizer = build(None)
    train(model, optimizer, 0, 15, lambda: None)
    assert hooks(model) == 0
    assert "observed" not in optimizer.state_dict()["geta"]


# users


class Longest:
    """An observer of one's own: the largest norm of a group's first parameter over the window."""

    def __init__(self, index: GroupIndex, graph) -> None:
        self.notes = ["looks at norms"]
        self.index = index
        self.seen = torch.zeros(index.num_groups)

    def start(self) -> None:
        self.seen = torch.zeros_like(self.seen)

    def stop(self) -> None: ...

    def observe(self) -> None:
        rows = [
            entry.tensor.detach().flatten(1).norm(dim=1) if entry.tensor.dim() > 1 else torch.zeros(len(entry.tensor))
            for entry in self.index.parameters
        ]
        self.seen = torch.maximum(self.seen, self.index.per_group(torch.cat(rows)))

    def read(self) -> Tensor:
        return self.seen

    def state(self) -> dict:
        return {"seen": self.seen.clone()}

    def load(self, state) -> None:
        self.seen = state["seen"].clone()


def test_observers_and_callables_of_ones_own():
    register_observer("longest")(Longest)
    try:
        with pytest.raises(ConfigError, match="exists already"):
            register_observer("longest")(Longest)
        model, optimizer = build(Saliency(lambda groups: groups.seen_by("longest"), observers=["longest"], window=3))
        train(model, optimizer, 0, 40)
        optimizer.check()
        assert "looks at norms" in optimizer.report()
    finally:
        del OBSERVERS["longest"]
    model, optimizer = build(Saliency(lambda groups: groups.seen_by("longest")))
    with pytest.raises(ConfigError, match=r"needs the observer 'longest': give Saliency\(..., observers=\['longest'\]\)"):
        train(model, optimizer, 0, 11)


@pytest.mark.parametrize("name", ["fisher", "activation"])
def test_with_an_analysed_graph_and_quantizers(name):
    torch.manual_seed(0)
    model = net()[0]
    graph = analyze(model, (batch(0)[0],))
    quantize(model, weights=(4, 8), activations=(8, 8), calibration=[batch(0)[0]], exclude=())
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = QASSO(base, graph, sparsity=0.5, schedule=SCHEDULE, saliency=Saliency(name, normalise="family"))
    train(model, optimizer, 0, 40)
    optimizer.check()
    assert optimizer._pruner.observation.notes == []
    assert hooks(model) == hooks(quantized_twin(model)), "only the activation quantizers' own hooks are left"


def quantized_twin(model: nn.Module) -> nn.Module:
    twin = net()[0]
    quantize(twin, weights=(4, 8), activations=(8, 8), calibration=[batch(0)[0]], exclude=())
    return twin
