"""The `compressed-tensors` layout: the format's own package reads the integers and values of the compact model."""

from __future__ import annotations

import json
import logging

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

import geta
from export_nets import CASES, compacted
from geta.export.compressed_tensors import pack_rows, packed_file, save_compressed_tensors


def unpacked(codes: torch.Tensor, bits: int, shape: list[int]) -> torch.Tensor:
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    return unpack_from_int32(codes, bits, torch.Size(shape))


def decompressed(folder) -> dict[str, torch.Tensor]:
    """The file's tensors as the format's package reads them, with its schemes of config.json."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    assert config.format == "pack-quantized"
    for scheme in config.config_groups.values():
        for path in scheme.targets:
            own = {name: tensors.pop(f"{path}.{name}") for name in ("weight_packed", "weight_scale", "weight_shape")}
            tensors[f"{path}.weight"] = PackedQuantizationCompressor.decompress(own, scheme)["weight"]
    return tensors


def values(model: geta.CompactModel, name: str) -> torch.Tensor:
    tensors = model.tensors()
    return torch.ops.geta.dequantize(tensors[f"{name}_codes"], tensors[f"{name}_scale"], model.bits[name])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("columns", [1, 31, 32, 45, 96])
def test_our_packing_is_the_packages(bits, columns):
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (5, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    codes[0, 0], codes[-1, -1] = -half, half - 1
    packed = pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpacked(packed, bits, [5, columns]), codes)


@pytest.mark.parametrize(
    ("name", "packed", "floating"),
    [
        ("attention", ["qkv", "proj", "up", "down"], []),
        ("words", ["mix", "head"], ["embed.weight"]),
        ("words of few bits", ["mix", "head"], ["embed.weight"]),
        ("residual", ["head"], ["stem.0.weight", "conv1.weight", "conv2.weight"]),
        ("weights only, per channel", ["0", "3", "5"], []),
        ("nonlinear", ["0", "3", "5"], []),
        ("fixed", ["0", "3", "5"], []),
    ],
)
def test_the_package_reads_the_same_weights(name, packed, floating, tmp_path):
    model = compacted(name)
    report = model.save_compressed_tensors(tmp_path)
    assert sorted(report.packed) == sorted(packed)
    assert sorted(report.floating) == sorted(floating)
    assert report.bytes == (tmp_path / "model.safetensors").stat().st_size
    found = decompressed(tmp_path)
    for path in packed:
        assert torch.equal(found[f"{path}.weight"], values(model, f"{path}.weight")), path
    for tensor in floating:
        assert torch.equal(found[tensor], values(model, tensor))
    others = [n for n in model.tensors() if "quantizer" not in n and not n.endswith(("_codes", "_scale"))]
    assert others
    for tensor in others:
        assert torch.equal(found[tensor], model.tensors()[tensor])
    assert not [n for n in found if "quantizer" in n or n.endswith("_codes")]


def test_a_weight_keeps_its_codes_in_the_next_wider_width(tmp_path):
    model = compacted("words of few bits")
    assert {model.bits[f"{path}.weight"] for path in ("mix", "head")} <= {3, 4}
    assert set(model.save_compressed_tensors(tmp_path).packed.values()) == {4}
    report = save_compressed_tensors(model, tmp_path, widths=(8, 3))
    assert report.packed == {path: 3 if model.bits[f"{path}.weight"] == 3 else 8 for path in ("mix", "head")}
    found = decompressed(tmp_path)
    assert all(torch.equal(found[f"{path}.weight"], values(model, f"{path}.weight")) for path in report.packed)


def test_too_wide_weights_are_floats_and_named(tmp_path):
    model = compacted("words")
    assert model.bits["mix.weight"] == 8
    with pytest.raises(geta.BadModelError, match=r"'mix.weight': it has 8 bits and widths are \[2, 4\]"):
        model.save_compressed_tensors(tmp_path / "none", widths=(2, 4))
    assert not (tmp_path / "none").exists()
    with pytest.raises(geta.BadModelError, match="its codes need 12 bits with a sign"):
        compacted("12 bits").save_compressed_tensors(tmp_path)


def test_quantized_inputs_are_in_the_configuration_or_named(tmp_path):
    model = compacted("words")
    report = model.save_compressed_tensors(tmp_path)
    assert report.inputs == {"mix": 8, "head": 8}
    assert report.lost == {}
    assert "'mix:input'" in report.notes[0]
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    groups = {path: group["input_activations"] for group in config["config_groups"].values() for path in group["targets"]}
    assert (groups["mix"]["symmetric"], groups["mix"]["dynamic"], groups["mix"]["num_bits"]) == (True, False, 8)
    assert groups["head"]["symmetric"] is False  # never negative: behind a ReLU
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert tensors["mix.input_scale"].tolist() == [model.tensors()["mix.input_quantizer.d"].item()]
    assert tensors["head.input_zero_point"].tolist() == [-128]
    report = compacted("nonlinear").save_compressed_tensors(tmp_path)
    assert report.lost["0:input"] == "it has an exponent (nonlinear=True)"
    report = compacted("residual").save_compressed_tensors(tmp_path)
    assert report.inputs == {"head": 8}
    assert report.lost["conv1:input"] == "it is not the input of a packed linear layer"
    assert any(name.endswith(":output") for name in report.lost)


def test_inputs_can_be_left_out_for_a_reason():
    model = compacted("words")
    file = packed_file(model, [8], no_inputs="nobody asked")
    assert (file.inputs, file.input_bits) == ({}, {})
    assert file.lost == {"mix:input": "nobody asked", "head:input": "nobody asked"}
    assert not [name for name in file.tensors if "input_" in name]
    assert all(group["input_activations"] is None for group in file.config["config_groups"].values())
    assert set(file.packed.values()) == {8}


@pytest.mark.parametrize("name", ["words", "fixed", "attention"])
def test_the_package_quantizes_inputs_as_we_do(name, tmp_path):
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    model = compacted(name)
    report = model.save_compressed_tensors(tmp_path)
    config = QuantizationConfig.model_validate(json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    stored, tensors = safetensors.torch.load_file(tmp_path / "model.safetensors"), model.tensors()
    nodes = {str(n.meta.get("module_path")): n for n in model.programs["eval"].graph.nodes if "quantize" in str(n.target)}
    for scheme in config.config_groups.values():
        for path in scheme.targets:
            node = nodes[f"{path}.input_quantizer"]
            scale = stored[f"{path}.input_scale"]
            x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * scale * 90
            parameters = [tensors[str(arg.target)] if isinstance(arg, torch.fx.Node) else arg for arg in node.args[1:]]
            mine, theirs = (
                node.target(x, *parameters),
                fake_quantize(x, scale, stored.get(f"{path}.input_zero_point"), scheme.input_activations),
            )
            below = x < -127 * scale  # the format has one integer more there
            assert (mine - theirs)[below].abs().max() < 1.01 * scale
            assert ((mine - theirs)[~below].abs() > scale / 2).float().mean() < 1e-3  # x / d and x / d - 128 may round differently
    assert report.inputs


@pytest.fixture(scope="module")
def llama():
    """A quantized Llama cut to half its heads and neurons: (dense, compact, configuration of the compact one, ids)."""

    def make(*, tied: bool = False, activations: bool = True):
        geta.seed_everything(0)
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            use_cache=False,
        )
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.randint(0, 64, (2, 8))
        graph = geta.analyze(model, (), {"input_ids": ids})
        options = {"calibration": [{"input_ids": ids}]} if activations else {"activations": None}
        geta.quantize(model, weights=(3, 8), **options)
        for place, quantizer in enumerate(geta.quant.quantizers(model).values()):
            width = 3 + place % 6 if quantizer.kind == "weight" else 8
            quantizer.project_(width, width)
            quantizer.round_bits_()
        halves = {f.name: torch.arange(f.size) % 2 == 0 for f in graph.families if "mlp" in f.name or "self_attn" in f.name}
        assert len(halves) == 4
        return geta.compact(model, graph, halves), geta.compact(model, graph, halves, product="eager").config, ids

    return make


@pytest.mark.parametrize("activations", [False, True])
def test_transformers_loads_the_folder_and_computes_the_same_logits(llama, activations, tmp_path, caplog):
    small, config, ids = llama(activations=activations)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 32)
    config.save_pretrained(tmp_path)
    report = small.save_compressed_tensors(tmp_path)
    assert len(report.packed) == 15
    assert set(report.packed.values()) == {4, 8}
    assert [*report.floating] == ["model.embed_tokens.weight"]
    assert len(report.inputs) == (15 if activations else 0)
    with caplog.at_level(logging.ERROR):
        model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        with torch.no_grad():
            found, expected = model(input_ids=ids).logits, small(input_ids=ids).logits
    assert not any(info.values()), info
    own = dict(model.named_parameters())
    for path in report.packed:
        assert torch.equal(own[f"{path}.weight"], values(small, f"{path}.weight")), path
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_tied_head_stays_with_its_embedding(llama, tmp_path):
    small, config, ids = llama(tied=True, activations=False)
    config.save_pretrained(tmp_path)
    report = small.save_compressed_tensors(tmp_path)
    assert "lm_head" not in report.packed
    assert "it is read by an embedding" in report.floating["model.embed_tokens.weight"]
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["quantization_config"]["ignore"] == ["lm_head"]
    assert settings["model_type"] == "llama"
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, small(input_ids=ids).logits, atol=1e-6)


def test_attention_of_torch_is_named(tmp_path):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    model, x = Net().eval(), torch.randn(2, 5, 16)
    graph = geta.analyze(model, (x,))
    geta.quantize(model, weights=geta.FixedBits(4), activations=None, exclude=())
    report = geta.compact(model, graph).save_compressed_tensors(tmp_path)
    assert report.packed == {"head": 4}
    assert sorted(report.floating) == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert "not the weight of a linear layer of its own" in report.floating["attention.out_proj.weight"]


def test_a_file_has_the_size_of_its_bits(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512)), torch.randn(2, 512)
    graph = geta.analyze(model, (x,))
    geta.quantize(model, weights=geta.FixedBits(4), activations=None)
    small = geta.compact(model, graph)
    assert small.save_compressed_tensors(tmp_path).bytes < 1.05 * small.cost.weight_bytes


def test_errors_leave_the_folder_as_it_was(tmp_path):
    model = compacted("perceptron")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(geta.ConfigError, match="holds no JSON object"):
        model.save_compressed_tensors(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(geta.ConfigError, match="is no JSON"):
        model.save_compressed_tensors(tmp_path)
    for widths in ((), (1,), (9,), (4.0,)):
        with pytest.raises(geta.ConfigError, match="widths is"):
            model.save_compressed_tensors(tmp_path, widths=widths)
    (tmp_path / "file").write_text("")
    with pytest.raises(geta.ConfigError, match="can't be"):
        model.save_compressed_tensors(tmp_path / "file" / "folder")
    torch.manual_seed(0)
    case = CASES["perceptron"]
    net, x = case.build(), torch.randn(*case.shape)
    graph = geta.analyze(net, (x,))
    geta.quantize(net, weights=geta.FixedBits(4), activations=None)
    with pytest.raises(geta.BadModelError, match=r"geta.compact\(integers=True\)"):
        geta.compact(net, graph, integers=False).save_compressed_tensors(tmp_path / "new")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "file"]
