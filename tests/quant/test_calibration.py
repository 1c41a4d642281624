"""Activation ranges measured on batches: the rule, the sign, and that the model stays as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geta.errors import ConfigError
from geta.quant import quantize, quantizers
from geta.quant.calibration import RangeObserver


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def input_quantizers(model: nn.Module, **settings: object) -> dict[str, object]:
    quantize(model, weights=None, exclude=(), **settings)  # type: ignore[arg-type]
    return dict(quantizers(model))


def test_range_is_the_mean_of_the_batches_percentiles() -> None:
    generator = np.random.default_rng(0)
    batches = [generator.standard_normal((40, 50)).astype(np.float32) for _ in range(3)]
    observer = RangeObserver(99.0)
    for observer.batch, batch in enumerate(batches):
        observer.observe(torch.from_numpy(batch[:3]) / 4)  # a smaller input in the same batch doesn't count
        observer.observe(torch.from_numpy(batch))
    wanted = np.mean([np.sort(np.abs(batch).ravel())[math.ceil(0.99 * batch.size) - 1] for batch in batches])
    found = observer.result("layer")
    assert float(found.q_m) == pytest.approx(float(wanted), rel=1e-6)
    assert found.signed


def test_percentile_100_is_the_largest_value_of_all_batches() -> None:
    observer = RangeObserver(100.0)
    observer.observe(torch.tensor([1.0, 2.0]))
    observer.observe(torch.tensor([7.0, 0.0], dtype=torch.bfloat16))
    found = observer.result("layer")
    assert float(found.q_m) == 7.0
    assert not found.signed


@pytest.mark.parametrize(("values", "q_m"), [([0.0] * 999 + [3.0] * 1, 3.0), ([0.0] * 10, 1.0)])
def test_mostly_zero_inputs_still_get_a_range(values: list[float], q_m: float) -> None:
    observer = RangeObserver(99.0)
    observer.observe(torch.tensor(values))
    assert float(observer.result("layer").q_m) == q_m


def test_inputs_below_zero_make_signed_codes() -> None:
    found = quantizers(quantize(small(), weights=None, exclude=(), calibration=[torch.randn(5, 6)]))
    assert {name: quantizer.signed for name, quantizer in found.items()} == {"0:input": True, "4:input": False}


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict"])
def test_all_forms_of_batches(form: str) -> None:
    x = torch.randn(5, 6)
    batch = {"tensor": x, "tuple": (x,), "list": [x], "dict": {"input": x}}[form]
    model = quantize(small(), weights=None, exclude=(), calibration=[batch], percentile=100)
    assert quantizers(model)["0:input"].q_m.item() == pytest.approx(float(x.abs().max()))


def test_only_the_first_batches_are_read() -> None:
    read = []

    def batches() -> Iterator[Tensor]:
        for number in range(1000):
            read.append(number)
            yield torch.full((2, 6), 1.0 + number)

    found = input_quantizers(small(), calibration=batches(), calibration_batches=4, percentile=100)
    assert read == [0, 1, 2, 3]
    assert found["0:input"].q_m.item() == 4.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_buffers_are_put_back(fails: bool) -> None:
    class Counting(nn.Module):
        """A model that counts its calls in a buffer, in every mode, once in place and once by replacing it."""

        def __init__(self) -> None:
            super().__init__()
            self.body = small()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("replaced", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            self.replaced = self.replaced + 1
            return self.body(x)

    model = Counting().train()
    model.body[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {path: module.training for path, module in model.named_modules()}
    replaced = model.replaced
    batches = [torch.randn(5, 6), torch.randn(5, 7) if fails else torch.randn(5, 6)]
    if fails:
        with pytest.raises(ConfigError, match="failed on batch 2"):
            quantize(model, exclude=(), calibration=batches)
        assert list(model.state_dict()) == list(before)
        assert not any(module._forward_pre_hooks for module in model.modules())
    else:
        quantize(model, exclude=(), calibration=batches)
    after = {name.replace("parametrizations.weight.original", "weight"): value for name, value in model.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.replaced is replaced
    assert {path: module.training for path, module in model.named_modules() if path in modes} == modes
    assert all(parameter.grad is None for parameter in model.parameters())


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 4)
        self.unused = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layer_that_no_batch_reaches_is_named() -> None:
    model = Branching()
    with pytest.raises(ConfigError, match=r"no input of 1 layer\(s\) was seen in 2 batch\(es\): 'unused'.*exclude.*activations=None"):
        quantize(model, exclude=(), calibration=[torch.randn(2, 6)] * 2)
    assert quantizers(model) == {}
    quantize(model, exclude=("unused",), calibration=[torch.randn(2, 6)])
    assert list(quantizers(model)) == ["used.weight", "used:input"]


@pytest.mark.parametrize("batches", [torch.randn(2, 6), {"input": torch.randn(2, 6)}, "batches", 3])
def test_one_batch_instead_of_an_iterable_is_refused(batches: object) -> None:
    with pytest.raises(
        ConfigError, match=r"calibration: got one \w+, needed is an iterable of batches; write calibration=\[batch, \.\.\.\]"
    ):
        quantize(small(), exclude=(), calibration=batches)  # type: ignore[arg-type]


def test_no_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match="calibration: no batch was given; pass an iterable with at least one batch"):
        quantize(small(), exclude=(), calibration=[])


def test_batches_with_labels_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"calibration: the model failed on batch 1 \(TypeError.*model\(\*batch\).*leave out labels"):
        quantize(small(), exclude=(), calibration=[(torch.randn(2, 6), torch.zeros(2))])


@pytest.mark.parametrize(("value", "message"), [(math.inf, "infinite or NaN"), (math.nan, "infinite or NaN")])
def test_unusable_inputs_are_named(value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=f"calibration: the input of '0' had {message} values"):
        quantize(small(), exclude=(), calibration=[torch.full((2, 6), value)])


def test_empty_inputs_are_named() -> None:
    with pytest.raises(ConfigError, match="calibration: the input of '0' was empty in every batch"):
        quantize(nn.Sequential(nn.Linear(6, 2)), exclude=(), calibration=[torch.zeros(0, 6)])


def test_missing_calibration_says_what_to_pass() -> None:
    with pytest.raises(ConfigError, match=r"pass calibration=\[batch, \.\.\.\] with real inputs, or activations=None"):
        quantize(small(), exclude=())


def test_useless_calibration_warns() -> None:
    with pytest.warns(UserWarning, match=r"calibration has no effect.*activations=None"):
        quantize(small(), exclude=(), activations=None, calibration=[torch.randn(2, 6)])


@pytest.mark.parametrize(("key", "value"), [("percentile", 10.0), ("percentile", 101.0), ("calibration_batches", 0)])
def test_impossible_settings_are_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: {value} is"):
        quantize(small(), exclude=(), calibration=[torch.randn(2, 6)], **{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_norms_that_have_seen_nothing_use_the_batchs_statistics(seen: bool, training: bool) -> None:
    """Means of zero and variances of one, which nobody measured, made inputs grow from layer to layer."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())), nn.Linear(6, 3))
    x = torch.randn(64, 6)
    with torch.no_grad():
        for layer in model[::3]:
            layer.weight.mul_(20.0)  # type: ignore[union-attr,operator]
    if seen:
        torch.optim.swa_utils.update_bn([x], model)
    model.train(training)
    reference = copy.deepcopy(model).train(not seen)
    last = reference[:-1](x).detach().abs().amax()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    quantizer = input_quantizers(model, calibration=[x], percentile=100.0)["24:input"]
    assert float(quantizer.q_m.detach()) == pytest.approx(float(last), rel=1e-5)  # type: ignore[attr-defined]
    assert float(last) < 10
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training is training for name, module in model.named_modules() if "quantizer" not in name)
