"""Costs of random networks agree with PyTorch's own counter."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from geta.cost import cost
from random_nets import build, random_nets

FUZZING = os.environ.get("GETA_FUZZ_EXAMPLES")
EXAMPLES = 15 if FUZZING is None else max(15, int(FUZZING) // 10)


@pytest.mark.fuzz
@settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=FUZZING is None, suppress_health_check=list(HealthCheck))
@given(random_nets())
def test_random_networks_agree_with_the_flop_counter(spec):
    model, args = build(spec)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args)
    counted = cost(model, args)
    assert 2 * counted.macs == counter.get_total_flops()
    assert counted.params == sum(parameter.numel() for parameter in model.parameters())
    assert counted.bops == 1024 * counted.macs
    assert counted.input_shapes == (tuple(args[0].shape),)
