"""Zeroed model == compact model for models as they are found: reparametrized, wrapped, adapted, with control flow."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.utils._pytree as pytree
from torch import nn
from torch.export import Dim

import geta
import real_models
from geta.errors import BadModelError, CheckpointError
from geta.graph import analyze
from geta.graph.names import canonical_name, find_tensor
from geta.subnet import compact
from geta.subnet.comparison import max_difference

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),  # reentrant checkpoints under no_grad
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch.cond run by itself
]
SMALL = 1e-5


def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return pytree.tree_leaves(model(*args, **kwargs))


def gradients(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = [leaf for leaf in outputs(model, args, kwargs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    sum(leaf.abs().square().sum() for leaf in tensors).backward()
    named = {canonical_name(name.removeprefix("net.")): parameter for name, parameter in model.named_parameters()}
    return {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}


@pytest.mark.parametrize("name", list(real_models.MODELS))
def test_zeroed_equals_compact(name: str) -> None:
    model, args, kwargs = real_models.build(name)
    before = copy.deepcopy(model.state_dict())
    graph = analyze(model, args, kwargs)
    assert graph.num_groups > 1
    selection = graph.random_selection(0.5, seed=1)
    small = compact(model, graph, selection)
    assert small.info.max_difference <= SMALL
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())

    zeroed = copy.deepcopy(model)
    graph.zero_(zeroed, selection)
    assert not any(tensor.isnan().any() for tensor in outputs(zeroed, args, kwargs) if isinstance(tensor, torch.Tensor))
    assert max_difference(outputs(zeroed, args, kwargs), outputs(small, args, kwargs))[1] <= SMALL
    for _ in range(2):  # twice: running statistics and power iterations move
        assert max_difference(outputs(zeroed.train(), args, kwargs), outputs(small.train(), args, kwargs))[1] <= 2 * SMALL
    flags = {n: find_tensor(model, n).requires_grad for n, _ in small.net.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in small.net.named_parameters()}


@pytest.mark.parametrize(
    "name", ["weight_norm", "spectral_norm", "no_grad", "autocast", "checkpoint", "checkpoint_reentrant", "cond", "loops", "selects"]
)
def test_gradients_are_those_of_the_zeroed_model(name: str) -> None:
    """Where nothing was removed the training graph has the same gradients, to rounding."""
    model, args, kwargs = real_models.build(name)
    graph = analyze(model, args, kwargs)
    whole = compact(model, graph, {}).train()
    expected = gradients(copy.deepcopy(model).train(), args, kwargs)
    found = gradients(whole, args, kwargs)
    assert set(expected) == set(found) or name == "cond"
    for key, gradient in found.items():
        wanted = expected.get(key, torch.zeros_like(gradient))
        assert torch.allclose(gradient, wanted, rtol=1e-2 if name == "autocast" else 1e-4, atol=1e-5), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = real_models.Convs().to(dtype).eval()
    args = (real_models.IMAGE.to(dtype),)
    graph = analyze(model, args)
    small = compact(model, graph, graph.random_selection(0.5))
    assert small(*args).dtype == dtype and small.info.precision == "float64" and small.info.max_difference <= 1e-9
    graph.zero_(model, graph.random_selection(0.5))
    assert max_difference([model(*args)], [small(*args)])[1] <= 2e-2


class Mixer(nn.Module):
    """Convolutions over an image, attention over a sequence of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 2, 2)
        self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 5)

    def forward(self, image: torch.Tensor, words: torch.Tensor) -> dict[str, torch.Tensor]:
        seen = self.pool(torch.relu(self.stem(image))).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(words, seen, seen, need_weights=False)
        return {"words": self.head(mixed), "seen": seen.mean(1)}


def test_dynamic_sizes_survive() -> None:
    torch.manual_seed(0)
    model = Mixer().eval()
    batch, length, height, width = Dim("batch"), Dim("length", min=2, max=64), Dim("height", min=2, max=32), Dim("width", min=2, max=32)
    shapes = {"image": {0: batch, 2: 2 * height, 3: 2 * width}, "words": {0: batch, 1: length}}
    args = (torch.randn(2, 3, 8, 12), torch.randn(2, 5, 16))
    graph = analyze(model, args, dynamic_shapes=shapes)
    selection = graph.random_selection(0.5)
    small = compact(model, graph, selection)
    graph.zero_(model, selection)
    for sizes in ((1, 4, 4, 2), (3, 16, 10, 9)):
        other = (torch.randn(sizes[0], 3, *sizes[1:3]), torch.randn(sizes[0], sizes[3], 16))
        assert max_difference(outputs(model, other, {}), outputs(small, other, {}))[1] <= SMALL


def test_sizes_that_depend_on_values_stay_open() -> None:
    model, args, kwargs = real_models.build("selects")
    graph = analyze(model, args, kwargs)
    selection = graph.random_selection(0.5)
    small = compact(model, graph, selection)
    graph.zero_(model, selection)
    for seed in range(3):
        other = (torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)), torch.tensor([2, 6, 1]))
        assert max_difference(outputs(model, other, kwargs), outputs(small, other, kwargs))[1] <= SMALL


def test_costs_and_storage_of_value_dependent_sizes(tmp_path: Path) -> None:
    model, args, kwargs = real_models.build("selects")
    graph = analyze(model, args, kwargs)
    small = compact(model, graph, graph.random_selection(0.5))
    small.save(tmp_path / "small")
    again = geta.load(tmp_path / "small")
    assert again.cost.macs == small.cost.macs > 0
    assert max_difference(outputs(small, args, kwargs), outputs(again, args, kwargs))[1] == 0


def test_cond_chooses_at_run_time() -> None:
    model, (x,), _ = real_models.build("cond")
    small = compact(model, analyze(model, (x,)), {})
    with torch.no_grad():
        model.first.bias.fill_(-50.0)
        small.net.get_parameter("first.bias").fill_(-50.0)
    assert torch.allclose(model(x), small(x)) and torch.allclose(small(x), model.no(torch.zeros(4, 8)) * 2)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def check_wrapped(wrapped: nn.Module, inner: nn.Module) -> None:
    args = (real_models.ROW,)
    graph = analyze(wrapped, args)
    assert [family.name for family in graph.prunable_families] == ["first", "second"]
    assert graph.model is inner
    selection = graph.random_selection(0.5)
    for model in (wrapped, inner):
        assert compact(model, graph, selection).info.max_difference <= SMALL
    assert find_tensor(wrapped, "first.weight") is inner.first.weight
    graph.zero_(wrapped, selection)
    small = compact(wrapped, graph)
    assert torch.allclose(small(*args), inner.eval()(*args), atol=1e-6)
    assert {name for name, _ in small.net.named_parameters()} == {name for name, _ in inner.named_parameters()}


def test_distributed_data_parallel(process_group: None) -> None:
    inner = real_models.Mlp()
    check_wrapped(nn.parallel.DistributedDataParallel(inner), inner)


def test_data_parallel_and_compiled() -> None:
    for wrap in (nn.DataParallel, compiled, lambda model: compiled(nn.DataParallel(model))):
        inner = real_models.Mlp()
        check_wrapped(wrap(inner), inner)


def test_compiled_submodules() -> None:
    model, (x,), _ = real_models.build("checkpoint")
    model.body = compiled(model.body)
    model.stem.compile(backend="eager")
    graph = analyze(model, (x,))
    assert sorted(family.name for family in graph.prunable_families) == ["body.first", "body.second", "stem"]
    assert compact(model, graph, graph.random_selection(0.5)).info.max_difference <= SMALL


def test_hand_written_backward_is_reported() -> None:
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0]

    class Rounds(real_models.Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(Straight.apply(self.first(x)))

    model = Rounds().eval()
    graph = analyze(model, (real_models.ROW,))
    small = compact(model, graph, graph.random_selection(0.5))
    assert small.info.max_difference <= SMALL
    assert [note for note in small.info.notes if "Straight" in note and "test_real_models_compact.py" in note and "backward" in note]


def test_reentrant_checkpoints_are_reported_and_nothing_else() -> None:
    model, args, _ = real_models.build("checkpoint_reentrant")
    notes = compact(model, analyze(model, args), {}).info.notes
    assert len(notes) == 1 and "torch.utils.checkpoint" in notes[0]
    model, args, _ = real_models.build("checkpoint")
    assert compact(model, analyze(model, args), {}).info.notes == []


@torch.library.custom_op("geta_tests::swish", mutates_args=())
def swish(x: torch.Tensor, steepness: float) -> torch.Tensor:
    return x * torch.sigmoid(steepness * x)


@swish.register_fake
def _(x: torch.Tensor, steepness: float) -> torch.Tensor:
    return torch.empty_like(x)


class Swishes(real_models.Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.ops.geta_tests.swish(self.first(x), 2.0))))


def test_custom_operators_freeze_until_they_have_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from geta.graph.rules import pointwise, registry

    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    torch.manual_seed(0)
    model, args = Swishes().eval(), (real_models.ROW,)
    frozen = {family.name: family.reason for family in analyze(model, args).families if not family.prunable}
    assert "geta_tests.swish" in frozen["first"] and "no rule" in frozen["first"]

    geta.rule("geta_tests::swish")(lambda ctx: pointwise(ctx, [ctx["x"]], "keep"))
    graph = analyze(model, args)
    assert [family.name for family in graph.prunable_families] == ["first", "second"]
    small = compact(model, graph, graph.random_selection(0.5))
    assert small.info.max_difference <= SMALL

    small.save(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"custom_ops=\['geta_tests::swish'\]"):
        geta.load(tmp_path / "small")
    with pytest.raises(CheckpointError, match="custom_ops"):
        geta.load(tmp_path / "small", custom_ops=["geta_tests::other", "swish"])
    again = geta.load(tmp_path / "small", custom_ops=["geta_tests::swish"])
    assert torch.equal(again(*args), small(*args))


def test_a_rule_that_returns_nonsense_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from geta.errors import ConfigError
    from geta.graph.rules import registry

    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    geta.rule("geta_tests::swish")(lambda ctx: None)
    with pytest.raises(ConfigError, match=r"the rule of 'geta_tests::swish' .* one Value per result"):
        analyze(Swishes(), (real_models.ROW,))


@pytest.fixture(scope="module")
def adapted() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A small Llama with LoRA adapters whose second factor is not zero."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            use_cache=False,
        )
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM(config), lora).eval()
    logging.disable(logging.NOTSET)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    ids = real_models.tokens(64, 2, 7)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_lora_kept_separate(adapted: tuple[nn.Module, dict[str, torch.Tensor]]) -> None:
    model, kwargs = adapted
    graph = analyze(model, (), kwargs)
    units = {family.name: (family.unit, family.size) for family in graph.prunable_families}
    layer = "base_model.model.model.layers.0"
    assert units[f"{layer}.self_attn"] == ("key-value groups", 2)
    assert units[f"{layer}.mlp.gate_proj"] == ("neurons", 48)
    assert units[f"{layer}.mlp.up_proj.lora_A.default"] == ("neurons", 4)
    rows = next(family for family in graph.families if family.name == f"{layer}.mlp.gate_proj")
    touched = {(member.param.removeprefix(f"{layer}.mlp."), member.dim) for member in rows.members}
    assert {("up_proj.base_layer.weight", 0), ("up_proj.lora_B.default.weight", 0), ("down_proj.lora_A.default.weight", 1)} <= touched

    selection = graph.random_selection(0.5)
    small = compact(model, graph, selection)
    assert small.info.max_difference <= SMALL
    trained = {name for name, parameter in small.net.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    small.train()(**kwargs).logits.square().sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in small.parameters())


def test_lora_merged(adapted: tuple[nn.Module, dict[str, torch.Tensor]]) -> None:
    """Zeroing base and adapter together means that the merged model is zero in the same places."""
    model = copy.deepcopy(adapted[0])
    kwargs = adapted[1]
    graph = analyze(model, (), kwargs)
    selection = graph.random_selection(0.5)
    graph.zero_(model, selection)
    expected = model(**kwargs).logits
    merged = model.merge_and_unload().eval()
    small = compact(merged, analyze(merged, (), kwargs))
    assert {name: len(kept) for name, kept in small.kept.items() if name.startswith("model.layers.0")} == {
        "model.layers.0.self_attn": 1,
        "model.layers.0.mlp.gate_proj": 24,
    }
    assert torch.allclose(small(**kwargs).logits, expected, atol=1e-5)
    assert not any("lora" in name for name in small.state_dict())


def test_train_and_eval_constants_are_kept_apart() -> None:
    """Tracers number the constants of a graph, and in training mode there are others."""

    class Constants(real_models.Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                x = x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
            return super().forward(x + torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))

    model, args = Constants().eval(), (real_models.ROW,)
    small = compact(model, analyze(model, args), {})
    assert torch.allclose(small(*args), model(*args), atol=1e-6)
    assert torch.allclose(small.train()(*args), model.train()(*args), atol=1e-6)


def test_meta_models_are_cut_without_values() -> None:
    with torch.device("meta"):
        model, args = real_models.Convs(real_models.parametrizations.weight_norm).eval(), (torch.empty(2, 3, 8, 8),)
    graph = analyze(model, args)
    small = compact(model, graph, graph.random_selection(0.5))
    assert small.net.get_parameter("second.parametrizations.weight.original1").shape == (6, 4, 3, 3)
    assert any("meta" in note for note in small.info.notes)


def test_following_a_path_needs_values() -> None:
    with torch.device("meta"):
        model, args = real_models.Branches(), (torch.empty(4, 6),)
    with pytest.raises(BadModelError, match=r"real_models\.py:\d+"):
        analyze(model, args)


def test_half_precision_with_complex_numbers() -> None:
    class HalfRotary(real_models.Rotary):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = self.first(x).view(x.shape[0], 5, 2, 4, 2).float()
            turned = torch.view_as_real(torch.view_as_complex(heads) * self.turns[None, :, None]).flatten(3)
            return self.head(torch.relu(turned.flatten(2)).to(torch.bfloat16))

    torch.manual_seed(0)
    model, args = HalfRotary().eval(), (real_models.SEQUENCE.bfloat16(),)
    model.first.bfloat16()
    model.head.bfloat16()
    graph = analyze(model, args)
    small = compact(model, graph, graph.random_selection(0.5))
    assert small.info.precision == "float64" and small.info.max_difference <= 1e-9
