"""Budgets through the compressor: the real compact network of transformers, residual and random networks is within them."""

from __future__ import annotations

import os

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import geta
from geta.errors import ConfigError, GetaError
from nets import NETS
from random_nets import build, random_nets

FUZZING = os.environ.get("GETA_FUZZ_EXAMPLES")
EXAMPLES = 8 if FUZZING is None else max(8, int(FUZZING) // 10)
STEPS = 6
SCHEDULE = geta.Schedule(STEPS, warmup=1, projection=1, joint=2, projection_periods=1, joint_periods=1)


def compressed(model, args, kwargs, product="graph", **options) -> tuple[geta.CompactModel, geta.QASSO]:
    compressor = geta.Compressor(model, args, kwargs, **options)
    optimizer = compressor.optimizer(torch.optim.SGD, lr=1e-3, schedule=SCHEDULE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        outputs = [one for one in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(one, torch.Tensor)]
        torch.stack([one.square().mean() for one in outputs if one.is_floating_point()]).sum().backward()
        optimizer.step()
    return compressor.finish(product), optimizer


def shares(small: geta.CompactModel) -> dict[str, float]:
    ratios = small.cost.relative_to(geta.Cost.from_json(small.info.dense_cost))
    return {**ratios, "bytes": ratios["weight_bytes"]}


@pytest.mark.parametrize(
    ("name", "budget", "quantized"),
    [
        ("bert", {"bops": 0.035, "bytes": 0.3}, True),
        ("bert", {"macs": 0.6}, False),
        ("resnet20_conv", {"bops": 0.01}, True),
    ],
)
def test_well_known_networks_come_close_to_their_budget(name, budget, quantized):
    model, args, kwargs = NETS[name]()
    bits = {"weight_bits": (4, 8), "activation_bits": (4, 8), "calibration": [kwargs or args]} if quantized else {"weight_bits": None}
    small, optimizer = compressed(model, args, kwargs, target=geta.Budget(**budget), **bits)
    reached = shares(small)
    assert all(reached[kind] <= share for kind, share in budget.items())
    assert max(reached[kind] / share for kind, share in budget.items()) > 0.97
    assert 0 < optimizer.target_groups < optimizer.progress()["groups"]


@pytest.mark.fuzz
@settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=FUZZING is None, suppress_health_check=list(HealthCheck))
@given(random_nets(), st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.sampled_from(["bops", "macs", "params", "bytes"]), st.booleans())
def test_random_budgets_on_random_networks_are_met_or_refused(spec, first, second, kind, quantized):
    model, args = build(spec)
    bits = {"weight_bits": (3, 8), "exclude": ()} if quantized else {"weight_bits": None}
    budget = {"bops": first, kind: second}
    try:
        small, _ = compressed(model, args, {}, target=geta.Budget(**budget), **bits)
    except ConfigError as error:
        assert "the budget can't be met" in str(error)  # noqa: PT017 - one of the two outcomes
        assert "smallest reachable" in str(error)  # noqa: PT017
    else:
        assert all(shares(small)[name] <= share for name, share in budget.items())


def test_the_compressor_wants_one_kind_of_target():
    model, args, _ = NETS["vgg7_bn"]()
    for settings_ in ({}, {"sparsity": 0.5, "target": geta.Budget(macs=0.5)}):
        with pytest.raises(ConfigError, match="exactly one of sparsity"):
            geta.Compressor(model, args, **settings_)


@pytest.mark.parametrize("product", ["graph", "eager"])
def test_a_compact_network_above_the_budget_is_not_handed_out(product, monkeypatch):
    model, args, kwargs = NETS["vgg7_bn"]()
    whole = geta.cost(model, args)
    monkeypatch.setattr(geta.CompactModel, "cost", property(lambda _self: whole))
    with pytest.raises(GetaError, match="the budget is missed"):
        compressed(model, args, kwargs, product, target=geta.Budget(macs=0.5), weight_bits=None)
