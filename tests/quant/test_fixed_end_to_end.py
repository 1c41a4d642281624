"""Models with quantizers of fixed width, from training to the file on disk."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import geta
from geta.errors import CheckpointError, ConfigError
from geta.export.pack import pack_signs, unpack_signs
from geta.optim import HESSO, Schedule
from geta.quant import DGE, DSQ, STE, FixedBits, Fourier, Surrogate, fixed_quantizers, quantize, quantizers

X = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))
BITS = [1, 1.58, 2, 3, 4, 8]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(
            first=nn.Conv2d(2, 8, 3, padding=1),
            norm=nn.BatchNorm2d(8),
            act=nn.ReLU(),
            second=nn.Conv2d(8, 6, 3),
            act2=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            out=nn.Linear(6, 3),
        )
    )


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The class is which third of the rows is brightest."""
    x = torch.randn(32, 2, 6, 6, generator=torch.Generator().manual_seed(step + 1))
    return x, x.mean(1).view(32, 3, 12).mean(2).argmax(1)


def quantized(bits: float, **settings: object) -> nn.Module:
    arguments = {"weights": FixedBits(bits), "activations": FixedBits(bits), "calibration": [X], "exclude": (), **settings}
    return quantize(net(), **arguments)  # type: ignore[arg-type]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    model.train()
    losses = []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_integers_costs_and_files(bits: float, granularity: str, tmp_path) -> None:
    model = quantized(bits, granularity=granularity).eval()
    width = FixedBits(bits).width
    graph = geta.analyze(model, (X,))
    prunable = {family.name: family.size for family in graph.families if family.prunable}
    assert prunable == ({"first": 8} if bits == 1 else {"first": 8, "second": 6})  # a binary weight can't be zero, a BatchNorm can
    whole, small = geta.compact(model, graph, {}), geta.compact(model, graph, graph.random_selection(0.5, seed=1))
    with torch.no_grad():
        assert torch.equal(whole(X), model(X))
    assert small.info.precision == "float64"
    assert small.info.max_difference <= 1e-12
    assert set(small.bits.values()) == {width}
    assert small.info.signed == {name: not name.startswith(("second:", "out:")) for name in small.bits}
    assert small.net.get_buffer("second.weight_codes").dtype == torch.int8
    dense = geta.cost(model, (X,))
    assert dense.bops == dense.macs * width * width == whole.cost.bops
    assert dense.weight_bytes == whole.cost.weight_bytes
    small.save(tmp_path / "small")
    loaded = geta.load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(loaded(X), small(X))
    assert loaded.cost == small.cost
    assert loaded.info == small.info
    loaded.save(tmp_path / "again")
    for name in ("model.safetensors", "model.json.gz"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_binary_weights_take_one_bit_in_the_file(tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {}
    for bits in (1, 2):
        model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
        quantize(model, weights=FixedBits(bits), activations=None, exclude=())
        x = torch.randn(2, 128)
        small = geta.compact(model, geta.analyze(model, (x,)), {})
        small.save(tmp_path / str(bits))
        sizes[bits] = (tmp_path / str(bits) / "model.safetensors").stat().st_size
    assert sizes[2] - sizes[1] == 2 * 128 * 256 // 8


@pytest.mark.parametrize("count", [0, 1, 8, 21])
def test_signs_round_trip(count: int, monkeypatch) -> None:
    codes = torch.where(torch.arange(count) % 3 == 0, -1, 1).to(torch.int8)
    packed = pack_signs(codes)
    assert packed.numel() == (count + 7) // 8
    assert torch.equal(unpack_signs(packed, (count,), torch.int8), codes)
    monkeypatch.setattr("geta.export.pack._CHUNK", 8)
    assert torch.equal(pack_signs(codes), packed)
    assert torch.equal(unpack_signs(packed, (count,), torch.int8), codes)


def test_what_are_no_signs_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1 and \\+1 alone"):
        pack_signs(torch.tensor([1, 0], dtype=torch.int8))
    packed = pack_signs(torch.ones(5, dtype=torch.int8))
    for damaged in (packed[:0], packed.to(torch.int16), torch.cat([packed, packed])):
        with pytest.raises(CheckpointError, match="damaged"):
            unpack_signs(damaged, (5,), torch.int8)
    with pytest.raises(CheckpointError, match="spare bits"):
        unpack_signs(packed | 0x80, (5,), torch.int8)


def test_a_scale_that_left_its_domain_is_stored_as_it_computes() -> None:
    model = quantized(4).eval()
    with torch.no_grad():
        fixed_quantizers(model)["first.weight"].scale.fill_(-0.3)
    whole = geta.compact(model, geta.analyze(model, (X,)), {})
    with torch.no_grad():
        assert torch.equal(whole(X), model(X))
    assert float(whole.net.get_buffer("first.weight_scale")) > 0


def test_half_precision_models() -> None:
    model = quantized(4).eval().to(torch.bfloat16)
    x = X.to(torch.bfloat16)
    whole = geta.compact(model, geta.analyze(model, (x,)), {})
    with torch.no_grad():
        assert torch.equal(whole(x), model(x))


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4])
@pytest.mark.parametrize("surrogate", [STE(), Fourier(), DSQ(), DGE()], ids=repr)
def test_torch_optimizers_train_it(bits: float, surrogate: Surrogate) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 32), nn.ReLU(), nn.Linear(32, 3))
    quantize(model, weights=FixedBits(bits), activations=FixedBits(bits), calibration=[batch(0)[0]], exclude=(), surrogate=surrogate)
    scales = [quantizer.scale.detach().clone() for quantizer in fixed_quantizers(model).values()]
    losses = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0), 60)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert all(not torch.equal(q.scale, before) for q, before in zip(fixed_quantizers(model).values(), scales, strict=True))


@pytest.mark.parametrize(("bits", "granularity"), [(1, "channel"), (1.58, "tensor"), (2, "channel"), (4, "tensor")])
def test_pruned_while_quantized(bits: float, granularity: str) -> None:
    """HESSO over a network of fixed-width quantizers ends with exactly K zero groups, and the compact model equals the zeroed one."""
    model = quantized(bits, granularity=granularity, surrogate=Fourier())
    graph = geta.analyze(model, (X,))
    schedule = Schedule(30, warmup=5, projection=0, joint=15, joint_periods=3)
    optimizer = HESSO(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), graph, sparsity=0.5, schedule=schedule)
    train(model, optimizer, 30)
    optimizer.check()
    wanted = 4 if bits == 1 else 7
    assert optimizer.target_groups == wanted
    assert sum(int(removed.sum()) for removed in optimizer.selection.values()) == wanted
    for quantizer in fixed_quantizers(model).values():
        assert bool((quantizer.scale > 0).all()), quantizer.name
    small = geta.compact(model, graph)
    kept = {name: len(indices) for name, indices in small.info.kept.items()}
    assert sum(small.info.family_sizes.values()) - sum(kept.values()) == wanted
    assert small.info.max_difference <= 1e-12
    assert set(small.bits.values()) == {FixedBits(bits).width}


def test_learned_widths_still_need_qasso() -> None:
    model = quantize(net(), weights=geta.Bits(4, 8), activations=FixedBits(4), calibration=[X], exclude=())
    graph = geta.analyze(model, (X,))
    with pytest.raises(ConfigError, match="the model has 3 quantizers"):
        HESSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, sparsity=0.5, schedule=20)
    optimizer = geta.QASSO(torch.optim.SGD(model.parameters(), lr=0.05), graph, sparsity=0.5, schedule=20)
    train(model, optimizer, 20)
    optimizer.check()
    small = geta.compact(model, graph)
    assert small.info.max_difference <= 1e-12
    assert {name: small.bits[name] for name in fixed_quantizers(model)} == dict.fromkeys(fixed_quantizers(model), 4)
    assert set(quantizers(model)) < set(small.bits)
