"""Kept values of weights: used when nothing changed, never when anything did, whatever changed it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import geta
from geta.quant import Bits, Fourier, Quantizer, native_plan, native_reuse, ops

QUANTIZERS = [pytest.param(True, id="linear"), pytest.param(False, id="nonlinear")]


@pytest.fixture(autouse=True)
def _keep_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_reuse, "_LARGE", 0)
    monkeypatch.setattr(native_reuse, "_SMALL", 0)


@pytest.fixture
def computations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often values were computed."""
    counter = [0]
    compute = ops.fake_quantize_values

    def counting(*arguments: object) -> Tensor:
        counter[0] += 1
        return compute(*arguments)

    monkeypatch.setattr(ops, "fake_quantize_values", counting)
    planned = native_plan._values

    def counting_planned(*arguments: object) -> Tensor:
        counter[0] += 1
        return planned(*arguments)

    monkeypatch.setattr(native_plan, "_values", counting_planned)
    return counter


def weight_quantizer(*, linear: bool = True) -> tuple[Quantizer, nn.Parameter]:
    torch.manual_seed(0)
    quantizer = Quantizer("w", "weight", Bits(4, 8), torch.tensor(1.3), linear=linear, initial_bits=5, surrogate=Fourier((0.2,)))
    return quantizer, nn.Parameter(torch.randn(6, 40))


def computed(quantizer: Quantizer, x: Tensor) -> Tensor:
    t = (x, quantizer.d, quantizer.q_m, quantizer.t)
    with torch.no_grad():
        return torch.ops.geta.fake_quantize(*t, quantizer.signed, quantizer.linear, ()).clone()


@pytest.mark.parametrize("linear", QUANTIZERS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_values_are_computed_three_times_and_then_kept(linear: bool, mode: Callable[[], torch.no_grad], computations: list[int]) -> None:
    quantizer, weight = weight_quantizer(linear=linear)
    wanted = computed(quantizer, weight)
    computations[0] = 0
    with mode():
        for _ in range(8):
            assert torch.equal(quantizer(weight), wanted)
    assert computations[0] == 3
    assert quantizer._kept.holds_memory


def change_data(quantizer: Quantizer, weight: nn.Parameter) -> None:
    weight.data.mul_(1.5)


def change_one_element(quantizer: Quantizer, weight: nn.Parameter) -> None:
    weight.data[3, 7] = 1.0 if weight.data[3, 7].item() < 0.0 else -1.0


def change_numpy(quantizer: Quantizer, weight: nn.Parameter) -> None:
    weight.detach().numpy()[2, 2] = 1.0 if weight.data[2, 2].item() < 0.0 else -1.0


def swap_rows(quantizer: Quantizer, weight: nn.Parameter) -> None:
    weight.data.copy_(weight.data.flip(0))


def change_no_grad(quantizer: Quantizer, weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.add_(0.3)


def change_storage(quantizer: Quantizer, weight: nn.Parameter) -> None:
    weight.data = weight.data * 0.7


def change_step(quantizer: Quantizer, weight: nn.Parameter) -> None:
    quantizer.d.data.mul_(1.7)


def change_range(quantizer: Quantizer, weight: nn.Parameter) -> None:
    quantizer.q_m.data.fill_(0.4)


def load_state(quantizer: Quantizer, weight: nn.Parameter) -> None:
    state = quantizer.state_dict()
    state["d"] = state["d"] * 3.0
    quantizer.load_state_dict(state)


def load_state_by_assignment(quantizer: Quantizer, weight: nn.Parameter) -> None:
    state = copy.deepcopy(quantizer.state_dict())
    state["d"] = state["d"] * 3.0
    quantizer.load_state_dict(state, assign=True)


def change_sign(quantizer: Quantizer, weight: nn.Parameter) -> None:
    quantizer.signed = False


def change_kept_values(quantizer: Quantizer, weight: nn.Parameter) -> None:
    with torch.no_grad():
        quantizer(weight).data.zero_()


def step_of(optimizer: type[torch.optim.Optimizer], **settings: bool) -> Callable[[Quantizer, nn.Parameter], None]:
    def change(quantizer: Quantizer, weight: nn.Parameter) -> None:
        weight.grad = torch.ones_like(weight)
        optimizer([weight], lr=0.2, **settings).step()

    change.__name__ = f"{optimizer.__name__}_{'_'.join(settings)}"
    return change


CHANGES = [
    *(change_data, change_one_element, change_numpy, swap_rows, change_no_grad, change_storage, change_step, change_range, load_state),
    *(load_state_by_assignment, change_sign, change_kept_values),
    *(step_of(torch.optim.SGD), step_of(torch.optim.SGD, foreach=True), step_of(torch.optim.SGD, fused=True)),
    *(step_of(torch.optim.AdamW, foreach=True), step_of(torch.optim.AdamW, fused=True)),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("linear", QUANTIZERS)
@pytest.mark.parametrize("uses", [1, 2, 3, 5])
def test_never_stale(change: Callable[[Quantizer, nn.Parameter], None], linear: bool, uses: int) -> None:
    quantizer, weight = weight_quantizer(linear=linear)
    for number in range(3):
        for _ in range(uses):
            before = quantizer(weight).detach().clone()
        change(quantizer, weight)
        wanted = computed(quantizer, weight)
        if number == 0 and change is not change_kept_values:
            assert not torch.equal(before, wanted)
        for _ in range(2):
            assert torch.equal(quantizer(weight), wanted)


def test_a_fused_optimizer_does_not_count_versions() -> None:
    """Why version counters don't decide. Should this fail, PyTorch counts them now."""
    _, weight = weight_quantizer()
    version = weight._version
    step_of(torch.optim.SGD, fused=True)(Quantizer("w", "weight", Bits(4, 8), torch.tensor(1.0)), weight)
    assert weight._version == version


def test_a_loop_that_changes_weights_in_every_step_keeps_nothing(computations: list[int]) -> None:
    quantizer, weight = weight_quantizer()
    optimizer = torch.optim.SGD([weight, *quantizer.parameters()], lr=0.01)
    for _ in range(5):
        quantizer(weight).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not quantizer._kept.holds_memory
    assert computations[0] == 5


@pytest.mark.parametrize("linear", QUANTIZERS)
def test_gradient_accumulation_gives_the_same_gradients_with_fewer_computations(linear: bool, computations: list[int]) -> None:
    def train(keep: bool) -> list[Tensor]:
        quantizer, weight = weight_quantizer(linear=linear)
        quantizer.keep_values = keep
        optimizer = torch.optim.SGD([weight, *quantizer.parameters()], lr=0.01, momentum=0.9)
        inputs = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(1))
        trace = []
        for batches in inputs:
            for batch in batches:
                (quantizer(weight) @ batch).square().sum().backward()
            trace += [tensor.grad.clone() for tensor in (weight, quantizer.d, quantizer.q_m) if tensor.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
        return [*trace, weight.detach(), quantizer.d.detach()]

    plain = train(keep=False)
    assert computations[0] == 12
    kept = train(keep=True)
    assert computations[0] == 12 + 3 + 1 + 1
    assert len(plain) == 11
    assert all(torch.equal(left, right) for left, right in zip(plain, kept, strict=True))


def test_values_in_use_are_not_handed_out_again() -> None:
    """Two forwards before the backward, one result changed in place in between: each has its own memory."""
    quantizer, weight = weight_quantizer()
    for _ in range(3):
        quantizer(weight)
    first = quantizer(weight)
    second = quantizer(weight)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    wanted = first.detach().clone()
    with torch.no_grad():
        second.mul_(2.0)
    assert torch.equal(first, wanted)
    assert torch.equal(quantizer(weight), wanted)


def test_a_result_changed_in_place_is_an_error_where_backward_needs_it() -> None:
    quantizer, weight = weight_quantizer()
    other = torch.randn(6, 40, requires_grad=True)
    for _ in range(3):
        quantizer(weight)
    result = quantizer(weight)
    loss = (result * other).sum()
    with torch.no_grad():
        result.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changing_a_result_in_place_under_autograd() -> None:
    quantizer, weight = weight_quantizer()
    for _ in range(5):
        result = quantizer(weight)
        result.mul_(3.0)
        weight.grad = None
        result.sum().backward()
        assert torch.equal(result, computed(quantizer, weight) * 3.0)
        gradient = weight.grad
        weight.grad = None
        (quantizer(weight) * 3.0).sum().backward()
        assert torch.equal(gradient, weight.grad)


def test_values_kept_in_inference_mode_do_not_reach_autograd() -> None:
    quantizer, weight = weight_quantizer()
    with torch.inference_mode():
        for _ in range(4):
            quantizer(weight)
    result = quantizer(weight)
    assert not result.is_inference()
    (result * weight).sum().backward()
    assert weight.grad is not None


def test_weights_made_in_inference_mode_are_not_kept() -> None:
    with torch.inference_mode():
        quantizer, weight = weight_quantizer()
        for _ in range(4):
            assert torch.equal(quantizer(weight), computed(quantizer, weight))
    assert not quantizer._kept.holds_memory


def test_copies_and_pickles_start_empty() -> None:
    quantizer, weight = weight_quantizer()
    for _ in range(3):
        quantizer(weight)
    assert quantizer._kept.holds_memory
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):  # noqa: S301 - made here
        assert not twin._kept.holds_memory
        assert torch.equal(twin(weight), quantizer(weight))
    assert "_kept" not in "".join(quantizer.state_dict())


def test_memory_is_given_back() -> None:
    quantizer, weight = weight_quantizer()
    for release in (
        quantizer.double,
        lambda: setattr(quantizer, "keep_values", False),
        lambda: [(change_no_grad(quantizer, weight), quantizer(weight)) for _ in range(2)],  # as training does
    ):
        quantizer.keep_values = True
        for _ in range(3):
            quantizer(weight)
        assert quantizer._kept.holds_memory
        release()
        assert not quantizer._kept.holds_memory


def test_activations_and_small_weights_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = Quantizer("x", "activation", Bits(8, 8), torch.tensor(1.0))
    x = torch.randn(100)
    for _ in range(5):
        quantizer(x)
    assert not quantizer._kept.holds_memory
    monkeypatch.setattr(native_reuse, "_LARGE", 32 * 2**20)
    quantizer, weight = weight_quantizer()
    for _ in range(5):
        quantizer(weight)
    assert not quantizer._kept.holds_memory


def test_without_compiled_kernels_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_reuse.native, "fingerprint", lambda *tensors: None)
    quantizer, weight = weight_quantizer()
    for _ in range(5):
        assert torch.equal(quantizer(weight), computed(quantizer, weight))
    assert not quantizer._kept.holds_memory


def net(nonlinear: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
    return geta.quantize(model, activations=None, nonlinear=nonlinear, surrogate=Fourier((0.2,)))


def test_export_and_compilation_of_a_model_with_kept_values() -> None:
    model, x = net(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        for _ in range(4):
            wanted = model(x)
    assert all(quantizer._kept.holds_memory for quantizer in geta.quant.quantizers(model).values())
    targets = [node.target for node in torch.export.export(model, (x,), strict=False).graph.nodes]
    assert targets.count(torch.ops.geta.fake_quantize.default) == 2
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(4):
        assert torch.equal(compiled(x), wanted)
        with torch.no_grad():
            model[0].parametrizations.weight.original.mul_(1.01)  # type: ignore[union-attr,index]
            wanted = model(x)


def test_dispatch_modes_see_the_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    quantizer, weight = weight_quantizer()
    for _ in range(4):
        quantizer(weight)
    with Watch():
        quantizer(weight)
    assert "geta.fake_quantize.default" in seen


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = net(), torch.randn(2, 3, 6, 6, requires_grad=True)
    for _ in range(4):
        model.zero_grad()
        model(x).square().sum().backward()
        wanted = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))


def test_with_the_parametrizations_own_cache() -> None:
    model, x = net(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        wanted = model(x)
        for _ in range(4):
            with parametrize.cached():
                assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("linear", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_node_outside_of_traces_is_the_operator(linear: bool, dtype: torch.dtype) -> None:
    quantizer, weight = weight_quantizer(linear=linear)
    weight = nn.Parameter(weight.detach().to(dtype))
    quantizer.strength = torch.tensor(0.7)
    leaves = (weight, quantizer.d, quantizer.q_m, *(() if linear else (quantizer.t,)))
    grad = torch.randn(6, 40).to(dtype)
    operator = torch.ops.geta.fake_quantize(
        weight, quantizer.d, quantizer.q_m, quantizer.t, True, linear, (0.2,), "fourier", quantizer.strength
    )
    wanted = torch.autograd.grad(operator, leaves, grad)
    for _ in range(5):
        result = quantizer(weight)
        assert torch.equal(result, operator)
        for left, right in zip(torch.autograd.grad(result, leaves, grad), wanted, strict=True):
            assert torch.equal(left, right)


def test_second_derivatives_are_refused_as_by_the_operator() -> None:
    quantizer, weight = weight_quantizer()
    (first,) = torch.autograd.grad(quantizer(weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()
