"""Low-rank adapters: pruned together with their base, merged, then cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import geta
from geta.errors import BadModelError, ConfigError
from geta.integrations.adapters import finish_merged

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers for it

IDS = torch.randint(0, 32, (8, 8), generator=torch.Generator().manual_seed(1))


def adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "max_position_embeddings": 8}
    config = LlamaConfig(vocab_size=32, num_attention_heads=4, num_key_value_heads=2, use_cache=False, **sizes)
    layers = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=layers, task_type="CAUSAL_LM"))


def trained(**settings: Any) -> tuple[nn.Module, geta.Compressor]:
    model = adapted()
    options = {"sparsity": 0.5, "weight_bits": None, "protect": ["*.lora_A.*:0"], **settings}
    compressor = geta.Compressor(model, kwargs={"input_ids": IDS[:2]}, **options)
    base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer = compressor.wrap(base, total_steps=20)
    for _ in range(20):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval(), compressor


@pytest.mark.parametrize("product", ["graph", "eager"])
def test_merged_and_cut_is_the_trained_model(product):
    model, compressor = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    units = {family.unit for family in compressor.graph.prunable_families}
    assert units == {"key-value groups", "neurons"}
    assert compressor.progress()["pruned_groups"] == compressor.graph.num_groups // 2 == 13
    small = finish_merged(compressor, product)
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    assert not any("lora" in part for name, _ in small.named_parameters() for part in name.split("."))
    inner = next(p for name, p in small.named_parameters() if name.endswith("mlp.up_proj.weight"))
    removed = {name.rpartition(".")[2]: int(mask.sum()) for name, mask in compressor.trained_by.selection.items()}
    assert inner.shape == (24 - removed["gate_proj"], 16)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    if product == "eager":
        assert type(small) is LlamaForCausalLM


def test_kept_apart_the_ranks_stay():
    model, compressor = trained()
    small = compressor.finish()
    ranks = [p.shape[0] for name, p in small.named_parameters() if "lora_A" in name.split(".")]
    assert ranks == [4] * 5
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged_is_refused():
    _, compressor = trained(weight_bits=(4, 8), exclude=["*.lora_?.default"])
    with pytest.raises(ConfigError, match="their sum would leave the grid"):
        finish_merged(compressor)
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(BadModelError, match="Sequential has no adapters to merge"):
        finish_merged(geta.Compressor(plain, (torch.randn(2, 4),), sparsity=0.5))
    unfinished = geta.Compressor(adapted(), kwargs={"input_ids": IDS[:2]}, sparsity=0.5, weight_bits=None)
    with pytest.raises(ConfigError, match="nothing was trained"):
        finish_merged(unfinished)
