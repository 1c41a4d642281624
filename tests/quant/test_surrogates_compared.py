"""The surrogates side by side: formulas, limits, bounds, means, and a strength that changes while a model trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import geta
from geta.errors import BadModelError, CheckpointError, ConfigError
from geta.quant import DGE, DSQ, STE, Bits, FixedBits, Fourier, Surrogate, anneal, quantize, quantizers
from geta.quant.surrogate import LARGEST_SUM

SURROGATES = [STE(), Fourier(), Fourier((0.12, -0.05, 0.03)), DSQ(), DSQ(0.05), DSQ(0.9), DGE(), DGE(2, 4), DGE(1)]
ONE = torch.tensor(1.0, dtype=torch.float64)


def slope(r: Tensor, surrogate: Surrogate, strength: float | None = None) -> Tensor:
    """S(r) as the operator's gradient; x = 3 + r with steps of 1, or 4 + r where that would round to another integer."""
    x = (r + 4.0).requires_grad_()
    extra = () if strength is None else (torch.tensor(strength),)
    y = torch.ops.geta.fake_quantize(x, ONE, 8 * ONE, ONE, True, True, surrogate.coefficients, surrogate.kind, *extra)
    return torch.autograd.grad(y.sum(), x)[0]


def formula(r: float, surrogate: Surrogate) -> float:
    if isinstance(surrogate, DSQ):
        k = math.log(2 / surrogate.alpha - 1)
        return k / (2 * math.tanh(k / 2)) * (1 - math.tanh(k * (0.5 - abs(r))) ** 2)
    if isinstance(surrogate, DGE):
        y = 1 - 2 * abs(r)
        return min(y ** (1 / surrogate.k - 1) / surrogate.k, surrogate.clip) if y else (surrogate.clip if surrogate.k > 1 else 1.0)
    big_a = math.sqrt(2) * math.pi * sum(a * math.cos((2 * k + 1) * math.pi * r) for k, a in enumerate(surrogate.coefficients))
    return (1 - big_a) / (1 + big_a)


RESIDUALS = torch.linspace(-0.5, 0.5, 1001, dtype=torch.float64)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_slopes_follow_the_formulas(surrogate: Surrogate) -> None:
    wanted = torch.tensor([formula(r, surrogate) for r in RESIDUALS.tolist()], dtype=torch.float64)
    torch.testing.assert_close(slope(RESIDUALS, surrogate), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_the_same_slope_at_every_integer_and_on_both_sides(surrogate: Surrogate) -> None:
    base = slope(RESIDUALS, surrogate)
    torch.testing.assert_close(base, base.flip(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope(RESIDUALS - 9.0, surrogate), base, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=repr)
def test_mean_slope_is_the_mean_of_the_slope(surrogate: Surrogate) -> None:
    count = 400_000
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count - 0.5
    assert surrogate.mean_slope == pytest.approx(float(slope(middles, surrogate).mean()), abs=2e-5)


def test_mean_slope_of_one_harmonic_in_closed_form() -> None:
    """(4 / pi) atan(sqrt((1 - c) / (1 + c))) / sqrt(1 - c^2) * 2 - 1 with c = sqrt(2) pi a."""
    for a in (-0.2, 0.05, 0.21, 0.2249):
        c = a / LARGEST_SUM
        closed = 8 / math.pi * math.atan(math.sqrt((1 - c) / (1 + c))) / math.sqrt(1 - c * c) - 1
        assert Fourier((a,)).mean_slope == pytest.approx(closed, rel=1e-9)
    assert Fourier().mean_slope == pytest.approx(0.302, abs=5e-4)  # the docstring's number


def soft_round(v: np.ndarray, surrogate: DSQ | DGE) -> np.ndarray:
    """The soft staircases that DSQ and DGE (without its cut) take their slopes from."""
    low = np.floor(v)
    w = v - low - 0.5
    if isinstance(surrogate, DSQ):
        k = math.log(2 / surrogate.alpha - 1)
        return low + (1 + np.tanh(k * w) / math.tanh(k / 2)) / 2
    return low + (1 + np.sign(w) * np.abs(2 * w) ** (1 / surrogate.k)) / 2


@pytest.mark.parametrize("surrogate", [DSQ(0.1), DSQ(0.5), DGE(2, 1e6), DGE(5, 1e6)], ids=repr)
def test_the_slope_is_the_derivative_of_the_soft_staircase(surrogate: DSQ | DGE) -> None:
    r = np.concatenate([np.linspace(-0.49, -0.01, 97), np.linspace(0.01, 0.49, 97)])
    numeric = (soft_round(r + 1e-6, surrogate) - soft_round(r - 1e-6, surrogate)) / 2e-6
    np.testing.assert_allclose(slope(torch.from_numpy(r), surrogate).numpy(), numeric, rtol=1e-5)
    np.testing.assert_allclose(soft_round(np.array([-2.0, 0.0, 1.0]), surrogate), [-2.0, 0.0, 1.0], atol=1e-12)
    assert soft_round(np.array([0.5]), surrogate) == pytest.approx(0.5)


@pytest.mark.parametrize("surrogate", [STE(), Fourier(()), Fourier((0.0, 0.0)), DGE(1), DGE(1, 1)], ids=repr)
def test_identities_with_the_straight_through_estimator(surrogate: Surrogate) -> None:
    assert torch.equal(slope(RESIDUALS, surrogate), torch.ones_like(RESIDUALS))
    assert surrogate.mean_slope == 1.0


def test_limits_of_dsq() -> None:
    almost_straight = slope(RESIDUALS, DSQ(1 - 1e-6))
    assert float((almost_straight - 1).abs().max()) < 1e-6
    hard = slope(torch.tensor([0.0, 0.3, 0.5], dtype=torch.float64), DSQ(1e-6))
    assert float(hard[0]) < 1e-4
    assert float(hard[2]) > 1.0


def amplitudes() -> st.SearchStrategy[tuple[float, ...]]:
    share = st.lists(st.floats(-1, 1), min_size=1, max_size=5)
    return share.map(lambda a: tuple(0.999 * LARGEST_SUM * value / max(1.0, math.fsum(map(abs, a))) for value in a))


ANY = st.one_of(
    amplitudes().map(Fourier),
    st.floats(1e-6, 1 - 1e-6).map(DSQ),
    st.builds(DGE, st.floats(1, 100), st.floats(1, 1e6)),
)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(surrogate=ANY, strength=st.none() | st.floats(0, 1))
def test_slopes_are_positive_and_bounded(surrogate: Surrogate, strength: float | None) -> None:
    found = slope(RESIDUALS, surrogate, strength)
    if isinstance(surrogate, Fourier):
        largest = math.fsum(map(abs, surrogate.a)) / LARGEST_SUM
        low, high = (1 - largest) / (1 + largest), (1 + largest) / (1 - largest)
    elif isinstance(surrogate, DSQ):
        k, alpha = math.log(2 / surrogate.alpha - 1), surrogate.alpha
        low, high = k * alpha * (2 - alpha) / (2 * (1 - alpha)), k / (2 * (1 - alpha))
    else:
        low, high = 1 / surrogate.k, max(1.0, surrogate.clip)
    low, high = min(low, 1.0) if strength is not None else low, max(high, 1.0) if strength is not None else high
    assert float(found.min()) > 0
    assert low * (1 - 1e-6) <= float(found.min())
    assert float(found.max()) <= high * (1 + 1e-6)
    assert 0 < surrogate.mean_slope <= high * (1 + 1e-6)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(surrogate=ANY, x=st.lists(st.sampled_from([0.0, math.inf, -math.inf, 3e38, 1e-40, 0.5, -0.25]), min_size=1, max_size=6))
def test_gradients_are_finite_for_every_input(surrogate: Surrogate, x: list[float]) -> None:
    inputs = torch.tensor(x, requires_grad=True)
    y = torch.ops.geta.fake_quantize(
        inputs, *[torch.tensor(v) for v in (0.5, 2.0, 1.0)], True, True, surrogate.coefficients, surrogate.kind
    )
    assert torch.isfinite(torch.autograd.grad(y.sum(), inputs)[0]).all()


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: DSQ(0.0), r"DSQ\(alpha=0\) is outside"),
    (lambda: DSQ(1.0), "STE"),
    (lambda: DSQ(math.nan), "outside"),
    (lambda: DSQ("x"), "needs a number"),
    (lambda: DGE(0.5), r"DGE\(k=0.5\) is outside \[1, 100\]"),
    (lambda: DGE(5, 0.9), r"DGE\(clip=0.9\) is outside"),
    (lambda: DGE(5, math.inf), "outside"),
    (lambda: DGE(True), "needs a number"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_impossible_surrogates_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_public_names() -> None:
    assert (geta.DSQ, geta.DGE, geta.FixedBits) == (DSQ, DGE, FixedBits)
    assert all(isinstance(surrogate, Surrogate) for surrogate in SURROGATES)


# ---- the operator's trailing arguments -----------------------------------------------------------------------------


def test_a_call_with_the_first_seven_arguments_means_what_it_meant() -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    parameters = (0.3 * ONE, ONE, ONE)
    old = torch.ops.geta.fake_quantize(x, *parameters, True, True, [0.21])
    new = torch.ops.geta.fake_quantize(x, *parameters, True, True, [0.21], "fourier", None)
    assert torch.equal(old, new)
    assert torch.equal(*[torch.autograd.grad(y.sum(), x)[0] for y in (old, new)])


@pytest.mark.parametrize("name", ["fake_quantize", "lsq_quantize"])
def test_an_unknown_kind_is_refused(name: str) -> None:
    arguments = (ONE, ONE, ONE, True, True) if name == "fake_quantize" else (ONE, 2, -2, 1)
    with pytest.raises(RuntimeError, match="knows the surrogates fourier, dsq, dge, not 'cubic'"):
        getattr(torch.ops.geta, name)(torch.randn(3), *arguments, [0.2], "cubic")


@pytest.mark.parametrize(("kind", "coefficients"), [("fourier", [0.2, 0.01]), ("dsq", [0.2]), ("dge", [5.0, 3.0])])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_registrations(kind: str, coefficients: list[float], strength: float | None) -> None:
    torch.manual_seed(0)
    parameters = [torch.full((), number, requires_grad=True) for number in (0.1, 1.0, 1.2)]
    extra = (True, False, coefficients, kind, None if strength is None else torch.tensor(strength))
    result = torch.library.opcheck(torch.ops.geta.fake_quantize.default, (torch.randn(4, 5, requires_grad=True), *parameters, *extra))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("surrogate", [Fourier((0.1, -0.05)), DSQ(), DGE()], ids=repr)
def test_strength(surrogate: Surrogate) -> None:
    full = slope(RESIDUALS, surrogate)
    assert torch.equal(slope(RESIDUALS, surrogate, 0.0), torch.ones_like(full))
    torch.testing.assert_close(slope(RESIDUALS, surrogate, 1.0), full)
    half = slope(RESIDUALS, surrogate, 0.5)
    if isinstance(surrogate, Fourier):
        torch.testing.assert_close(half, slope(RESIDUALS, Fourier(tuple(a / 2 for a in surrogate.a))))
    else:
        torch.testing.assert_close(half, (1 + full) / 2)


# ---- annealing -----------------------------------------------------------------------------------------------------


def net(surrogate: Surrogate, *, fixed: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    bits = FixedBits(3) if fixed else Bits(3, 3)
    quantize(model, weights=bits, activations=bits, calibration=[torch.randn(16, 6)], exclude=(), surrogate=surrogate)
    return model


def run(model: nn.Module, schedule: geta.quant.Annealing, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()


def test_the_schedule_is_the_formula() -> None:
    schedule = anneal(net(Fourier()), steps=10, start=0.2, end=1.0, begin=5)
    for step in (0, 5):
        assert schedule.strength_at(step) == 0.2
    assert schedule.strength_at(10) == pytest.approx(0.6)
    assert schedule.strength_at(12) == pytest.approx(0.2 + 0.8 * (1 - math.cos(0.7 * math.pi)) / 2)
    assert schedule.strength_at(15) == schedule.strength_at(999) == pytest.approx(1.0)
    linear = anneal(net(Fourier()), steps=4, start=1.0, end=0.0, shape="linear")
    assert [linear.strength_at(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


@pytest.mark.parametrize("fixed", [False, True])
def test_the_strength_reaches_the_gradient(fixed: bool) -> None:
    model = net(Fourier(), fixed=fixed)
    plain = net(STE(), fixed=fixed)
    x = torch.randn(16, 6)

    def gradients(model: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(model(x).square().mean(), [p for p in model.parameters() if p.requires_grad]))

    full = gradients(model)
    schedule = anneal(model, steps=4, start=0.0, end=1.0)
    assert all(torch.equal(one, other) for one, other in zip(gradients(model), gradients(plain), strict=True))
    schedule.set_step(4)
    assert all(torch.allclose(one, other, rtol=1e-6) for one, other in zip(gradients(model), full, strict=True))


def test_resuming_is_bitwise_and_the_model_state_has_its_old_keys() -> None:
    def start() -> tuple[nn.Module, geta.quant.Annealing, torch.optim.Optimizer]:
        model = net(Fourier())
        keys = list(model.state_dict())
        schedule = anneal(model, steps=8)
        assert list(model.state_dict()) == keys
        return model, schedule, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    whole = start()
    run(*whole, 0, 12)
    first = start()
    run(*first, 0, 5)
    saved = copy.deepcopy([part.state_dict() for part in first])
    second = start()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    run(*second, 5, 12)
    for (name, one), other in zip(whole[0].state_dict().items(), second[0].state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_compiled_model_is_traced_once() -> None:
    model = net(Fourier())
    schedule = anneal(model, steps=10)
    traces = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        traces.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    seen = []
    for _ in range(4):
        compiled(torch.linspace(-1, 1, 96).view(16, 6)).square().mean().backward()
        seen.append(model[0].parametrizations.weight.original.grad.clone())
        model.zero_grad()
        schedule.step()
    torch._dynamo.reset()
    assert len(traces) == 1
    assert not torch.equal(seen[0], seen[3])


def test_an_annealed_model_is_analysed_compacted_saved(tmp_path) -> None:
    model = net(DGE()).eval()
    for quantizer in quantizers(model).values():
        quantizer.round_bits_()
    x = torch.randn(4, 6)
    before = geta.cost(model, (x,))
    anneal(model, steps=10, start=0.5)
    graph = geta.analyze(model, (x,))
    dense = geta.cost(model, (x,))
    assert dense.bops == before.bops
    assert dense.weight_bytes - before.weight_bytes == 2 * 4  # activations keep their strength, one number each
    small = geta.compact(model, graph, graph.random_selection(0.5))
    small.save(tmp_path / "small")
    loaded = geta.load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(loaded(x), small.eval()(x))
    assert loaded.cost == small.cost


def test_precision_of_the_strength_survives_conversion() -> None:
    model = net(Fourier())
    schedule = anneal(model, steps=3)
    model.to(torch.bfloat16)
    schedule.step()
    for quantizer in quantizers(model).values():
        assert quantizer.strength is not None and quantizer.strength.dtype == torch.float32
        assert float(quantizer.strength) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": 5, "begin": -1}, "begin = -1"),
        ({"steps": 5, "end": 1.5}, r"end = 1.5 must lie in \[0, 1\]"),
        ({"steps": 5, "shape": "square"}, "'linear' or 'cosine'"),
    ],
)
def test_impossible_schedules_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        anneal(net(Fourier()), **arguments)  # type: ignore[arg-type]


def test_nothing_to_anneal_is_refused() -> None:
    with pytest.raises(ConfigError, match="none of the 4 quantizers has a surrogate to anneal"):
        anneal(net(STE()), steps=3)


def test_other_settings_are_not_resumed() -> None:
    state = anneal(net(Fourier()), steps=3).state_dict()
    with pytest.raises(CheckpointError, match="saved with steps = 3, this one has 4"):
        anneal(net(Fourier()), steps=4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="damaged"):
        anneal(net(Fourier()), steps=3).load_state_dict({"step": 1})
    model = net(Fourier())
    schedule = anneal(model, steps=3)
    for quantizer in quantizers(model).values():
        quantizer.strength = None
    with pytest.raises(BadModelError, match="lost its strength"):
        schedule.step()
    with pytest.raises(ConfigError, match="at least 0"):
        schedule.set_step(-1)
