"""The memory plan against measured bytes: every exact line equals what training really holds, also sharded over four ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import geta
from geta.errors import ConfigError
from geta.optim import quantizer_parameters
from geta.report.memory import MARGIN_BYTES
from tensor_bytes import TensorBytes, reachable, storage_bytes


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop, self.head = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10), nn.Dropout(0.3), nn.Linear(10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x))).mean((2, 3))))


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(16), nn.Linear(16, 37), nn.GELU(), nn.Linear(37, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Text(nn.Module):
    """Blocks in a list, behind a table and before a head."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x).tanh()


VISION, TEXT = (Vision, torch.randn(4, 3, 7, 7)), (Text, torch.arange(12).view(2, 6) % 11)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.Adam, amsgrad=True)


def prepared(make: Any, x: torch.Tensor, quantized: str | None) -> tuple[nn.Module, geta.DependencyGraph]:
    torch.manual_seed(0)
    model = make().train()
    graph = geta.analyze(model, (x,))
    if quantized is not None:
        geta.quantize(model, weights=(4, 8), activations=(8, 8), calibration=[x], granularity=quantized)
    return model, graph


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (t.to_local() if isinstance(t, DTensor) else t for t in tensors))


def state_of(base: torch.optim.Optimizer, parameters: Any) -> int:
    return bytes_of(value for p in parameters for value in base.state[p].values() if isinstance(value, torch.Tensor))


def measured(model: nn.Module, graph: geta.DependencyGraph, factory: Any, x: torch.Tensor) -> dict[str, int]:
    """Bytes of everything that a run holds, after a step; of the groups before it."""
    base = factory(model.parameters())
    optimizer = geta.QASSO(base, graph, sparsity=0.5, schedule=100)
    index = [member.index for found in graph.families for member in found.members]
    tensors, arrays = reachable([optimizer._index, optimizer._pruner, optimizer._bank], [*model.parameters(), *model.buffers(), *index])
    model(x).square().mean().backward()
    optimizer.step()
    own = quantizer_parameters(model)
    mine = {id(p) for p in own}
    others = [p for p in model.parameters() if id(p) not in mine]
    learned = [p for p in own if p.requires_grad]
    return {
        "parameters": bytes_of(others),
        "buffers": bytes_of(model.buffers()),
        "gradients": bytes_of(p.grad for p in others if p.grad is not None),
        "optimizer state": state_of(base, others),
        "quantizers": bytes_of(own),
        "quantizer gradients and state": bytes_of(p.grad for p in learned) + state_of(base, learned),
        "groups": storage_bytes(tensors) + sum(array.nbytes for array in arrays),
    }


@pytest.mark.parametrize(
    ("case", "quantized", "factory"),
    [(VISION, "tensor", torch.optim.AdamW), (VISION, "channel", SGD), (TEXT, "channel", ADAM), (TEXT, None, torch.optim.RMSprop)],
)
def test_exact_lines_are_what_a_run_holds(case, quantized, factory):
    model, graph = prepared(*case, quantized)
    plan = geta.memory_plan(graph, factory)
    found = measured(model, graph, factory, case[1])
    assert {line.name: line.bytes for line in plan.held} == found
    assert all(line.exact for line in plan.held)
    assert not any(line.exact for line in (*plan.passes, *plan.checkpointed, *plan.step))
    assert min(found["parameters"], found["optimizer state"], found["groups"]) > 0


def test_quantizers_that_are_yet_to_come_are_planned_as_they_will_be():
    _, plain = prepared(*TEXT, None)
    ahead = geta.memory_plan(plain, SGD, weight_bits=(4, 8), activation_bits=8)
    assert not geta.quant.quantizers(plain.model)
    _, graph = prepared(*TEXT, "tensor")
    assert ahead == geta.memory_plan(graph, SGD)
    with pytest.raises(ConfigError, match=r"has quantizers already \(first: 'table.weight'\)"):
        geta.memory_plan(graph, weight_bits=8)


@pytest.fixture
def four_ranks() -> Iterator[Any]:
    """The first of four ranks, whose messages reach nobody: sizes are real, numbers are not."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


@pytest.mark.parametrize("quantized", [None, "channel"])
def test_exact_lines_of_a_sharded_model(quantized, four_ranks):
    """37 rows over four ranks are 10, 10, 10 and 7."""
    make, x = TEXT
    model, graph = prepared(make, x, quantized)
    plan = geta.memory_plan(graph, gpus=4)
    assert plan.blocks == ("blocks.0", "blocks.1", "blocks.2")
    ignored = set(quantizer_parameters(model))
    for block in model.blocks:
        fully_shard(block, mesh=four_ranks, ignored_params=ignored)
    fully_shard(model, mesh=four_ranks, ignored_params=ignored)
    assert {line.name: line.bytes for line in plan.held} == measured(model, graph, torch.optim.AdamW, x)


def kept_by(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> int:
    """What autograd really saves of one forward pass."""
    known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), *args, *kwargs.values()]}
    seen = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            seen[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(*args, **kwargs)
    del result
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("case", [VISION, TEXT])
@pytest.mark.parametrize("quantized", [None, "tensor"])
def test_activations_are_what_autograd_saves(case, quantized):
    model, graph = prepared(*case, quantized)
    plan = geta.memory_plan(graph)
    assert plan.line("activations").bytes + plan.line("quantized weights").bytes == kept_by(model, case[1])
    weights = [find for name, find in geta.quant.quantizers(model).items() if find.kind == "weight"]
    assert (plan.line("quantized weights").bytes > 0) == bool(weights)


def test_activations_of_a_language_model_are_close():
    """Captured attention takes a mask where the model itself passes a flag."""
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**settings, vocab_size=50, use_cache=False)
    model, ids = transformers.AutoModelForCausalLM.from_config(config).train(), torch.ones(2, 16, dtype=torch.int64)
    graph = geta.analyze(model, (), {"input_ids": ids})
    plan = geta.memory_plan(graph)
    real = kept_by(model, input_ids=ids)
    assert real <= plan.line("activations").bytes < 1.1 * real
    larger = geta.memory_plan(graph, kwargs={"input_ids": torch.ones(4, 16, dtype=torch.int64)})
    assert larger.input_shapes == ((4, 16),)
    assert larger.line("activations").bytes == pytest.approx(2 * plan.line("activations").bytes, rel=0.01)
    assert larger.held == plan.held


class Checkpointed(Text):
    """The same network with every block checkpointed."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x).tanh()


def test_checkpointing_keeps_the_inputs_of_the_blocks_and_one_block():
    model, graph = prepared(*TEXT, None)
    plan = geta.memory_plan(graph)
    x = torch.randn(2, 6, 16, requires_grad=True)
    between = kept_by(Checkpointed(), TEXT[1])  # inputs of the blocks and what lies outside of them
    assert between > 3 * x.numel() * 4
    assert plan.line("activations of checkpointed blocks").bytes == between + kept_by(model.blocks[0], x)
    assert plan.peak(checkpointing=True) <= plan.peak(checkpointing=False)


def test_what_marking_takes_stays_within_the_estimate():
    """The step that marks groups, measured without the base optimizer's own results (no foreach on the CPU)."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(layer for _ in range(9) for layer in (nn.Linear(96, 96), nn.ReLU()))), torch.randn(4, 96)
    graph = geta.analyze(model, (x,))
    base = torch.optim.AdamW(model.parameters())
    optimizer = geta.HESSO(base, graph, sparsity=0.5, schedule=geta.Schedule(8, warmup=1, projection=0, joint=5, joint_periods=5))
    for step in range(2):
        model(x).square().mean().backward()
        with TensorBytes([*model.parameters(), *(p.grad for p in model.parameters())]) as counted:
            before = counted.peak if step else 0
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    plan = geta.memory_plan(graph)
    estimate = plan.line("scores").bytes + plan.line("redundant rows").bytes
    assert before == 0
    assert 0.5 * estimate < counted.peak < 1.3 * estimate


def test_dtypes_of_masters_and_passes():
    model, graph = prepared(*TEXT, None)
    plain, half = geta.memory_plan(graph, gpus=2), geta.memory_plan(graph, gpus=2, dtype=torch.bfloat16)
    mixed = geta.memory_plan(graph, gpus=2, weight_bits=8, compute_dtype=torch.bfloat16)
    assert (plain.dtype, half.dtype, mixed.dtype, mixed.compute_dtype) == ("float32", "bfloat16", "float32", "bfloat16")
    assert 2 * half.line("parameters").bytes == plain.line("parameters").bytes == mixed.line("parameters").bytes
    assert 2 * mixed.line("gathered parameters").bytes == plain.line("gathered parameters").bytes
    assert mixed.line("quantizers").bytes == 3 * 4 * len(geta.quant.targets.find_layers(model, (), strict=False))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_plan_is_plain_data_and_readable():
    _, graph = prepared(*VISION, None)
    plan = geta.memory_plan(graph, gpus=2)
    data = json.loads(json.dumps(plan.to_json()))
    assert data["peaks"]["whole"]["peak"] == plan.peak(checkpointing=False)
    assert sum(line["bytes"] for line in data["held"]) == sum(line.bytes for line in plan.held)
    assert plan.with_margin(checkpointing=True) == int(plan.peak(checkpointing=True) * 1.1) + MARGIN_BYTES
    assert "memory on each of 2 GPUs (FSDP2): 355 parameters in float32, AdamW, inputs [4, 3, 7, 7] per GPU" in str(plan)
    with pytest.raises(ConfigError, match="the plan has no line 'scores of groups'; it has parameters, buffers"):
        plan.line("scores of groups")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gpus": 0}, "gpus is 0"),
        ({"periods": 1.5}, "periods is 1.5"),
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"blocks": ["layers.*"]}, "'layers.*' matches no module with parameters"),
        ({"blocks": ["blocks.*"]}, "'blocks.0.0' lies inside 'blocks.0'"),
        ({"optimizer": torch.optim.LBFGS}, "its state can't be counted"),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    _, graph = prepared(*TEXT, None)
    with pytest.raises(ConfigError, match=words.replace("*", r"\*")):
        geta.memory_plan(graph, **settings)


def test_blocks_can_be_named():
    _, graph = prepared(*TEXT, None)
    assert geta.memory_plan(graph, blocks=["blocks.0", "head"]).blocks == ("head", "blocks.0")
