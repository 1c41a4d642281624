"""FSDP2 of accelerate and of the Trainer on two processes: one process's result, checkpoints that go on, whole weights at the end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from geta.graph.names import canonical_name, find_tensor, unwrap
from geta.integrations.sharding import Skeleton
from sharded_runs import STOP, everything, loop, on_one, result
from trainer_runs import TOKENS, model_of
from two_ranks import on_two_ranks


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps one state per process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    return on_two_ranks(everything, folder / "ranks", folder)


def same(one: dict[str, Any], two: dict[str, Any], tolerance: float) -> None:
    """Same groups and bits; norms of gradients and weights of the compact model equal to `tolerance`."""
    assert one["kept"] == two["kept"]
    for key, value in one["progress"].items():
        assert value == (pytest.approx(two["progress"][key], rel=tolerance) if isinstance(value, float) else two["progress"][key])
    assert one["norms"] == pytest.approx(two["norms"], rel=tolerance)
    assert one["tensors"].keys() == two["tensors"].keys()
    for name, tensor in one["tensors"].items():
        torch.testing.assert_close(tensor, two["tensors"][name], rtol=tolerance, atol=tolerance, msg=name)


def test_the_trainer_shards_as_one_process_trains(ranks, tmp_path):
    """With clipping, accumulation, activation checkpointing and tied embeddings."""
    alone = on_one(tmp_path)
    for found in ranks:
        assert found["trainer"]["sharded"] == ["DTensor", "Parameter"]
        same(found["trainer"]["whole"], alone, 1e-5)
    same(ranks[0]["trainer"]["whole"], ranks[1]["trainer"]["whole"], 0.0)


def test_its_checkpoints_go_on_bitwise(ranks):
    """Whole ones, written by rank 0; the history of what was logged before comes with them."""
    for found in ranks:
        same(found["trainer"]["resumed"], found["trainer"]["whole"], 0.0)


def test_the_whole_model_comes_back(ranks):
    for found in ranks:
        assert found["trainer"]["gathered"] == ["GPT2LMHeadModel", True, False]
        assert found["trainer"]["saved"] == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_plain_loop_of_accelerate(ranks):
    """With a budget, and checkpoints of which every rank writes its part."""
    alone = result(*loop(Accelerator(cpu=True)))
    for found in ranks:
        same(found["loop"]["whole"], alone, 1e-5)
        rest = {**found["loop"]["whole"], "norms": found["loop"]["whole"]["norms"][STOP:]}
        same(found["loop"]["resumed"], rest, 0.0)


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("version 1", r"FSDP1 .* flattens parameters"),
        ("meta", "cpu_ram_efficient_loading=True makes accelerate send every tensor"),
        ("size", "SIZE_BASED_WRAP makes accelerate shard the containers"),
        ("half", "fp16 skips steps"),
        ("late", "sharded already"),
        ("on CPUs", "fsdp=True has no effect: accelerate shards on accelerators only"),
    ],
)
def test_what_cannot_work_is_told(why, words, ranks):
    for found in ranks:
        assert re.search(words, found["refusals"][why])


def test_a_skeleton_is_filled_again():
    """Tied tensors stay tied, frozen ones frozen, and nothing is shared with the model that it came from."""
    model: Any = model_of("gpt2")
    model.transformer.wpe.weight.requires_grad_(False)
    model.transformer.h[0].eval()
    skeleton = Skeleton.of(model)
    assert all(p.is_meta for p in skeleton.model.parameters())
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(0.5)
    again: Any = skeleton.filled(model)
    assert again.lm_head.weight is again.transformer.wte.weight
    assert not again.transformer.wpe.weight.requires_grad
    assert [module.training for module in again.modules()] == [module.training for module in model.modules()]
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in again.parameters()}
    assert torch.equal(again.eval()(TOKENS[:2]).logits, model.eval()(TOKENS[:2]).logits)


def test_tensors_inside_checkpoint_wrappers_keep_their_names():
    inner = nn.Linear(3, 2)
    model = nn.Sequential(checkpoint_wrapper(nn.Sequential(inner)), nn.ReLU())
    names = [canonical_name(name) for name, _ in model.named_parameters()]
    assert names == ["0.0.weight", "0.0.bias"]
    assert find_tensor(model, "0.0.weight") is inner.weight
    assert unwrap(checkpoint_wrapper(inner)) is inner
