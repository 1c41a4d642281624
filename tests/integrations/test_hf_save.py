"""`geta.save_pretrained`: what the folder holds, how it loads with every Auto class, and what is refused."""

from __future__ import annotations

import copy
import functools
import json
import pickle

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from torch import nn

import geta
import hf_nets
from geta.errors import BadModelError, ConfigError
from geta.integrations import hf_save
from geta.integrations.hf import GetaConfig

IDS = hf_nets.ids(2, 6)


@pytest.fixture(scope="module")
def llama():
    model, example, _ = hf_nets.build("llama")
    return model, geta.analyze(model, (), example)


def uneven(graph: geta.DependencyGraph) -> dict[str, torch.Tensor]:
    """Half of the groups of the families in the first layer alone."""
    return {f.name: torch.arange(f.size) < (f.size // 2 if "0" in f.name.split(".") else 0) for f in graph.prunable_families}


def zeroed(model, graph, selection):
    copied = copy.deepcopy(model)
    graph.zero_(copied, selection)
    return copied


def output(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def test_a_dense_model_is_saved_as_it_is(llama, tmp_path):
    model, graph = llama
    report = geta.save_pretrained(model, graph, tmp_path)
    assert (report.needs_geta, report.changes, report.max_difference) == ("", [], 0.0)
    assert "loads it with transformers alone" in str(report)
    assert report.bytes == (tmp_path / "model.safetensors").stat().st_size
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(loaded, input_ids=IDS), output(model, input_ids=IDS))


def test_a_folder_is_loaded_saved_copied_and_pickled(llama, tmp_path):
    model, graph = llama
    report = geta.save_pretrained(model, graph, tmp_path / "first", selection=uneven(graph))
    assert report.auto_class == "AutoModelForCausalLM"
    assert "no number in model.config gives every layer its new size" in str(report)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert type(loaded).__name__ == "GetaLlamaForCausalLM"
    assert isinstance(loaded.config, GetaConfig)
    assert isinstance(loaded.config, transformers.LlamaConfig)
    base = loaded.config.base_config
    assert type(base) is transformers.LlamaConfig
    assert (base.intermediate_size, base.num_attention_heads, base.model_type) == (48, 4, "llama")
    assert not hasattr(base, "geta")
    expected = output(zeroed(model, graph, uneven(graph)), input_ids=IDS)
    assert torch.allclose(output(loaded, input_ids=IDS), expected, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    sent = pickle.loads(pickle.dumps(loaded))  # noqa: S301 - as workers of a training get their model
    for other in (again, copy.deepcopy(loaded), sent, type(loaded).from_pretrained(tmp_path / "again")):
        assert type(other) is type(loaded)
        assert torch.equal(output(other, input_ids=IDS), output(loaded, input_ids=IDS))
    wider = copy.deepcopy(loaded)
    wider.resize_token_embeddings(70)
    wider.save_pretrained(tmp_path / "wider")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wider").lm_head.weight.shape == (70, 32)


def test_other_tasks_share_the_backbone(llama, tmp_path):
    model, graph = llama
    geta.save_pretrained(model, graph, tmp_path, selection=uneven(graph))
    causal = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    backbone = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(backbone).__name__ == "GetaLlamaModel"
    hidden = output(backbone, input_ids=IDS)
    assert torch.equal(causal.lm_head(hidden), output(causal, input_ids=IDS))
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier).__name__ == "GetaLlamaForSequenceClassification"
    assert torch.equal(output(classifier.model, input_ids=IDS), hidden)
    classifier.save_pretrained(tmp_path / "classifier")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again.score.weight, classifier.score.weight)
    assert again.num_labels == 3
    backbone.save_pretrained(tmp_path / "backbone")
    assert torch.equal(output(transformers.AutoModel.from_pretrained(tmp_path / "backbone"), input_ids=IDS), hidden)


def test_a_loaded_folder_is_cut_and_saved_again(llama, tmp_path):
    model, graph = llama
    geta.save_pretrained(model, graph, tmp_path / "first", selection=uneven(graph))
    once = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    graph = geta.analyze(once, (), {"input_ids": IDS})
    assert [family.size for family in graph.prunable_families] == [2, 24, 2, 48]
    selection = graph.random_selection(0.5, seed=1)
    report = geta.save_pretrained(once, graph, tmp_path / "second", selection=selection)
    assert (report.auto_class, bool(report.needs_geta)) == ("AutoModelForCausalLM", True)
    twice = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert type(twice) is type(once)
    assert [layer.mlp.up_proj.out_features for layer in twice.model.layers] == [12, 24]
    assert torch.allclose(output(twice, input_ids=IDS), output(zeroed(once, graph, selection), input_ids=IDS), atol=1e-5)


def test_tokenizers_and_pipelines_find_the_model(llama, tmp_path):
    model, graph = llama
    geta.save_pretrained(model, graph, tmp_path, selection=uneven(graph))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {f"{kind}_token": word for kind, word in (("unk", "w0"), ("pad", "w0"), ("eos", "w2"))}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("w5 w6").input_ids == [5, 6]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    (written,) = transformers.pipeline("text-generation", model=str(tmp_path))("w5 w6 w7", max_new_tokens=4, do_sample=False)
    ids = torch.tensor([[5, 6, 7]])
    tokens = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[0, 3:]
    assert written["generated_text"].removeprefix("w5 w6 w7").split() == [f"w{token}" for token in tokens.tolist()]


def vision() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 8, "patch_size": 4}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=5))
    return model, {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def text() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3)), {"input_ids": IDS}


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(("make", "auto"), [(vision, "AutoModelForImageClassification"), (text, "AutoModelForSequenceClassification")])
def test_classifiers(make, auto, uniform, tmp_path):
    torch.manual_seed(0)
    model, inputs = make()
    hf_nets.roughen(model)
    protect = [name for name, _ in model.named_modules() if name.endswith("pooler")]  # no number of a configuration is its width
    graph = geta.analyze(model.eval(), (), inputs, prune="neurons" if uniform else None, protect=protect)
    selection = graph.random_selection(0.5 if uniform else (0.2, 0.8), seed=1, uniform=uniform)
    report = geta.save_pretrained(zeroed(model, graph, selection), graph, tmp_path)
    assert (report.auto_class, bool(report.needs_geta)) == (auto, not uniform)
    loaded = getattr(transformers, auto).from_pretrained(tmp_path)
    expected = output(zeroed(model, graph, selection), **inputs)
    assert (expected - output(model, **inputs)).abs().max() > 1e-3
    assert torch.allclose(output(loaded, **inputs), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_embeddings_and_dtypes_stay(dtype, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**hf_nets._GROUPED, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    graph = geta.analyze(model, (), {"input_ids": IDS})
    geta.save_pretrained(model, graph, tmp_path, selection=uneven(graph))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert "lm_head.weight" not in safetensors.torch.load_file(tmp_path / "model.safetensors")


@functools.cache
def quantized(name: str, *, inputs: bool):
    """A quantized model with final, mixed bit widths, and its graph."""
    model, example, given = hf_nets.build(name)
    graph = geta.analyze(model, (), example)
    geta.quantize(model, weights=(3, 8), **({"calibration": [example]} if inputs else {"activations": None}))
    for place, quantizer in enumerate(geta.quant.quantizers(model).values()):
        width = 3 + place % 6 if quantizer.kind == "weight" else 8
        quantizer.project_(width, width)
        quantizer.round_bits_()
    return model, graph, given


@pytest.mark.parametrize(("inputs", "uniform"), [(True, True), (False, False)])
def test_integer_weights_load_and_decode_as_the_quantized_model(inputs, uniform, tmp_path):
    model, graph, given = quantized("llama", inputs=inputs)
    selection = graph.random_selection(0.5, seed=1) if uniform else uneven(graph)
    report = geta.save_pretrained(model, graph, tmp_path, selection=selection)
    assert bool(report.needs_geta) is not uniform
    assert len(report.packed) == 15
    assert set(report.packed.values()) == {4, 8}
    assert len(report.inputs) == (15 if inputs else 0)
    assert "15 linear layers with weights of 4, 8 bits" in str(report)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.model.layers[0].mlp.up_proj.weight_packed.dtype == torch.int32, "the integers themselves are loaded"
    before = zeroed(model, graph, selection)
    assert hf_nets.decoded(loaded, given) == hf_nets.decoded(before, given)
    if not inputs:
        assert report.max_difference <= 1e-5
        assert torch.allclose(output(loaded, input_ids=IDS), output(before, input_ids=IDS), atol=1e-4)
    else:
        assert any("as many negative as positive integers" in note for note in report.notes)


def test_encoder_decoder_weights_are_unpacked_while_they_load(tmp_path):
    """Generation calls the encoder alone, which transformers would not have unpacked yet."""
    model, graph, given = quantized("t5 of one layer", inputs=False)
    selection = uneven(graph)
    report = geta.save_pretrained(model, graph, tmp_path, selection=selection)
    assert set(report.packed.values()) == {8}, "transformers unpacks all layers as if they had the first one's width"
    assert report.max_difference <= 1e-5
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.encoder.block[0].layer[0].SelfAttention.q.weight.is_floating_point()
    assert hf_nets.decoded(loaded, given) == hf_nets.decoded(zeroed(model, graph, selection), given)


def test_weights_that_the_format_has_no_word_for_are_floats(tmp_path):
    """GPT-2's layers are no `nn.Linear`; the head is tied to an embedding."""
    model, graph, _ = quantized("gpt2", inputs=True)
    report = geta.save_pretrained(model, graph, tmp_path, selection=uneven(graph))
    assert report.packed == {}
    assert "aten.addmm" in report.floating["transformer.h.0.attn.c_attn.weight"]
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert len(report.lost) == 9
    assert "9 quantizers of activations are not in the folder" in str(report)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = zeroed(model, graph, uneven(graph)).transformer.h[1].mlp.c_fc.weight
    assert torch.allclose(loaded.transformer.h[1].mlp.c_fc.weight, expected), "the values of the integers, not the float weights"


def test_an_earlier_models_files_go(llama, tmp_path):
    model, graph = llama
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    geta.save_pretrained(model, graph, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_what_is_refused_leaves_no_file(llama, tmp_path, monkeypatch):
    model, graph = llama
    folder = tmp_path / "new"
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ConfigError, match="Sequential is no model of transformers"):
        geta.save_pretrained(plain, geta.analyze(plain, (torch.randn(2, 4),)), folder)
    with pytest.raises(ConfigError, match="widths is"):
        geta.save_pretrained(model, graph, folder, widths=(1,))

    class Mine(transformers.LlamaForCausalLM):
        pass

    mine = Mine(copy.deepcopy(model.config)).eval()
    with pytest.raises(ConfigError, match="Mine is defined in"):
        geta.save_pretrained(mine, geta.analyze(mine, (), {"input_ids": IDS}), folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        geta.save_pretrained(model, graph, tmp_path / "file" / "folder")
    monkeypatch.setattr(hf_save, "_run", lambda model, graph: [torch.randn(3)])
    with pytest.raises(BadModelError, match="what transformers loads is not the cut model"):
        geta.save_pretrained(model, graph, folder, selection=uneven(graph))
    assert list(folder.iterdir()) == []


def test_a_model_is_captured_without_its_cache():
    """`use_cache` is on by default: the graph product has a result without it, for any batch size, and the setting stays."""
    model, example, _ = hf_nets.build("llama")
    assert model.config.use_cache is True
    graph = geta.analyze(model, (), example)
    assert not any("batch" in note or "path" in note for note in graph.notes), graph.notes
    small = geta.compact(model, graph, uneven(graph))
    assert model.config.use_cache is True
    more = hf_nets.ids(5, 6)
    assert torch.allclose(small(input_ids=more)[0], output(zeroed(model, graph, uneven(graph)), input_ids=more), atol=1e-4)
    assert small.verify(**example, reference=zeroed(model, graph, uneven(graph))) <= 1e-4
