"""`geta.save_pretrained` of models with fewer layers: transformers loads and decodes them, in other processes too."""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import geta
import hf_nets
from depth_nets import Wrapped
from geta.errors import BadModelError

GROUPED = {**hf_nets._GROUPED, "num_hidden_layers": 4}
DEEP: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**GROUPED, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, **hf_nets.SEQ2SEQ_TOKENS)
    ),
}
BLOCKS = {
    "llama": ("model.layers.1",),
    "gpt2": ("transformer.h.0", "transformer.h.2"),
    "gemma3": ("model.layers.0", "model.layers.2"),
    "t5": ("encoder.block.2", "decoder.block.1"),
}


@functools.cache
def deep(name: str) -> tuple[Any, geta.DependencyGraph, dict[str, Tensor]]:
    """(model, graph, the inputs that it generates from)."""
    torch.manual_seed(0)
    model = DEEP[name]().eval()
    hf_nets.roughen(model)
    inputs = {"input_ids": hf_nets.ids(2, 6)}
    example = {**inputs, "decoder_input_ids": hf_nets.ids(2, 4)} if name == "t5" else inputs
    given = inputs if name == "t5" else {**inputs, "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    return model, geta.analyze(model, (), example, depth=True), given


def without(graph: geta.DependencyGraph, blocks: tuple[str, ...], share: float | tuple[float, float] = 0.0) -> dict[str, Tensor]:
    """The selection of these blocks, and of this share of everything else."""
    rest = graph.random_selection(share, seed=1, uniform=isinstance(share, float))
    layers = {family.name: torch.tensor([family.block in blocks]) for family in graph.prunable_families if family.is_layer}
    return {**rest, **layers}


def zeroed(model: Any, graph: geta.DependencyGraph, selection: dict[str, Tensor]) -> Any:
    copied = copy.deepcopy(model)
    graph.zero_(copied, selection)
    return copied


@pytest.mark.parametrize("name", DEEP)
def test_decoding_with_fewer_layers_is_the_zeroed_models(name: str) -> None:
    """The caches of keys and values, dynamic and static, have an entry per layer that is left."""
    model, graph, given = deep(name)
    selection = without(graph, BLOCKS[name])
    product = geta.compact_eager(model, graph, selection)
    assert product.undescribed == ""
    expected = hf_nets.decoded(zeroed(model, graph, selection), given)
    assert expected != hf_nets.decoded(model, given), "the blocks do nothing: the test would be empty"
    assert hf_nets.decoded(product.model, given) == expected
    if name != "t5":
        assert hf_nets.decoded(product.model, given, cache_implementation="static") == expected
        cache = product.model(**given, use_cache=True).past_key_values
        assert len(cache.layers) == 4 - len(BLOCKS[name])
    before, after = model.config.to_dict(), product.model.config.to_dict()
    changed = {key: after[key] for key in before if before[key] != after[key]}
    assert (
        changed
        == {
            "llama": {"num_hidden_layers": 3},
            "gpt2": {"n_layer": 2},
            "gemma3": {"num_hidden_layers": 2, "layer_types": ["full_attention", "full_attention"]},
            "t5": {"num_layers": 2, "num_decoder_layers": 2},
        }[name]
    )
    assert model.config.to_dict() == before


SCRIPT = f"""{hf_nets.READING}
import geta.integrations.hf
print(json.dumps(tokens + [read(folder) for folder in needing]))
"""


def test_another_process_loads_fewer_layers(tmp_path: Path) -> None:
    """Widths that one configuration says, packed integers, and widths of each layer's own, for which geta's class is needed."""
    saved: dict[str, tuple[str, list[list[int]], Tensor]] = {}
    for name, share, quantized in (
        ("llama", 0.0, False),
        ("gpt2", 0.0, False),
        ("gemma3", 0.5, False),
        ("t5", 0.5, False),
        ("llama", 0.5, True),
        ("llama", (0.2, 0.7), False),
        ("gpt2", (0.2, 0.7), True),
    ):
        model, graph, given = deep(name)
        if quantized:
            model = copy.deepcopy(model)
            graph = geta.analyze(model, (), {"input_ids": given["input_ids"]}, depth=True)
            geta.quantize(model, weights=geta.Bits(8, 8), activations=None)
            for quantizer in geta.quant.quantizers(model).values():
                quantizer.project_(8, 8)
                quantizer.round_bits_()
        selection = without(graph, BLOCKS[name], share)
        where = tmp_path / f"{name} {share} {quantized}"
        report = geta.save_pretrained(model, graph, where, selection=selection)
        assert bool(report.packed) is (quantized and name == "llama")  # GPT-2 has layers of its own, which the format doesn't know
        torch.save(given, where / "given.pt")
        reference = zeroed(model, graph, selection)
        extra = {"decoder_input_ids": torch.full((2, 2), 3)} if name == "t5" else {}
        with torch.no_grad():
            saved[str(where)] = (report.needs_geta, hf_nets.decoded(reference, given), reference(**given, **extra).logits)
    plain = [where for where, (needs, *_) in saved.items() if not needs]
    needing = [where for where in saved if where not in plain]
    assert [Path(where).name for where in needing] == ["llama (0.2, 0.7) False", "gpt2 (0.2, 0.7) True"]
    lists = [json.dumps(plain), json.dumps(needing)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *lists], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    tokens = json.loads(done.stdout.strip().splitlines()[-1])
    for where, found in zip([*plain, *needing], tokens, strict=True):
        _, expected, logits = saved[where]
        assert found == expected, where
        torch.testing.assert_close(torch.load(f"{where}/logits.pt", weights_only=True), logits, atol=2e-5, rtol=1e-4)
    names = set(hf.AutoConfig.from_pretrained(plain[0]).to_dict())
    assert "geta" not in names


def test_a_cut_model_loses_layers_later(tmp_path: Path) -> None:
    """The record of what no configuration says follows: `layers.3` is `layers.2` then."""
    model, graph, given = deep("llama")
    geta.save_pretrained(model, graph, tmp_path / "first", selection=without(graph, (), (0.2, 0.7)))
    once = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    graph = geta.analyze(once, (), {"input_ids": given["input_ids"]}, depth=True)
    selection = without(graph, ("model.layers.1",))
    report = geta.save_pretrained(once, graph, tmp_path / "second", selection=selection)
    assert "config.num_hidden_layers: 4 -> 3" in report.changes
    twice = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert type(twice) is type(once)
    assert [layer.mlp.up_proj.out_features for layer in twice.model.layers] == [
        layer.mlp.up_proj.out_features for place, layer in enumerate(once.model.layers) if place != 1
    ]
    assert hf_nets.decoded(twice, given) == hf_nets.decoded(zeroed(once, graph, selection), given)


def test_what_can_not_go_is_named(tmp_path: Path) -> None:
    model, graph, _ = deep("llama")
    names = [family.name for family in graph.families if family.block == "model.layers.2"]
    half = {**without(graph, ()), names[1]: torch.tensor([True])}
    words = f"'{names[1]}' is removed, but '{names[0]}' is still there. Remove all branches of a block or none"
    with pytest.raises(BadModelError, match=re.escape(words)):
        geta.save_pretrained(model, graph, tmp_path, selection=half)
    small = {"vocab_size": 50, "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    bert = hf.BertForMaskedLM(hf.BertConfig(**small)).eval()
    graph = geta.analyze(bert, (), {"input_ids": hf_nets.ids(2, 6) % 50}, depth=True)
    every = {family.name: torch.tensor([".1" in family.name]) for family in graph.prunable_families if family.is_layer}
    words = (
        "'bert.encoder.layer.1.attention (layer)' is part of none that can go: 'bert.encoder.layer.1' still computes layer_norm at "
        "'bert.encoder.layer.1.attention.output.LayerNorm' without its branches"
    )
    with pytest.raises(BadModelError, match=re.escape(words)):
        geta.save_pretrained(bert, graph, tmp_path, selection=every)
    assert not [*tmp_path.iterdir()]


def test_what_depends_on_its_number_has_no_folder(tmp_path: Path) -> None:
    """GPT-2 may divide attention by the number of the layer when it is built: a configuration with fewer layers builds another model."""
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True)).eval()
    hf_nets.roughen(model)
    graph = geta.analyze(model, (), {"input_ids": hf_nets.ids(2, 6)}, depth=True)
    selection = without(graph, ("transformer.h.1",))
    product = geta.compact_eager(model, graph, selection)
    assert product.model.transformer.h[1].attn.scaling == model.transformer.h[2].attn.scaling
    given = {"input_ids": hf_nets.ids(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    assert hf_nets.decoded(product.model, given) == hf_nets.decoded(zeroed(model, graph, selection), given)
    with pytest.raises(BadModelError, match=r"because with config\.n_layer: 3 -> 2 it doesn't run as the zeroed model does, in 'transf"):
        geta.save_pretrained(model, graph, tmp_path, selection=selection)
    last = without(graph, ("transformer.h.2",))
    assert geta.save_pretrained(model, graph, tmp_path, selection=last).needs_geta == ""


def test_settings_that_follow_from_the_number_follow(tmp_path: Path) -> None:
    """Backbones name their stages in the configuration, the last of them as what comes out."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "mlp_ratio": 2}
    model = hf.Dinov2ForImageClassification(hf.Dinov2Config(**sizes)).eval()
    example = {"pixel_values": torch.randn(2, 3, 16, 16)}
    graph = geta.analyze(model, (), example, depth=True)
    report = geta.save_pretrained(model, graph, tmp_path, selection=without(graph, ("dinov2.encoder.layer.1",)))
    assert "config._out_features: ['stage3'] -> ['stage2']" in report.changes
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert (loaded.config.num_hidden_layers, loaded.config.out_features) == (2, ["stage2"])


def test_without_a_number_there_is_no_folder(tmp_path: Path) -> None:
    """Blocks that were added to the class's own: the eager product exists, and says why no folder does."""
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**hf_nets.LLAMA)).eval()
    model.lm_head = nn.Sequential(Wrapped(nn.Linear(32, 32)), Wrapped(nn.Linear(32, 32)), model.lm_head)
    hf_nets.roughen(model)
    graph = geta.analyze(model, (), {"input_ids": hf_nets.ids(2, 6)}, depth=True)
    selection = without(graph, ("lm_head.0",))
    product = geta.compact_eager(model, graph, selection)
    assert len(product.model.lm_head) == 2
    assert product.undescribed == "no number in model.config says how many layers there are"
    assert product.notes[-1].endswith(product.undescribed)
    words = (
        "there is no folder for this LlamaForCausalLM with fewer layers (lm_head: 3 -> 2 (without 0)), because no number in model.config"
    )
    with pytest.raises(BadModelError, match=re.escape(words)):
        geta.save_pretrained(model, graph, tmp_path, selection=selection)
