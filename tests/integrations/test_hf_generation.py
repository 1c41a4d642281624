"""Greedy decoding with a cache gives the same tokens before and after the cut, and after `from_pretrained`."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import geta
import hf_nets
from geta.graph.configured import tied

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


@pytest.mark.parametrize(("name", "sizes"), [("t5", [3, 4]), ("whisper", [1, 2, 2, 2, 2, 2]), ("bart", [2, 2, 2, 2, 2]), ("llama", [2, 2])])
def test_ties_follow_the_configuration(name, sizes):
    """T5 has one `num_heads` and one `d_ff`; BART and Whisper have numbers for encoder and decoder, and none for heads."""
    graph = analysed(name)[1]
    ties = [[family for family in tie if family.prunable] for tie in tied(graph.model, graph.families)]
    assert sorted(len(tie) for tie in ties if tie) == sizes
    assert all(len({(family.unit, family.size) for family in tie}) == 1 for tie in ties if tie)
    state = torch.random.get_rng_state()
    tied(graph.model, graph.families)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_stays_whole_beside_the_ties_is_named():
    model, example, _ = hf_nets.build("t5")
    graph = geta.analyze(model, (), example, protect="decoder.*.DenseReluDense")
    optimizer = geta.HESSO(torch.optim.SGD(model.parameters(), lr=0.1), graph, sparsity=0.4, schedule=4, uniform=True)
    assert any("uniform: 2 of 4 families that repeat can't be pruned (first: 'decoder.block.0.layer.2" in note for note in optimizer.notes)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_what_one_number_sizes_loses_equal_numbers(name, tmp_path):
    """Ties of names alone would let T5's encoder and decoder lose different numbers. No number says how wide a head of the others is."""
    model, example, given = hf_nets.build(name)
    graph = geta.analyze(model, (), example, prune=None if name == "t5" else "neurons")
    optimizer = geta.HESSO(torch.optim.SGD(model.parameters(), lr=1e-4), graph, sparsity=0.4, schedule=4, uniform=True)
    for _ in range(4):
        optimizer.zero_grad()
        model(**example).logits.square().mean().backward()
        optimizer.step()
    optimizer.check()
    report = geta.save_pretrained(model.eval(), graph, tmp_path)
    assert report.needs_geta == ""
    loaded = getattr(transformers, report.auto_class).from_pretrained(tmp_path)
    assert hf_nets.decoded(loaded, given) == hf_nets.decoded(model, given)
    with torch.no_grad():
        assert torch.allclose(loaded(**example).logits, model(**example).logits, atol=1e-4)
    old, new = model.config.to_dict(), loaded.config.to_dict()
    changed = {key for key in ("d_ff", "num_heads", "encoder_ffn_dim", "decoder_ffn_dim") if old.get(key) != new.get(key)}
    assert changed <= ({"d_ff", "num_heads"} if name == "t5" else {"encoder_ffn_dim", "decoder_ffn_dim"})
    assert changed


def test_a_static_cache_has_the_size_of_each_layer(tmp_path):
    model, graph, given, _ = analysed("llama")
    selection = {f.name: torch.arange(f.size) < (f.size // 2 if ".0." in f.name else 0) for f in graph.prunable_families}
    zeroed = copy.deepcopy(model)
    graph.zero_(zeroed, selection)
    geta.save_pretrained(zeroed, graph, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"cache_implementation": "static"}
    assert hf_nets.decoded(loaded, given, **options) == hf_nets.decoded(zeroed, given, **options) == hf_nets.decoded(zeroed, given)


SCRIPT = f"""{hf_nets.READING}
try:
    read(needing[0])
except ValueError as error:
    assert "geta" in str(error)
else:
    raise AssertionError("the other folders need geta")
import geta.integrations.hf
print(json.dumps(tokens + [read(folder) for folder in needing]))
"""


def blocks(name: str, graph: geta.DependencyGraph, *, even: bool) -> dict[str, torch.Tensor]:
    """Half of the groups; with even=False in the first layer, or the encoder, alone. In llama whole blocks of columns, not so in T5."""
    chosen = {}
    for family in graph.prunable_families:
        part = torch.arange(family.size)
        half = part < family.size // 2 if name == "llama" or family.unit == "neurons" else part % 2 == 0
        first = {"llama": "0", "t5": "encoder"}[name] in family.name.split(".")
        chosen[family.name] = half if even or first else torch.zeros(family.size, dtype=torch.bool)
    return chosen


def grouped(name: str, size: int, *, even: bool) -> tuple[torch.nn.Module, geta.DependencyGraph, dict[str, torch.Tensor]]:
    """A net with two or four blocks of `size` columns per row, 4 and 8 bits, half of whose groups are zero."""
    inner = {"hidden_size": 2 * size, "intermediate_size": 4 * size, "head_dim": size // 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    if name == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**hf_nets.LLAMA, **inner, "num_hidden_layers": 2})).eval()
    else:
        sizes = {"vocab_size": 64, "d_model": 2 * size, "d_kv": size // 2, "d_ff": 4 * size, "num_layers": 1, "num_heads": 4}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **hf_nets.SEQ2SEQ_TOKENS)).eval()
    hf_nets.roughen(model)
    ids = {"input_ids": hf_nets.ids(2, 6)}
    given = {**ids, "attention_mask": torch.ones(2, 6, dtype=torch.long)} if name == "llama" else ids
    graph = geta.analyze(model, (), ids if name == "llama" else {**ids, "decoder_input_ids": hf_nets.ids(2, 4)})
    geta.quantize(model, weights=(4, 8), activations=None, granularity="group", group_size=size)
    for place, quantizer in enumerate(geta.quant.quantizers(model).values()):
        quantizer.project_(4, 4 if place % 2 and name == "llama" else 8)
        quantizer.round_bits_()
    graph.zero_(model, blocks(name, graph, even=even))
    return model, graph, given


@functools.cache
def folders_of_groups(folder: Path) -> dict[str, tuple[str, str, list[list[int]], torch.Tensor]]:
    """Saved nets with a scale per block of columns: name -> (folder, why it needs geta, tokens, logits of the compact model)."""
    found = {}
    for name, size, even in (("llama", 32, True), ("llama", 64, False), ("llama", 128, True), ("t5", 32, True), ("t5", 64, False)):
        model, graph, given = grouped(name, size, even=even)
        where = folder / f"{name} {size}"
        report = geta.save_pretrained(model, graph, where)
        scheme = json.loads((where / "config.json").read_text())["quantization_config"]["config_groups"]
        assert "group" in {group["weights"]["strategy"] for group in scheme.values()}
        torch.save(given, where / "given.pt")
        extra = {} if name == "llama" else {"decoder_input_ids": torch.full((2, 2), 3)}
        small = geta.compact(model, graph) if name == "llama" else geta.compact_eager(model, graph).model
        inputs = {"input_ids": given["input_ids"], **extra}
        with torch.no_grad():
            logits = small(**inputs)["logits"]
        found[where.name] = (str(where), report.needs_geta, hf_nets.decoded(model, given), logits)
    return found


def test_another_process_computes_the_same(tmp_path: Path):
    """Dense and with grouped scales of 4 and 8 bits, in transformers' own classes and in geta's."""
    saved = dict(folders_of_groups(tmp_path))
    model, graph, given, _ = analysed("llama")
    for uniform in (True, False):
        selection = graph.random_selection(0.5 if uniform else (0.25, 0.75), seed=1, uniform=uniform)
        zeroed = copy.deepcopy(model)
        graph.zero_(zeroed, selection)
        where = tmp_path / str(uniform)
        report = geta.save_pretrained(zeroed, graph, where)
        torch.save(given, where / "given.pt")
        with torch.no_grad():
            saved[where.name] = (str(where), report.needs_geta, hf_nets.decoded(zeroed, given), zeroed(**given).logits)
    plain = [name for name, (_, needs, *_) in saved.items() if not needs]
    needing = [name for name in saved if name not in plain]
    assert plain == ["llama 32", "llama 128", "t5 32", "True"]
    lists = [json.dumps([saved[name][0] for name in names]) for names in (plain, needing)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *lists], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    tokens = json.loads(done.stdout.strip().splitlines()[-1])
    for name, found in zip([*plain, *needing], tokens, strict=True):
        where, _, expected, logits = saved[name]
        assert found == expected, name
        torch.testing.assert_close(torch.load(Path(where) / "logits.pt", weights_only=True), logits, rtol=1e-4, atol=1e-4, msg=name)
