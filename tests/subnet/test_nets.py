"""Zeroed model == compact model, for every named architecture, both multiples, evaluation and training mode."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

import nets
from geta.graph import analyze
from geta.subnet import compact
from geta.subnet.comparison import max_difference


def outputs(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> list[torch.Tensor]:
    torch.manual_seed(5)
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]


def without_dropout(model: nn.Module) -> None:
    """Dropout draws one number per element, so a smaller tensor can't draw the same mask."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob", "attention_probs_dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("name", list(nets.NETS))
def test_zeroed_equals_compact(name: str, multiple: int) -> None:
    model, args, kwargs = nets.NETS[name]()
    without_dropout(model)
    graph = analyze(model, args, kwargs)
    assert graph.num_groups > 0
    selection = graph.random_selection(0.5, seed=1, multiple_of=multiple)
    assert sum(int(remove.sum()) for remove in selection.values()) > 0.3 * graph.num_groups
    small = compact(model, graph, selection)
    assert small.info.max_difference <= 1e-5

    zeroed = copy.deepcopy(model)
    graph.zero_(zeroed, selection)
    dense_out = outputs(model.eval(), args, kwargs)
    zeroed_out = outputs(zeroed.eval(), args, kwargs)
    assert max_difference(dense_out, zeroed_out)[1] > 1e-4, "removing groups changed nothing: the test would be empty"
    assert max_difference(zeroed_out, outputs(small.eval(), args, kwargs))[1] <= 1e-5

    trained_out = outputs(zeroed.train(), args, kwargs)
    assert max_difference(trained_out, outputs(small.train(), args, kwargs))[1] <= 2e-5
    for family in graph.prunable_families:
        kept = family.size - int(selection[family.name].sum())
        assert kept % multiple == 0 or kept == family.size
        assert len(small.kept[family.name]) == kept
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet20_conv", "shufflenet_like", "vit", "llama_gqa"])
def test_other_batch_sizes(name: str) -> None:
    model, args, kwargs = nets.NETS[name]()
    graph = analyze(model, args, kwargs)
    selection = graph.random_selection(0.5, seed=2)
    small = compact(model, graph, selection)
    graph.zero_(model, selection)
    for batch in (1, 5):
        wide = pytree.tree_map_only(torch.Tensor, lambda t: torch.cat([t, t.flip(0), t])[:batch], (args, kwargs))  # noqa: B023
        assert max_difference(outputs(model, *wide), outputs(small, *wide))[1] <= 1e-5


@pytest.mark.parametrize("name", ["mobilenet_v2_like", "bert"])
def test_training_goes_on(name: str) -> None:
    """Gradients reach every parameter of the compact model, and running statistics are updated as in the zeroed one."""
    model, args, kwargs = nets.NETS[name]()
    without_dropout(model)
    graph = analyze(model, args, kwargs)
    selection = graph.random_selection(0.5, seed=3)
    small = compact(model, graph, selection).train()
    before = {name: buffer.clone() for name, buffer in small.net.named_buffers() if buffer.is_floating_point()}
    loss = sum(leaf.square().sum() for leaf in pytree.tree_leaves(small(*args, **kwargs)))
    loss.backward()
    missing = [name for name, p in small.named_parameters() if p.grad is None]
    assert not missing
    changed = [not torch.equal(buffer, small.net.get_buffer(name)) for name, buffer in before.items() if "running" in name]
    assert all(changed)


def test_compact_models_can_be_captured_and_pruned_again() -> None:
    model, args, kwargs = nets.NETS["densenet_like"]()
    graph = analyze(model, args, kwargs)
    small = compact(model, graph, graph.random_selection(0.5, seed=4))
    again = analyze(small, args)
    assert 0 < again.num_groups < graph.num_groups
    smaller = compact(small, again, again.random_selection(0.5, seed=5))
    assert smaller.info.max_difference <= 1e-5
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in small.parameters())
