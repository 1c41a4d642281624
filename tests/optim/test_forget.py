"""The forget rule against a literal implementation of the specification, loops included."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import geta
from geta.errors import ConfigError
from geta.graph.families import Family, Member
from geta.optim import QASSO, Schedule
from geta.optim.forget import path_rate, step_share
from geta.quant import quantize, quantizers

LOWER, UPPER = 4, 8


class Prescribed(torch.optim.Optimizer):
    """A base optimizer whose step is a given tensor per parameter, or nothing."""

    def __init__(self, params) -> None:
        super().__init__(params, {})
        self.deltas: dict[torch.Tensor, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for parameter, delta in self.deltas.items():
            parameter.add_(delta)


def linear_family(layer: int, size: int, *, shared: bool) -> Family:
    """The outputs of a linear layer and the inputs of the next one; `shared`: the inputs must be zero too."""
    index = torch.arange(size)[:, None]
    own = tuple(Member(f"{layer}.{leaf}", 0, index, "producer", True) for leaf in ("weight", "bias"))
    return Family(f"{layer}", "channels", size, True, "", (*own, Member(f"{layer + 2}.weight", 1, index, "consumer", shared)))


def build(*, nonlinear: bool = False, seed: int = 0, shared: bool = False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    graph = SimpleNamespace(model=model, families=[linear_family(0, 8, shared=shared), linear_family(2, 6, shared=shared)])
    quantize(model, weights=(LOWER, UPPER), activations=None, nonlinear=nonlinear, initial_bits=8)
    if nonlinear:
        with torch.no_grad():
            for quantizer in quantizers(model).values():
                quantizer.t.fill_(1.25)
    return model, graph


def one_period(model, graph, forgetting, *, joint=6):
    base = Prescribed(model.parameters())
    schedule = Schedule(joint + 2, warmup=0, projection=0, joint=joint, joint_periods=1, initial_bits=8)
    optimizer = QASSO(base, graph, sparsity=0.5, schedule=schedule, forgetting=forgetting, saliency="magnitude")
    return base, optimizer


def literal_split(x: float, d: float, q_m: float, t: float) -> tuple[float, float]:
    """c(x) and sgn(x) * R(x) of section 2, for one number."""
    shaped = min(abs(x), q_m) ** t
    u = shaped / d
    nearest = float(torch.tensor(u, dtype=torch.float64).round())
    return math.copysign(shaped, x), math.copysign(1.0, x) * (nearest - u)


def literal_rule(layers, k: int, length: int, *, floor: float, descent: bool):
    """Section 4, stage 3 for one family. layers: list of (elements, quantizer or None), an element = (x, delta)."""
    eta, xi, beta, eps = 0.999, 0.9, 0.8, 1e-8
    shaped, rest = [], []
    for elements, q in layers:
        pairs = [literal_split(x, *q) if q else (x, 0.0) for x, _ in elements]
        shaped.append([c for c, _ in pairs])
        rest.append([r for _, r in pairs])
    step = [[-delta for _, delta in elements] for elements, _ in layers]
    flat = [(a, c) for grads, values in zip(step, shaped, strict=True) for a, c in zip(grads, values, strict=True)]
    norm_a, norm_c = math.sqrt(sum(a * a for a, _ in flat)), math.sqrt(sum(c * c for _, c in flat))
    cos = sum(a * c for a, c in flat) / (norm_a * norm_c)
    if sum(abs(c) for _, c in flat) / len(flat) <= eps:
        gamma = 0.0
    elif cos >= 0:
        gamma = 1 - (length - k - 1) / (length - k)
    else:
        gamma = min(1.0, -(1 - eta) * norm_a / (cos * norm_c))
    gamma = max(gamma, floor) if descent else floor
    starting, slowest, steps = gamma, gamma, []
    for (_, q), grads, r in zip(layers, step, rest, strict=True):
        if q is None:
            continue
        top = q[1] ** q[2]
        inner = sum(a * v for a, v in zip(grads, r, strict=True))
        norm_g, norm_r = math.sqrt(sum(a * a for a in grads)), math.sqrt(sum(v * v for v in r))
        cos_d = inner / (norm_g * norm_r) if norm_r else 0.0
        d = top / (2 ** (LOWER - 1) - 1) if cos_d >= 0 or starting == 0 else -xi * eta * norm_g / (starting * cos_d * norm_r)
        d = min(d, top / (2 ** (LOWER - 1) - 1))
        mine = starting
        while d < top / (2 ** (UPPER - 1) - 1) * (1 - 1e-6):
            mine *= beta
            d /= beta
        steps.append(min(d, top / (2 ** (LOWER - 1) - 1)))
        slowest = min(slowest, mine)
    return max(slowest, floor), steps, shaped, rest


def elements_of(model, before, deltas, steps_before, family, remove):
    layers, places = [], []
    found = quantizers(model)
    for part in family.zeroed:
        rows = part.index[remove].flatten()
        x, delta = before[part.param].index_select(part.dim, rows), deltas[part.param].index_select(part.dim, rows)
        q = found.get(part.param)
        elements = list(zip(x.flatten().double().tolist(), delta.flatten().double().tolist(), strict=True))
        layers.append((elements, (steps_before[part.param], q.q_m.item(), q.t.item()) if q else None))
        places.append((part, rows, x.shape))
    return layers, places


def stored(model):
    return {name.replace("parametrizations.weight.original", "weight"): p for name, p in model.named_parameters()}


@pytest.mark.parametrize("forgetting", ["descent", "uniform", "cosine", "blend"])
@pytest.mark.parametrize(("seed", "scale", "nonlinear"), [(0, 0.001, False), (1, 0.1, False), (2, 0.01, True), (3, 3.0, False)])
def test_one_joint_step_equals_the_specification(forgetting, seed, scale, nonlinear):
    model, graph = build(nonlinear=nonlinear, seed=seed)
    base, optimizer = one_period(model, graph, forgetting)
    parameters = stored(model)
    generator = torch.Generator().manual_seed(seed + 10)
    for k in range(3):
        before = {name: p.detach().clone() for name, p in parameters.items()}
        trained = [name for name in parameters if not name.endswith((".d", ".q_m", ".t"))]
        deltas = {name: scale * torch.randn(parameters[name].shape, generator=generator) for name in trained}
        base.deltas = {parameters[name]: delta for name, delta in deltas.items()}
        steps_before = {name: q.d.item() for name, q in quantizers(model).items()}
        optimizer.step()
        for family in graph.families:
            remove = optimizer.redundant[family.name]
            if not remove.any():
                continue
            layers, places = elements_of(model, before, deltas, steps_before, family, remove)
            descent = forgetting in ("descent", "blend")
            floor = path_rate(forgetting, k, 6)
            gamma, steps, shaped, rest = literal_rule(layers, k, 6, floor=floor, descent=descent)
            steps = iter(steps)
            for (part, rows, shape), (elements, q), c, r in zip(places, layers, shaped, rest, strict=True):
                d = next(steps) if q else 0.0
                if q:
                    start, share = steps_before[part.param], 1.0 if forgetting == "descent" else 1.0 / (6 - k)
                    assert quantizers(model)[part.param].d.item() == pytest.approx(start * (d / start) ** share, rel=1e-3)
                expected = [x + delta - gamma * (cc + d * rr) for (x, delta), cc, rr in zip(elements, c, r, strict=True)]
                got = parameters[part.param].detach().index_select(part.dim, rows)
                torch.testing.assert_close(got, torch.tensor(expected).view(shape), rtol=1e-3, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-4, 1.0), st.integers(0, 4), st.booleans())
def test_the_whole_direction_descends(seed, scale, steps, shared):
    """<alpha grad, movement of R> <= -eta (1 - xi) ||alpha grad||^2, so the first-order change of the loss is negative.

    shared: the middle layer's elements are owned by two families, some by both.
    """
    model, graph = build(seed=seed, shared=shared)
    base, optimizer = one_period(model, graph, "descent")
    parameters = stored(model)
    generator = torch.Generator().manual_seed(seed)
    trained = [name for name in parameters if not name.endswith((".d", ".q_m", ".t"))]
    for _ in range(steps + 1):
        before = {name: parameters[name].detach().clone() for name in trained}
        deltas = {name: scale * torch.randn(parameters[name].shape, generator=generator) for name in trained}
        base.deltas = {parameters[name]: delta for name, delta in deltas.items()}
        optimizer.step()
    masks = {name: torch.zeros(parameters[name].shape, dtype=torch.bool) for name in trained}
    for family in graph.families:
        for part in family.zeroed:
            masks[part.param].index_fill_(part.dim, part.index[optimizer.redundant[family.name]].flatten(), True)
    inner = squared = 0.0
    for name, mask in masks.items():
        moved = (parameters[name].detach() - before[name])[mask].double()
        gradient = -deltas[name][mask].double()
        inner += float(gradient @ moved)
        squared += float(gradient @ gradient)
    assert squared > 0
    assert inner <= -0.999 * (1 - 0.9) * squared + 1e-5 * max(squared, 1e-3)


@pytest.mark.parametrize("rule", ["uniform", "cosine", "blend"])
@pytest.mark.parametrize("length", [1, 2, 7, 50])
def test_paths_reach_zero_smoothly_and_on_time(rule, length):
    norms = [1.0]
    for k in range(length):
        norms.append(norms[-1] * (1.0 - path_rate(rule, k, length)))
    assert norms[-1] == 0.0
    expected = [1 - j / length if rule == "uniform" else (1 + math.cos(math.pi * j / length)) / 2 for j in range(length)]
    assert norms[:-1] == pytest.approx(expected)


@pytest.mark.parametrize("length", [1, 5])
def test_the_step_size_is_where_its_rule_says_in_the_last_step(length):
    bits = [8.0]
    for k in range(length):
        bits.append(bits[-1] + step_share("blend", k, length) * (4.0 - bits[-1]))
        assert step_share("descent", k, length) == 1.0
    assert bits == pytest.approx([8.0 - 4.0 * k / length for k in range(length + 1)])


@pytest.mark.parametrize("forgetting", ["uniform", "cosine", "blend"])
def test_redundant_groups_fade_along_the_path_instead_of_being_cut(forgetting):
    model, graph = build()
    base, optimizer = one_period(model, graph, forgetting, joint=10)
    base.deltas = {}
    norms = []
    for _ in range(9):
        optimizer.step()
        remove = optimizer.redundant["0"]
        norms.append(float(stored(model)["0.weight"].detach()[remove].norm()))
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 0.2 * norms[0]
    optimizer.step()
    assert optimizer.progress()["pruned_groups"] == optimizer.target_groups
    assert int(optimizer.selection["0"].sum()) > 0


def test_unknown_rules_are_refused():
    model, graph = build()
    with pytest.raises(ConfigError, match="forgetting is 'slow': it must be one of descent, uniform, cosine, blend"):
        one_period(model, graph, "slow")


@pytest.mark.parametrize("forgetting", ["descent", "uniform", "cosine", "blend"])
def test_rows_that_a_batch_normalization_scales_wait_for_the_last_step(forgetting):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    graph = geta.analyze(model, (torch.randn(2, 1, 8, 8),))
    base, optimizer = one_period(model, graph, forgetting, joint=10)
    base.deltas = {}
    before = model[0].weight.detach().clone()
    for _ in range(9):
        optimizer.step()
        remove = next(iter(optimizer.redundant.values()))
        assert torch.equal(model[0].weight[remove], before[remove]) == (forgetting != "descent")
    assert float(model[1].weight.detach()[remove].abs().max()) < 1.0
    optimizer.step()
    remove = next(iter(optimizer.selection.values()))
    assert not model[0].weight[remove].any()
    assert not model[1].weight[remove].any()


def test_running_statistics_stay_true_while_groups_are_forgotten():
    """In evaluation mode as in training mode: what is being forgotten leaves no variance behind that it no longer has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    images = torch.randn(32, 1, 8, 8)
    graph = geta.analyze(model, (images,))
    optimizer = QASSO(
        torch.optim.SGD(model.parameters(), lr=0.01),
        graph,
        sparsity=0.5,
        schedule=Schedule(140, warmup=60, projection=0, joint=40, joint_periods=1),
    )
    for step in range(95):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
        if step > 60:
            with torch.no_grad():
                variance = model[0](images).transpose(0, 1).flatten(1).var(1)
            torch.testing.assert_close(model[1].running_var, variance, rtol=0.05, atol=0)
