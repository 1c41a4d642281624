"""Random compact networks survive saving, bit by bit."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import HealthCheck, given, settings

import geta
from geta.export.files import read_folder
from geta.export.storage import load, save
from random_nets import build, random_nets

FUZZING = os.environ.get("GETA_FUZZ_EXAMPLES")
EXAMPLES = 6 if FUZZING is None else max(6, int(FUZZING) // 20)


@pytest.mark.fuzz
@settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=FUZZING is None, suppress_health_check=list(HealthCheck))
@given(random_nets(dtypes=("float32", "float64")))
def test_random_networks_survive(spec):
    model, args = build(spec)
    graph = geta.analyze(model, args)
    small = geta.compact(model, graph, graph.random_selection(0.5, seed=1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        first, second = Path(folder, "first"), Path(folder, "second")
        save(small, first)
        loaded = load(first)
        save(loaded, second)
        assert read_folder(first) == read_folder(second)
        for training in (False, True):
            results = []
            for net in (small, loaded):
                torch.manual_seed(0)
                results.append(pytree.tree_leaves(net.train(training)(*args)))
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))
            assert len(results[0]) == (1 if spec["tap"] is None else 2)
