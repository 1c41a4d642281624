"""Weights with one scale per block of columns in every file: the numbers of the compact model, or words where a format has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import geta
from geta.export.cleanup import clean_up, copied
from geta.export.onnx_quant import weight_of
from geta.export.parity import parity, run_file
from geta.quant import quantizers

X = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
KEPT = {"all": slice(None), "even": slice(32, None), "aligned": slice(8, None), "uneven": slice(3, None)}
"""Which of the 96 hidden units stay, in blocks of 32: three of them, two, one that has 24, one that has 29."""


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 40), nn.Linear(40, 24), nn.Linear(24, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(ids)).relu())


def compacted(kept: str, bits: Any = 4, *, product: str = "graph", norm: bool = False, **settings: Any) -> Any:
    """Linear layers of 40 -> 96 -> 96 -> 16 with blocks of 32 columns; the first one's last block has 8."""
    torch.manual_seed(0)
    layers = [nn.Linear(40, 96), nn.BatchNorm1d(96)] if norm else [nn.Linear(40, 96)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 16)).eval()
    if norm:
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].running_mean)
    graph = geta.analyze(model, (X,))
    options = {"activations": None, "exclude": (), "granularity": "group", "group_size": 32, **settings}
    geta.quantize(model, weights=bits, **options)
    for quantizer in quantizers(model).values():
        quantizer.round_bits_()
    selection = {family.name: torch.ones(family.size, dtype=torch.bool) for family in graph.prunable_families}
    for remove in selection.values():
        remove[KEPT[kept]] = False
    return geta.compact(model, graph, selection, product=product)  # type: ignore[call-overload]


def weights(model: geta.CompactModel) -> dict[str, Tensor]:
    network = copied(model.programs["eval"].graph, model.tensors())
    found = [weight_of(network, node) for node in network.graph.nodes]
    return {weight.name.removesuffix("_codes"): weight.values for weight in found if weight is not None}


def gap(found: Any, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize(
    ("kept", "bits"),
    [("all", geta.FixedBits(1)), ("uneven", geta.FixedBits(1.58)), ("even", geta.FixedBits(3)), ("uneven", 5)],
)
def test_saved_and_loaded(kept: str, bits: Any, tmp_path: Path) -> None:
    model = compacted(kept, bits)
    model.save(tmp_path / "one")
    again = geta.load(tmp_path / "one")
    again.save(tmp_path / "two")
    assert torch.equal(again(X), model(X))
    for file in ("manifest.json", "model.json.gz", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    width = bits.width if isinstance(bits, geta.FixedBits) else bits
    codes = [tensor for name, tensor in model.tensors().items() if name.endswith("_codes")]
    others = [tensor for name, tensor in model.tensors().items() if not name.endswith("_codes")]
    sizes = [-(-tensor.numel() * width // 8) for tensor in codes] + [4 * tensor.numel() for tensor in others]
    assert model.cost.weight_bytes == sum(sizes)
    assert sum(sizes) <= (tmp_path / "one" / "model.safetensors").stat().st_size < sum(sizes) + 1000


@pytest.mark.parametrize(("kept", "bits"), [("all", geta.FixedBits(1)), ("uneven", 2), ("even", 4), ("uneven", 8), ("even", 12)])
def test_pt2_computes_bitwise_the_same(kept: str, bits: Any, tmp_path: Path) -> None:
    model = compacted(kept, bits)
    size = model.export_pt2(tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    with torch.no_grad():
        assert torch.equal(module(X)[0], model(X))
    assert size > 0


def operators(path: Path) -> list[tuple[str, int]]:
    """(operator, block size) of every node of an ONNX file."""
    import onnx

    found = []
    for node in onnx.load(path).graph.node:
        sizes = [attribute.i for attribute in node.attribute if attribute.name == "block_size"]
        found.append((node.op_type, sizes[0] if sizes else 0))
    return found


@pytest.mark.parametrize(
    ("kept", "sizes", "activations", "bits"), [("even", [8, 32, 32], None, 4), ("aligned", [8, 8, 8], None, 8), ("uneven", [8], 8, 4)]
)
def test_onnx_dequantizes_in_blocks_where_they_are_even(kept: str, sizes: list[int], activations: Any, bits: int, tmp_path: Path) -> None:
    calibration = None if activations is None else [X]
    model = compacted(kept, bits, activations=activations, calibration=calibration)
    report = model.export_onnx(tmp_path / "model.onnx")
    nodes = operators(tmp_path / "model.onnx")
    assert [size for name, size in nodes if name == "DequantizeLinear" and size] == sizes
    assert ("Gather" in [name for name, _ in nodes]) == (kept == "uneven")
    found = parity(model, [X])
    assert found.largest_step < 1.01
    assert found.output < 1e-5
    assert gap(run_file(tmp_path / "model.onnx", [X])[0], model(X)) < 1e-5 if activations is None else found.flips < 0.05
    assert report.bytes < 30_000
    words = " ".join(report.floating.values())
    if kept == "uneven":
        assert "its weight's blocks of columns are uneven" in words
    elif kept == "aligned":
        assert set(report.floating) == {"0", "2", "4"}
        assert "it is dequantized, in blocks, in front of a product of floats" in words
        import openvino

        exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        compiled = openvino.Core().compile_model(tmp_path / "model.onnx", "CPU", exact)
        assert gap(torch.from_numpy(compiled([X.numpy()])[0]), model(X)) < 1e-5
    [note] = report.notes
    assert "session.qdq_matmulnbits_accuracy_level" in note


def test_onnx_looks_rows_of_integers_and_scales_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Words(), torch.randint(0, 11, (2, 9))
    graph = geta.analyze(model, (ids,))
    geta.quantize(model, weights=4, activations=None, exclude=(), granularity="group", group_size=16)
    for quantizer in quantizers(model).values():
        quantizer.round_bits_()
    small = geta.compact(model, graph, graph.random_selection(sparsity=0.4, seed=0))
    report = small.export_onnx(tmp_path / "model.onnx")
    assert gap(run_file(tmp_path / "model.onnx", [ids])[0], small(ids)) < 1e-5
    assert "embed" not in report.floating
    assert [name for name, _ in operators(tmp_path / "model.onnx")].count("Gather") >= 3


def test_a_batch_norm_goes_into_the_scales_of_its_rows(tmp_path: Path) -> None:
    model = compacted("uneven", norm=True)
    network = copied(model.programs["eval"].graph, model.tensors())
    assert clean_up(network) == ["1"]
    folded = [weight_of(network, node) for node in network.graph.nodes]
    [first] = [weight for weight in folded if weight is not None and weight.name.startswith("0.")]
    assert first.blocks == (32,)
    with torch.no_grad():
        gain = model.tensors()["1.weight"] / (model.tensors()["1.running_var"] + 1e-5).sqrt()
        torch.testing.assert_close(first.values, weights(model)["0.weight"] * gain[:, None])
    report = model.export_onnx(tmp_path / "model.onnx", integers=False)
    assert (report.folded, report.notes) == (["1"], [])
    assert gap(run_file(tmp_path / "model.onnx", [X])[0], model(X)) < 1e-5


def decompressed(folder: Path) -> dict[str, Tensor]:
    """As the format's package reads the file, with its schemes of config.json."""
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    for scheme in config.config_groups.values():
        for path in scheme.targets:
            own = {name: tensors.pop(f"{path}.{name}") for name in ("weight_packed", "weight_scale", "weight_shape")}
            tensors[f"{path}.weight"] = PackedQuantizationCompressor.decompress(own, scheme)["weight"]
    return tensors


@pytest.mark.parametrize(
    ("kept", "groups", "bits"),
    [
        ("even", {"0": 8, "2": 32, "4": 32}, 8),
        ("aligned", {"0": 8, "2": 8, "4": 8}, geta.FixedBits(3)),
        ("uneven", {"0": 8}, 4),
    ],
)
def test_the_package_compressed_tensors_reads_the_same_weights(kept: str, groups: dict[str, int], bits: Any, tmp_path: Path) -> None:
    model = compacted(kept, bits)
    report = model.save_compressed_tensors(tmp_path)
    assert report.groups == groups
    assert sorted(report.packed) == (["0"] if kept == "uneven" else ["0", "2", "4"])
    found = decompressed(tmp_path)
    for name, values in weights(model).items():
        assert torch.equal(found[name], values), name
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    strategies = {path: group["weights"]["strategy"] for group in config.values() for path in group["targets"]}
    assert strategies == {path: "group" if path in groups else "channel" for path in report.packed}
    if kept == "uneven":
        assert report.floating["2.weight"].startswith("its 3 blocks have 29 to 32 columns, which are no groups of one size of at least 8")


@pytest.mark.parametrize("product", ["graph", "eager"])
@pytest.mark.parametrize("int4", [False, True])
def test_torchao_tensors_have_the_scales_of_even_groups(int4: bool, product: str) -> None:
    from geta.export.torchao import to_torchao

    expected = compacted("even")(X)
    found = to_torchao(compacted("even", product=product), int4=int4, inputs=True)
    assert found.converted == {"0": "int8", "2": "int4" if int4 else "int8", "4": "int4" if int4 else "int8"}
    assert found.floating == {}
    assert gap(found.model(X), expected) < 1e-5
    if int4:
        assert found.notes["0"].startswith("no int4: 64 x 40 is no multiple of 16 x 32")
    uneven = to_torchao(compacted("uneven", product=product))
    assert sorted(uneven.floating) == ["2", "4"]
    assert uneven.floating["4"].startswith("its 3 blocks have 29 to 32 columns")
    assert gap(uneven.model(X), compacted("uneven")(X)) < 1e-5


def test_torchao_keeps_wide_groups_and_refuses_integer_inputs() -> None:
    from geta.export.torchao import to_torchao

    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(512, 32)), torch.randn(3, 512)
    geta.quantize(layer, weights=4, activations=8, calibration=[x], exclude=(), granularity="group", group_size=256)
    for quantizer in quantizers(layer).values():
        quantizer.round_bits_()
    product = to_torchao(layer, int4=True)
    assert product.converted == {"0": "int4"}
    assert product.model[0].weight.block_size == [1, 128]
    assert gap(product.model(x), layer(x)) < 1e-4
    product = to_torchao(layer, inputs=True)
    assert product.notes == {"0": "no int8 inputs: its weight has one scale per group of columns, and the kernel sums over all of them"}
    assert gap(product.model(x), layer(x)) < 1e-5
