"""The eager product of Hugging Face models: the configuration follows where one can, and models save and load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nets
from eager_checks import first_of, outputs, zeroed
from geta.graph import analyze
from geta.subnet import compact, compact_eager
from geta.subnet.comparison import max_difference


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    model, _, kwargs = nets.NETS["bert"]()
    return model, kwargs


def test_bert_saves_and_loads(tmp_path: Path) -> None:
    model, kwargs = bert()
    graph = analyze(model, (), kwargs)
    neurons = {f.name: torch.arange(f.size) % 2 == 1 for f in graph.prunable_families if f.size == 64}
    assert len(neurons) == 2
    small = compact(model, graph, neurons, product="eager")
    assert small.config.intermediate_size == 32 and model.config.intermediate_size == 64
    check_saved(small, kwargs, tmp_path)


def test_llama_saves_and_loads(tmp_path: Path) -> None:
    """Its configuration can say the number of heads apart from their width."""
    model, _, kwargs = nets.NETS["llama_gqa"]()
    graph = analyze(model, (), kwargs)
    product = compact_eager(model, graph, graph.random_selection(0.5, seed=1))
    config = product.model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.intermediate_size) == (2, 1, 8, 24)
    assert model.config.num_attention_heads == 4
    assert "config.num_key_value_heads: 2 -> 1" in product.changes and product.notes == []
    assert product.model.model.layers[1].mlp.intermediate_size == 24
    check_saved(product.model, kwargs, tmp_path)


def check_saved(small: nn.Module, kwargs: dict[str, Tensor], folder: Path) -> None:
    small.save_pretrained(folder)  # type: ignore[operator]
    again = type(small).from_pretrained(folder).eval()  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(outputs(small, (), kwargs), outputs(again, (), kwargs), strict=True))


def test_layers_of_different_sizes_leave_the_configuration_behind() -> None:
    model, kwargs = bert()
    graph = analyze(model, (), kwargs)
    selection = first_of(graph, 2, only="layer", every=2)
    with pytest.warns(UserWarning, match=r"model\.config no longer describes the weights"):
        small = compact(model, graph, selection, product="eager")
    assert small.config.num_attention_heads == 4
    kept = [layer.attention.self.query.out_features // 8 for layer in small.bert.encoder.layer]
    assert [layer.attention.self.num_attention_heads for layer in small.bert.encoder.layer] == kept
    expected = outputs(zeroed(model, graph, selection), (), kwargs)
    assert max_difference(expected, outputs(small, (), kwargs))[1] <= 1e-5


def hugging_face(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    torch.manual_seed(0)
    ids = torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(4))
    if kind == "gpt2":
        settings = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=16, initializer_range=0.2)
        settings.use_cache = False
        return nets.randomize(transformers.GPT2LMHeadModel(settings)).eval(), {"input_ids": ids}
    settings = transformers.T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=2.0)
    settings.use_cache = False
    model = transformers.T5ForConditionalGeneration(settings)
    return nets.randomize(model).eval(), {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_other_attention_classes(kind: str) -> None:
    model, kwargs = hugging_face(kind)
    graph = analyze(model, (), kwargs)
    assert graph.num_groups
    selection = graph.random_selection(0.5, seed=1)
    product = compact_eager(model, graph, selection)
    assert type(product.model) is type(model)
    expected = outputs(zeroed(model, graph, selection), (), kwargs)
    assert max_difference(outputs(model, (), kwargs), expected)[1] > 1e-4
    assert max_difference(expected, outputs(product.model, (), kwargs))[1] <= 1e-5
