"""Whole residual branches are left out: the zeroed network and the compact one compute the same, in every mode and after every door."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import geta
from depth_nets import NETS, WIDTH, Wrapped, mlp, on_tokens
from geta import BadModelError, CompactModel, ConfigError


def gap(one: nn.Module, other: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> float:
    """Largest relative difference of the outputs."""
    found = [[leaf for leaf in pytree.tree_leaves(model(*args, **(kwargs or {}))) if isinstance(leaf, Tensor)] for model in (one, other)]
    return max(float((a - b).detach().abs().max() / a.detach().abs().max().clamp(min=1e-30)) for a, b in zip(*found, strict=True))


def zeroed(model: nn.Module, graph: geta.DependencyGraph, selection: dict[str, Tensor]) -> nn.Module:
    copied = copy.deepcopy(model)
    graph.zero_(copied, selection)
    return copied


def without(graph: geta.DependencyGraph, *names: str) -> dict[str, Tensor]:
    """The selection that removes these branches and nothing else."""
    return {family.name: torch.full((family.size,), family.name in names) for family in graph.prunable_families}


@pytest.mark.parametrize("name", NETS)
def test_compact_equals_zeroed_whatever_goes_beside_the_branches(name: str) -> None:
    model, args = NETS[name][0]()
    model = model.double()
    args = tuple(arg.double() for arg in args)
    graph = geta.analyze(model, args, depth=True)
    branches = [family for family in graph.prunable_families if family.is_layer]
    for selection in (without(graph, branches[0].name), graph.random_selection((0.5, 0.8), seed=1)):
        small = geta.compact(model, graph, selection)
        reference = zeroed(model, graph, selection)
        gone = [family for family in branches if bool(selection[family.name].all())]
        assert gone
        left = set(small.tensors())
        assert not [tensor for family in gone for tensor in family.removes if tensor in left]
        for training in (False, True):
            assert gap(reference.train(training), small.train(training), args) < 1e-10
        assert small.info.kept[gone[0].name] == []
        assert small.cost.params < geta.cost(model, args).params


def test_every_branch_at_once_and_what_inside_of_it_goes_too() -> None:
    """A selection by hand may take all branches; groups inside of a removed branch may be selected as well."""
    model, args = NETS["parallel"][0]()
    graph = geta.analyze(model, args, depth=True)
    everything = {
        family.name: torch.ones(1, dtype=torch.bool) if family.is_layer else torch.arange(family.size) % 2 == 0
        for family in graph.prunable_families
    }
    small = geta.compact(model, graph, everything)
    assert sorted(small.tensors()) == ["0.bias", "0.weight", "3.bias", "3.weight"]
    assert gap(zeroed(model, graph, everything), small, args) < 1e-6


def test_gradients_of_what_stays_are_those_of_the_zeroed_network() -> None:
    model, args = NETS["pre-norm"][0]()
    graph = geta.analyze(model, args, depth=True)
    selection = without(graph, "2.branch (layer)", "3.branch (layer)")
    reference, small = zeroed(model, graph, selection).train(), geta.compact(model, graph, selection).train()
    for one in (reference, small):
        one(*args).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert len(list(small.net.named_parameters())) == len(expected) - 12
    for name, parameter in small.net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_sum_that_is_written_over_does_not_share_memory_with_the_stream() -> None:
    model, args = NETS["read again"][0]()
    graph = geta.analyze(model, args, depth=True)
    small = geta.compact(model, graph, without(graph, "1.branch (layer)"))
    targets = [str(node.target) for node in small.programs["eval"].graph.nodes]
    assert targets.count("aten.clone.default") == 1
    in_place = NETS["in place"][0]()
    graph = geta.analyze(*in_place, depth=True)
    small = geta.compact(in_place[0], graph, without(graph, "2.branch (layer)"))
    for program in small.programs.values():
        targets = [str(node.target) for node in program.graph.nodes]
        assert "aten.clone.default" not in targets  # nobody else reads the stream
        assert targets.count("aten.conv2d.default") == 5


def test_save_load_cut_again_and_onnx(tmp_path) -> None:
    model, args = NETS["basic blocks"][0]()
    graph = geta.analyze(model, args, depth=True)
    small = geta.compact(model, graph, without(graph, "2.branch (layer)"))
    small.save(tmp_path / "small")
    again = geta.load(tmp_path / "small")
    assert torch.equal(again(*args), small.eval()(*args))
    assert again.kept["2.branch (layer)"].tolist() == []
    second = geta.analyze(again, args, depth=True)
    rest = [family.name for family in second.prunable_families if family.is_layer]
    assert len(rest) == 2
    smaller = geta.compact(again, second, without(second, rest[0]))
    assert smaller.cost.macs < small.cost.macs
    assert gap(zeroed(again, second, without(second, rest[0])), smaller, args) < 1e-6
    import onnxruntime

    small.export_onnx(tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: args[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small(*args).detach(), atol=1e-4, rtol=1e-4)


def test_quantizers_go_with_their_branch() -> None:
    model, args = NETS["pre-norm"][0]()
    graph = geta.analyze(model, args, depth=True)
    geta.quantize(model, weights=geta.Bits(4, 8), activations=geta.Bits(8, 8), calibration=[args[0]])
    quantized = geta.analyze(model, args, depth=True)
    assert [family.summary() for family in quantized.families] == [family.summary() for family in graph.families]
    selection = without(graph, "1.branch (layer)", "4.branch (layer)")
    small = geta.compact(model, graph, selection)
    assert small.info.max_difference < 1e-9
    assert small.bits
    assert not [name for name in small.bits if name.startswith(("1.branch", "4.branch"))]
    assert not [name for name in small.tensors() if name.startswith(("1.branch", "4.branch"))]


def test_zero_branches_are_found_but_never_all_of_a_set() -> None:
    model, args = NETS["pre-norm"][0]()
    graph = geta.analyze(model, args, depth=True)
    graph.zero_(model, without(graph, "1.branch (layer)", "2.branch (layer)", "4.branch (layer)"))
    kept = {name: len(groups) for name, groups in geta.compact(model, graph).info.kept.items() if name.endswith("(layer)")}
    assert kept == {"1.branch (layer)": 0, "2.branch (layer)": 1, "3.branch (layer)": 1, "4.branch (layer)": 0}


def test_the_eager_product_needs_whole_blocks() -> None:
    """More about it in test_shorten.py."""
    model, args = NETS["parallel"][0]()
    graph = geta.analyze(model, args, depth=True)
    selection = without(graph, "1.attn (layer)")
    with pytest.raises(BadModelError, match=r"'1\.attn \(layer\)' is removed, but '1\.mlp \(layer\)' is still there"):
        geta.compact(model, graph, selection, product="eager")
    small = geta.compact(model, graph, selection, product="auto")
    assert isinstance(small, CompactModel)
    assert "is still there" in small.info.notes[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for names in ((), ("1.attn (layer)", "1.mlp (layer)")):
            chosen = without(graph, *names)
            eager = geta.compact(model, graph, chosen, product="eager")
            assert type(eager) is type(model)
            assert gap(zeroed(model, graph, chosen), eager, args) < 1e-6


def test_a_branch_that_the_model_no_longer_has_is_refused() -> None:
    model, args = on_tokens(Wrapped(mlp()), Wrapped(mlp()))
    graph = geta.analyze(model, args, depth=True)
    model[1].branch.append(nn.Sigmoid())
    with pytest.raises(BadModelError, match=r"'1\.branch \(layer\)' can't be removed from the model as it is now"):
        geta.compact(model, graph, without(graph, "1.branch (layer)"))


def test_a_layer_is_selected_by_one_flag() -> None:
    model, args = on_tokens(Wrapped(mlp()), Wrapped(nn.Linear(WIDTH, WIDTH)))
    graph = geta.analyze(model, args, depth=True)
    with pytest.raises(ConfigError, match=r"BoolTensor\[1\]"):
        geta.compact(model, graph, {"1.branch (layer)": torch.ones(2, dtype=torch.bool)})


def test_real_models_lose_branches() -> None:
    from nets import bert, llama_gqa

    for build in (bert, llama_gqa):
        model, args, kwargs = build()
        graph = geta.analyze(model, args, kwargs, depth=True)
        selection = graph.random_selection(0.5, seed=1)
        gone = [name for name, remove in selection.items() if name.endswith("(layer)") and bool(remove.all())]
        assert len(gone) == 2
        assert len([family for family in graph.families if family.is_layer and family.prunable]) == 4
        small = geta.compact(model, graph, selection)
        assert gap(zeroed(model, graph, selection), small, args, kwargs) < 1e-5
