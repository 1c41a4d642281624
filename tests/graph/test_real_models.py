"""Capture and analysis of models as they are found: names, notes, regions, control flow, and a model that stays as it was."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import real_models
from geta.errors import BadModelError, UnsupportedOpError
from geta.graph import analyze
from geta.graph.backward import checkpoints_inlined
from geta.graph.capture import capture
from geta.graph.names import canonical_module, canonical_name, find_tensor, unwrap
from geta.graph.places import is_user_file
from geta.quant import quantize

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")


def members(model: nn.Module, args: tuple[Any, ...], name: str) -> dict[tuple[str, int], bool]:
    """{(tensor, dimension): must be zero} of one family."""
    family = next(family for family in analyze(model, args).families if family.name == name)
    return {(member.param, member.dim): member.zero for member in family.members}


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_weight_norm_zeroes_the_scale_and_cuts_the_direction() -> None:
    model, args, _ = real_models.build("weight_norm_conv")
    assert members(model, args, "first") == {
        ("first.parametrizations.weight.original0", 0): True,
        ("first.parametrizations.weight.original1", 0): False,
        ("first.bias", 0): True,
        ("second.parametrizations.weight.original1", 1): True,
    }
    model, args, _ = real_models.build("weight_norm_hook")
    assert members(model, args, "first")[("first.weight_v", 0)] is False


def test_spectral_norm_zeroes_both_sides() -> None:
    model, args, _ = real_models.build("spectral_norm")
    found = members(model, args, "first")
    assert found[("first.weight", 0)] and found[("second.weight", 1)] and not found[("second.parametrizations.weight.0._v", 0)]


def test_orthogonal_weights_say_why_they_stay() -> None:
    model, args, _ = real_models.build("orthogonal")
    reasons = [family.reason for family in analyze(model, args).families if "first.weight" in {m.param for m in family.members}]
    assert reasons and all("linalg_householder_product at first" in reason for reason in reasons)


def test_unused_and_tied_tensors() -> None:
    model, args, _ = real_models.build("shared")
    unused = {m.param for f in analyze(model, args).families if f.reason == "is never used in forward" for m in f.members}
    assert unused == {"unused.weight", "unused.bias", "lonely"}
    model, args, _ = real_models.build("tied")
    families = analyze(model, args).families
    assert not any("never used" in family.reason for family in families)
    assert {member.param for family in families for member in family.members} == {
        "embed.weight",
        "up.weight",
        "up.bias",
        "down.weight",
        "down.bias",
    }


def test_complex_parts_stay_together() -> None:
    model, args, _ = real_models.build("rotary_complex")
    first = next(family for family in analyze(model, args).families if family.name == "first")
    assert first.prunable and first.size in (2, 4)
    assert all(member.index.shape[1] == 16 // first.size for member in first.members if member.param == "first.weight")
    model, args, _ = real_models.build("fourier_mixing")
    kept = next(family for family in analyze(model, args).families if family.name == "first")
    assert "fft_fft2" in kept.reason


@pytest.mark.parametrize("name", ["branches", "loops", "selects", "cond", "autocast", "spectral_norm_hook", "weight_norm_hook", "no_grad"])
@pytest.mark.parametrize("train", [False, True])
def test_a_capture_leaves_no_trace(name: str, train: bool) -> None:
    model, args, kwargs = real_models.build(name)
    before = copy.deepcopy(model.state_dict())
    attributes = {path: dict(module.__dict__) for path, module in model.named_modules()}
    hooks = {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()}
    inputs = copy.deepcopy(args)
    state = torch.random.get_rng_state()
    capture(model, args, kwargs, train=train)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for path, module in model.named_modules():
        assert not module.training
        assert list(module.__dict__) == list(attributes[path])
        assert all(module.__dict__[key] is value for key, value in attributes[path].items())
    assert hooks == {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()}
    assert all(torch.equal(a, b) for a, b in zip(args, inputs, strict=True))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_failing_forward_leaves_no_trace() -> None:
    class Fails(real_models.Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.cache: list[Any] = []
            self.last: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count = self.count + 1
            self.cache.append(x)
            self.last = x
            self.extra = x
            raise ValueError("no such thing")

    model = Fails().train()
    model.second.eval()
    with pytest.raises(BadModelError, match=r"no such thing.*test_real_models\.py:\d+ in forward"):
        analyze(model, (real_models.ROW,))
    assert model.training and not model.second.training and model.first.training
    assert model.cache == [] and model.last is None and not hasattr(model, "extra")
    assert type(model.count) is torch.Tensor and float(model.count) == 0 and "forward" not in model.__dict__
    assert not model._forward_hooks


def test_the_path_of_the_example_is_followed_and_named() -> None:
    model, args, kwargs = real_models.build("branches")
    captured = capture(model, args, kwargs)
    line = next(n for n, text in enumerate(Path(real_models.__file__).read_text().splitlines(), 1) if "if hidden.sum() > 0" in text)
    assert len(captured.notes) == 1
    assert f"real_models.py:{line}: followed the path" in captured.notes[0] and "fixed" in captured.notes[0]
    assert {captured.module_path(node) for node in captured.graph.nodes if node.op == "call_function"} == {"first", "", "yes"}
    assert set(captured.tensor_names.values()) == {name for name, _ in model.named_parameters()}

    with torch.no_grad():
        model.first.bias.fill_(-50.0)
    other = capture(model, args, kwargs)
    assert "no" in {other.module_path(node) for node in other.graph.nodes if node.op == "call_function"}


def test_export_is_preferred_where_it_works() -> None:
    model, args, kwargs = real_models.build("selects")
    captured = capture(model, args, kwargs)
    assert captured.notes == () and "aten.nonzero.default" in targets(captured.graph)


def test_quantizers_are_seen_on_a_followed_path() -> None:
    model, args, kwargs = real_models.build("branches")
    plain = analyze(model, args, kwargs)
    quantize(model, weights=(4, 8), activations=None, exclude=())
    graph = analyze(model, args, kwargs)
    assert "followed the path" in graph.notes[0]
    assert "geta.fake_quantize.default" in targets(graph.analysis.capture.graph)
    assert [family.name for family in graph.families if family.prunable] == [family.name for family in plain.families if family.prunable]
    assert graph.num_groups == plain.num_groups > 0


def test_dynamic_shapes_are_not_dropped_for_a_followed_path() -> None:
    model, args, _ = real_models.build("branches")
    with pytest.raises(BadModelError, match=r"real_models\.py:\d+ in forward.*control flow"):
        analyze(model, args, dynamic_shapes={"x": {0: torch.export.Dim("batch")}})


def test_examples_that_select_nothing_are_refused() -> None:
    model, (x, lengths), _ = real_models.build("selects")
    with pytest.raises(BadModelError, match=r"select nothing \(at .*real_models\.py:\d+"):
        analyze(model, (-x.abs(), lengths))


def test_sizes_that_depend_on_values_need_values() -> None:
    with torch.device("meta"):
        model, args = real_models.Selects(), (torch.empty(4, 6), torch.empty(3, dtype=torch.int64))
    with pytest.raises(BadModelError, match="meta"):
        analyze(model, args)


def test_loops_of_torch_are_refused_by_name() -> None:
    class Loop(real_models.Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            from torch._higher_order_ops.while_loop import while_loop

            _, found = while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, h * 2), (torch.tensor(0), self.first(x)))
            return self.head(self.second(found))

    with pytest.raises(UnsupportedOpError, match=r"higher_order\.while_loop"):
        analyze(Loop(), (real_models.ROW,))


def test_torchscript_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    model.append(torch.jit.ScriptModule())
    with pytest.raises(BadModelError, match="module '1' is TorchScript"):
        analyze(model, (real_models.ROW,))


def test_casts_of_autocast_are_in_the_graph() -> None:
    model, args, _ = real_models.build("autocast")
    captured = capture(model, args)
    linears = [node for node in captured.graph.nodes if str(node.target) == "aten.linear.default"]
    dtypes = [node.args[1].meta["val"].dtype for node in linears]
    assert dtypes == [torch.bfloat16] * 3 + [torch.float32]
    assert captured.notes == ()


def test_regions_without_gradients_are_cut_off() -> None:
    model, args, _ = real_models.build("no_grad")
    graph = capture(model, args, train=True).graph
    assert "aten.detach.default" in targets(graph) and "aten.mul_.Tensor" in targets(graph)


def test_an_unregistered_dataclass_is_returned() -> None:
    @dataclasses.dataclass
    class Fresh:
        one: torch.Tensor
        two: dict[str, Any]

    class Returns(real_models.Mlp):
        def forward(self, x: torch.Tensor, box: Any) -> Any:
            return Fresh(super().forward(box.one), {"again": Fresh(x, {})})

    captured = capture(Returns(), (real_models.ROW, Fresh(real_models.ROW, {})))
    assert captured.out_spec.type is Fresh and captured.out_spec.num_leaves == 2


def test_names_of_wrapped_models() -> None:
    inner = real_models.Mlp()
    outer = torch.compile(nn.DataParallel(inner), backend="eager")
    assert unwrap(outer) is inner and unwrap(inner) is inner
    assert canonical_name("_orig_mod.a.weight") == "a.weight" and canonical_name("a._orig_mod.b._orig_mod.weight") == "a.b.weight"
    assert canonical_name("my_orig_mod.weight") == "my_orig_mod.weight"
    assert canonical_module("a._orig_mod") == "a" and canonical_module("_orig_mod") == ""
    assert find_tensor(outer, "head.bias") is inner.head.bias
    with pytest.raises(BadModelError, match="no module 'module'"):
        find_tensor(outer, "module.weight")
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    assert find_tensor(normed, "parametrizations.weight.original1") is normed.parametrizations.weight.original1
    with pytest.raises(BadModelError, match="no tensor 'weight'"):
        find_tensor(normed, "weight")


def test_reentrant_checkpoints_are_put_back() -> None:
    before = torch.utils.checkpoint.CheckpointFunction.apply
    with checkpoints_inlined() as used:
        assert used == []
        torch.utils.checkpoint.checkpoint(torch.relu, torch.ones(2, requires_grad=True), use_reentrant=True).sum().backward()
    assert len(used) == 1
    assert torch.utils.checkpoint.CheckpointFunction.apply.__func__ is before.__func__
    assert "apply" not in vars(torch.utils.checkpoint.CheckpointFunction)


def test_whose_file_it_is() -> None:
    assert is_user_file(__file__) and is_user_file("/home/me/torch/geta/model.py")
    assert not is_user_file(torch.nn.modules.linear.__file__) and not is_user_file("<string>")
    assert not is_user_file(dataclasses.__file__) and not is_user_file(capture.__code__.co_filename)
    assert is_user_file(pytest.__file__), "an installed library's model is the user's too"
