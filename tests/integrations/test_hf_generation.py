"""Greedy decoding with a cache gives the same tokens before and after the cut, and after `from_pretrained`."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import geta
import hf_nets

WITH_TRANSFORMERS_ALONE = ["llama", "mistral", "qwen3", "gemma3", "t5"]


@functools.cache
def analysed(name: str):
    model, example, given = hf_nets.build(name)
    return model, geta.analyze(model, (), example), given, hf_nets.decoded(model, given)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("name", hf_nets.NAMES)
def test_decoding_is_the_zeroed_models(name, uniform, tmp_path):
    model, graph, given, dense = analysed(name)
    selection = graph.random_selection(0.5 if uniform else (0.25, 0.75), seed=1, uniform=uniform)
    zeroed = copy.deepcopy(model)
    graph.zero_(zeroed, selection)
    expected = hf_nets.decoded(zeroed, given)
    assert expected != dense, "removing groups changed nothing: the test would be empty"
    report = geta.save_pretrained(model, graph, tmp_path, selection=selection)
    assert bool(report.needs_geta) != (uniform and name in WITH_TRANSFORMERS_ALONE)
    loaded = getattr(transformers, report.auto_class).from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("geta." if report.needs_geta else "transformers.")
    assert isinstance(loaded, type(model))
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    assert hf_nets.decoded(loaded, given) == expected
    if not uniform:
        assert hf_nets.decoded(geta.compact_eager(model, graph, selection).model, given) == expected


def test_a_static_cache_has_the_size_of_each_layer(tmp_path):
    model, graph, given, _ = analysed("llama")
    selection = {f.name: torch.arange(f.size) < (f.size // 2 if ".0." in f.name else 0) for f in graph.prunable_families}
    zeroed = copy.deepcopy(model)
    graph.zero_(zeroed, selection)
    geta.save_pretrained(zeroed, graph, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"cache_implementation": "static"}
    assert hf_nets.decoded(loaded, given, **options) == hf_nets.decoded(zeroed, given, **options) == hf_nets.decoded(zeroed, given)


SCRIPT = """
import json, sys, torch, transformers
plain, other, ids = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
options = dict(attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, min_new_tokens=10)
first = transformers.AutoModelForCausalLM.from_pretrained(plain).generate(ids, **options).tolist()
assert not [name for name in sys.modules if name.partition(".")[0] == "geta"]
try:
    transformers.AutoModelForCausalLM.from_pretrained(other)
except ValueError as error:
    assert "geta" in str(error)
else:
    raise AssertionError("the other folder needs geta")
import geta.integrations.hf
second = transformers.AutoModelForCausalLM.from_pretrained(other).generate(ids, **options).tolist()
print(json.dumps([first, second]))
"""


def test_another_process_decodes_the_same(tmp_path: Path):
    model, graph, given, _ = analysed("llama")
    expected, folders = [], []
    for uniform in (True, False):
        selection = graph.random_selection(0.5 if uniform else (0.25, 0.75), seed=1, uniform=uniform)
        zeroed = copy.deepcopy(model)
        graph.zero_(zeroed, selection)
        expected.append(hf_nets.decoded(zeroed, given))
        folders.append(str(tmp_path / str(uniform)))
        assert bool(geta.save_pretrained(zeroed, graph, folders[-1]).needs_geta) is not uniform
    arguments = [*folders, str(given["input_ids"].tolist())]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == str(expected)
