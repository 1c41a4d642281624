"""The short way through the linear quantizer gives the bits of the long one, and steps aside wherever it isn't sure."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from geta.quant import DGE, STE, Bits, Fourier, Quantizer, native_plan, native_status


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the uses of a plan; the kernels must be there for these tests to mean something."""
    assert native_status().used, native_status()
    counter = [0]
    quantize = native_plan.quantize

    def counting(*arguments: object) -> Tensor:
        counter[0] += 1
        return quantize(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(native_plan, "quantize", counting)
    return counter


def quantizer_of(q_m: Tensor, **options: object) -> Quantizer:
    return Quantizer("w", "weight", Bits(4, 8), q_m, **{"initial_bits": 5, **options})  # type: ignore[arg-type]


def values_and_gradients(quantizer: Quantizer, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    quantizer.zero_grad()
    out = quantizer(x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view(out.shape)).sum().backward()
    assert x.grad is not None
    assert quantizer.d.grad is not None
    assert quantizer.q_m.grad is not None
    return [out.detach(), x.grad, quantizer.d.grad, quantizer.q_m.grad]


def without_a_plan(quantizer: Quantizer, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(native_plan.Planner, "plan", lambda *_arguments, **_options: None)
        return values_and_gradients(quantizer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("surrogate", [STE(), Fourier((0.2,)), Fourier((0.0,)), Fourier((0.1, -0.05))])
@pytest.mark.parametrize("shape", [(), (7,), (5, 40), (4, 6, 3, 3), (3, 70_000)])
def test_the_same_bits(
    shape: tuple[int, ...], surrogate: Fourier, signed: bool, dtype: torch.dtype, planned: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    for q_m in (torch.tensor(0.8, dtype=dtype), torch.rand(shape[0], *[1] * (len(shape) - 1), dtype=dtype) + 0.3 if shape else None):
        if q_m is None:
            continue
        quantizer = quantizer_of(q_m, signed=signed, surrogate=surrogate)
        found = values_and_gradients(quantizer, x)
        assert all(map(torch.equal, found, without_a_plan(quantizer, x, monkeypatch)))
    assert planned[0] >= 1


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_in_another_order_of_memory(layout: torch.memory_format, planned: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    grad = torch.randn(2, 8, 5, 5).to(memory_format=layout)
    quantizer = quantizer_of(torch.tensor(1.0))
    results = []
    for plan in (True, False):
        with monkeypatch.context() as patch:
            if not plan:
                patch.setattr(native_plan.Planner, "plan", lambda *_arguments, **_options: None)
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            out = quantizer(leaf)
            out.backward(grad)
            assert leaf.grad is not None
            assert out.is_contiguous(memory_format=torch.channels_last)
            results.append((out.detach(), leaf.grad))
    assert planned[0] == 1
    assert all(map(torch.equal, *results))


def test_a_plan_follows_every_change(planned: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, x = quantizer_of(torch.tensor(0.7)), torch.randn(6, 20)

    def unsigned() -> None:
        quantizer.signed = False

    def surrogate() -> None:
        quantizer.surrogate = Fourier((0.2,))

    def step() -> None:
        quantizer.d.data.mul_(1.7)

    def replaced() -> None:
        quantizer.q_m.data = torch.full((1, 20), 0.5)
        quantizer.d.data = torch.full((1, 20), 0.1)

    changes: list[Callable[[], object]] = [lambda: None, unsigned, surrogate, step, quantizer.double]
    for change in changes:
        change()
        here = x.to(quantizer.d.dtype)
        assert all(map(torch.equal, values_and_gradients(quantizer, here), without_a_plan(quantizer, here, monkeypatch)))
    assert planned[0] == len(changes)
    replaced()
    assert all(map(torch.equal, values_and_gradients(quantizer, here), without_a_plan(quantizer, here, monkeypatch)))
    assert planned[0] == len(changes)


def _nonlinear() -> tuple[Quantizer, Tensor]:
    return quantizer_of(torch.tensor(1.0), linear=False), torch.randn(6, 20)


def _another_surrogate() -> tuple[Quantizer, Tensor]:
    return quantizer_of(torch.tensor(1.0), surrogate=DGE(5.0, 3.0)), torch.randn(6, 20)


def _half() -> tuple[Quantizer, Tensor]:
    return quantizer_of(torch.tensor(1.0)), torch.randn(6, 20).bfloat16()


def _with_gaps() -> tuple[Quantizer, Tensor]:
    return quantizer_of(torch.tensor(1.0)), torch.randn(6, 40)[:, ::2]


def _strength() -> tuple[Quantizer, Tensor]:
    quantizer = quantizer_of(torch.tensor(1.0), surrogate=Fourier((0.2,)))
    quantizer.strength = torch.tensor(0.5)
    return quantizer, torch.randn(6, 20)


def _negated_view() -> tuple[Quantizer, Tensor]:
    return quantizer_of(torch.tensor(1.0)), torch.randn(6, 20, dtype=torch.complex64).conj().imag


@pytest.mark.parametrize("case", [_nonlinear, _another_surrogate, _half, _with_gaps, _strength, _negated_view])
def test_other_cases_have_no_plan(case: Callable[[], tuple[Quantizer, Tensor]], planned: list[int]) -> None:
    quantizer, x = case()
    expected = torch.ops.geta.fake_quantize(x, quantizer.d, quantizer.q_m, quantizer.t, True, quantizer.linear, ())
    assert torch.equal(quantizer(x), expected)
    assert planned[0] == 0


def test_second_derivatives_and_transforms_go_the_long_way(planned: list[int]) -> None:
    quantizer, x = quantizer_of(torch.tensor(1.0), surrogate=STE()), torch.randn(3, 20)
    batched = torch.vmap(lambda row: row * 2)(x)
    assert torch.equal(quantizer(batched), quantizer(x * 2))
    assert planned[0] == 2
    per_row = torch.func.functional_call(quantizer, {"d": quantizer.d.detach() * 2}, (x,))
    assert torch.equal(per_row, torch.ops.geta.fake_quantize(x, quantizer.d * 2, quantizer.q_m, quantizer.t, True, True, ()))
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(quantizer(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fake_quantize_backward|does not require grad"):
        torch.autograd.grad(first.sum(), quantizer.d, allow_unused=False)


def test_copies_and_pickles_start_without_a_plan() -> None:
    quantizer, x = quantizer_of(torch.tensor(1.0)), torch.randn(6, 20)
    expected = quantizer(x)
    for copied in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):  # noqa: S301 - made right here
        assert copied._planner._plan is None
        assert torch.equal(copied(x), expected)
        assert copied._planner._plan is not None


def test_nothing_but_what_the_gradients_need_is_saved() -> None:
    quantizer, x = quantizer_of(torch.tensor(1.0)), nn.Parameter(torch.randn(6, 20))
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quantizer(x)
    assert [tensor.data_ptr() for tensor in saved] == [tensor.data_ptr() for tensor in (x, quantizer.d, quantizer.q_m)]
    saved.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        quantizer(x)
    assert not saved
