"""Columns are cut out of weights with one scale per block: zeroed equals compact, blocks get shorter, empty ones lose their scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import geta
from geta.quant import FixedBits, fixed_quantizers, quantizers
from geta.quant.blocks import widths_of
from geta.subnet.compact import compact

SIZE = 16
X = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
BITS: list[Any] = [(4, 8), FixedBits(1.58), FixedBits(3)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 40), nn.Sigmoid(), nn.Linear(40, 4)).eval()


def quantized(model: nn.Module, weights: Any = (4, 8), **settings: Any) -> nn.Module:
    options = {"activations": None, "exclude": (), "granularity": "group", "group_size": SIZE, **settings}
    geta.quantize(model, weights=weights, **options)
    for quantizer in quantizers(model).values():
        with torch.no_grad():
            quantizer.d.copy_(geta.quant.step_size(4.0, quantizer.q_m, quantizer.t, quantizer.signed))
    return model


def llama() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=30, max_position_embeddings=32, use_cache=False, **sizes)
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 30, (2, 7))}


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_embd=48, n_layer=1, n_head=4, n_positions=32, use_cache=False, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(0, 30, (2, 7))}


def blocks_of(model: geta.CompactModel) -> dict[str, list[int]]:
    """Name of an integer weight -> how many columns each of its blocks has."""
    found = {}
    for node in model.programs["eval"].graph.nodes:
        if node.target is torch.ops.geta.dequantize.default:
            codes, scale = (model.tensors()[str(node.args[place].target)] for place in (0, 1))
            blocks = node.kwargs.get("blocks", ())
            axis = 1 if codes.shape[0] == scale.shape[0] else 0
            found[str(node.args[0].target).removesuffix("_codes")] = widths_of(blocks, codes.shape[axis])
            assert sum(found[str(node.args[0].target).removesuffix("_codes")]) == codes.shape[axis]
            assert scale.shape[axis] == len(widths_of(blocks, codes.shape[axis]))
    return found


@pytest.mark.parametrize(("build", "bits"), [(llama, (4, 8)), (gpt2, FixedBits(3))])
def test_pruned_language_models_are_exact(build: Any, bits: Any, tmp_path: Any) -> None:
    model, inputs = build()
    quantized(model, bits)
    graph = geta.analyze(model, (), inputs)
    selection = graph.random_selection(sparsity=0.4, seed=1)
    assert any(bool(remove.any()) for remove in selection.values())
    small = compact(model, graph, selection)
    assert small.info.max_difference < 1e-12  # in float64, against the zeroed model
    lengths = blocks_of(small)
    assert any(len(set(widths)) > 2 for widths in lengths.values())  # uneven ones among them
    with torch.no_grad():
        small.save(tmp_path / "small")
        again = geta.load(tmp_path / "small")
        assert torch.equal(again(**inputs)["logits"], small(**inputs).logits)
    assert blocks_of(again) == lengths
    assert again.cost.weight_bytes == small.cost.weight_bytes


def test_blocks_get_shorter_and_empty_ones_lose_their_scales() -> None:
    model = quantized(net())
    graph = geta.analyze(model, (X,))
    first, second = (family.name for family in graph.prunable_families)
    selection = {first: torch.zeros(48, dtype=torch.bool), second: torch.zeros(40, dtype=torch.bool)}
    selection[first][16:32] = True  # the middle block as a whole
    selection[second][[0, 1, 5, 20]] = True
    small = compact(model, graph, selection)
    assert blocks_of(small) == {"0.weight": [16, 16, 8], "2.weight": [16, 16], "4.weight": [13, 15, 8]}
    kwargs = [node.kwargs for node in small.programs["eval"].graph.nodes if node.target is torch.ops.geta.dequantize.default]
    assert kwargs == [{"blocks": [16]}, {"blocks": [16]}, {"blocks": [13, 15, 8]}]
    before = quantizers(model)["2.weight"].d
    assert torch.equal(small.tensors()["2.weight_scale"], before[~selection[second]][:, [0, 2]])
    scales = sum(tensor.numel() * 4 for name, tensor in small.tensors().items() if name.endswith("_scale"))
    codes = sum(-(-tensor.numel() * 4 // 8) for name, tensor in small.tensors().items() if name.endswith("_codes"))
    biases = sum(tensor.numel() * 4 for name, tensor in small.tensors().items() if name.endswith("bias"))
    assert small.cost.weight_bytes == scales + codes + biases


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_one_block_left_is_one_scale_per_row(bits: Any) -> None:
    model = quantized(net(), bits)
    graph = geta.analyze(model, (X,))
    selection = {family.name: torch.arange(family.size) >= 12 for family in graph.prunable_families}
    small = compact(model, graph, selection)
    assert blocks_of(small) == {"0.weight": [16, 16, 8], "2.weight": [12], "4.weight": [12]}
    assert small.tensors()["4.weight_scale"].shape == (4, 1)
    assert small.info.max_difference < 1e-12


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_fake_quantizers_equal_integers_bitwise(bits: Any) -> None:
    model = quantized(net(), bits)
    graph = geta.analyze(model, (X,))
    selection = graph.random_selection(sparsity=0.4, seed=1)
    fake, integers = (compact(model, graph, selection, integers=wish) for wish in (False, True))
    assert torch.equal(fake(X), integers(X))
    with torch.no_grad():
        assert torch.equal(fake(X), integers(X))  # without the operators' bookkeeping
        graph.zero_(model, selection)
        torch.testing.assert_close(model(X), integers(X))


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_the_eager_product_keeps_quantizers_with_the_columns_left(bits: Any) -> None:
    model = quantized(net(), bits)
    graph = geta.analyze(model, (X,))
    selection = graph.random_selection(sparsity=0.4, seed=3)
    small, eager = compact(model, graph, selection), compact(model, graph, selection, product="eager")
    with torch.no_grad():
        assert torch.equal(eager(X), small(X))
    found = fixed_quantizers(eager) if isinstance(bits, FixedBits) else quantizers(eager)
    shapes = {name: widths_of(quantizer.blocks, eager[int(name[0])].weight.shape[1]) for name, quantizer in found.items()}
    assert shapes == blocks_of(small)
    eager(X).sum().backward()
    assert all(next(quantizer.parameters()).grad is not None for quantizer in found.values())
    assert quantizers(model).keys() == quantizers(eager).keys()


@pytest.mark.parametrize("integers", [True, False])
def test_a_compact_model_is_pruned_again(integers: bool) -> None:
    model = quantized(net())
    graph = geta.analyze(model, (X,))
    once = compact(model, graph, graph.random_selection(sparsity=0.3, seed=1), integers=integers)
    graph = geta.analyze(once, (X,))
    twice = compact(once, graph, graph.random_selection(sparsity=0.3, seed=2))
    assert twice.info.max_difference < 1e-5
    lengths = blocks_of(twice)
    assert max(lengths["net.2.weight"]) < 16


def test_a_graph_from_before_the_quantizers_still_fits() -> None:
    model = net()
    graph = geta.analyze(model, (X,))
    selection = graph.random_selection(sparsity=0.4, seed=1)
    small = compact(quantized(model), graph, selection)
    assert small.info.max_difference < 1e-12
    [branch, *_] = geta.analyze(model, (X,)).quantizers
    assert (branch.kind, branch.granularity) == ("attached", "group")


def test_training_the_graph_product_reaches_the_scales() -> None:
    model = quantized(net())
    graph = geta.analyze(model, (X,))
    small = compact(model, graph, graph.random_selection(sparsity=0.4, seed=1), integers=False).train()
    small(X).square().sum().backward()
    steps = {name: tensor for name, tensor in small.net.named_parameters() if name.endswith(".d")}
    assert len(steps) == 3
    assert all(bool(tensor.grad.abs().sum() > 0) for tensor in steps.values())
