"""`fully_shard` (FSDP2) over two processes (gloo) against one process with the same global batch, and what becomes of the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import geta
from geta.errors import CheckpointError, ConfigError
from geta.optim.packed import pack, unpack
from rank_runs import SCHEDULE, STEPS, global_batch, make_model, same
from shard_runs import KINDS, STOP, everything, resumed_at, saved_at, steps, unsharded, whole_run
from two_ranks import on_two_ranks

TOLERANCE = {"qasso": 1e-5}
"""Adam and the rule for step sizes amplify differences of the last digit, about tenfold in three steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def ranks(folder):
    for kind in ("qasso", "hesso-activation"):
        saved_at(kind, STOP, folder / "foreign" / kind)
    return on_two_ranks(everything, folder / "meeting", folder / "here", folder / "foreign")


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    return {kind: whole_run(kind) for kind in KINDS}


def rest(whole: dict) -> dict:
    return {**whole, "losses": whole["losses"][STOP:]}


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_over_two_processes_as_on_one(kind, ranks, alone):
    for result in ranks:
        same(result["whole"][kind], alone[kind], TOLERANCE.get(kind, 1e-9))


def test_an_optimizer_that_was_made_first_and_switched(ranks):
    for result in ranks:
        same(result["switched"], result["whole"]["qasso"], 0.0)


@pytest.mark.parametrize("kind", ["qasso", "hesso-activation"])
def test_resume_through_distributed_checkpoints(kind, ranks):
    for result in ranks:
        same(result["resumed"][kind], rest(result["whole"][kind]), 0.0)


@pytest.mark.parametrize("kind", ["qasso", "hesso-activation"])
def test_resume_on_another_number_of_processes(kind, ranks, alone, folder):
    for result in ranks:
        same(result["taken over"][kind], rest(alone[kind]), TOLERANCE.get(kind, 1e-9))
    same(resumed_at(kind, STOP, folder / "here" / kind), rest(alone[kind]), TOLERANCE.get(kind, 1e-9))


@pytest.mark.parametrize("kind", ["qasso", "hesso"])
def test_the_compact_model_from_the_full_state(kind, ranks, alone):
    """An unsharded copy takes the full state dict and is compacted; also on a machine that never trained it."""
    model, _ = unsharded(kind)
    model.load_state_dict(ranks[0]["whole"][kind]["weights"])
    graph = geta.analyze(model, (global_batch(0)[0],))
    small = geta.compact(model, graph)
    removed = {name: (~flags).nonzero().flatten().tolist() for name, flags in alone[kind]["selection"].items()}
    assert small.info.kept == removed
    x = global_batch(3)[0]
    torch.testing.assert_close(small(x), model.eval()(x))


def test_mixed_precision_keeps_masters_and_step_sizes_in_float32(ranks):
    found = ranks[0]["low precision"]
    assert found["seen"] == ["torch.bfloat16"]
    assert found["dtypes"] == ["torch.float32"]
    model = make_model().float()
    geta.quantize(model, weights=(4, 8), activations=(8, 8), calibration=[global_batch(0)[0].float()], exclude=())
    model.load_state_dict(found["weights"])
    small = geta.compact(model, geta.analyze(model, (global_batch(0)[0].float(),)))
    assert sum(len(kept) for kept in small.info.kept.values()) == 16  # of 9 + 12 + 10, half are removed
    assert all(4 <= bits <= 8 and bits == int(bits) for bits in small.bits.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("made too early", r"ConfigError: the model's '0.weight' was replaced after the optimizer was made"),
        ("cric", "ConfigError: HESSOCRIC goes back to a copy"),
        ("compact", r"ConfigError: 8 parameters are spread over several ranks \(first: '0.weight'\)"),
        ("budget", "ConfigError: the model is sharded .*before fully_shard"),
        ("quantizers", r"ConfigError: parameters of quantizers are sharded.*ignored_params=set\(geta.optim.quantizer_parameters"),
    ],
)
def test_what_cannot_work_is_refused(name, message, ranks):
    for result in ranks:
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(result["refusals"][name])


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_asking_for_the_state_is_no_step(base):
    """`get_optimizer_state_dict` steps optimizers without state, with zero gradients at learning rate 0."""
    model, graph = unsharded("hesso")
    optimizer = geta.HESSO(base(model.parameters(), lr=0.1), graph, sparsity=0.5, schedule=SCHEDULE)
    for step in range(STOP):
        optimizer.zero_grad()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = get_optimizer_state_dict(model, optimizer)
        assert optimizer.progress()["step"] == step
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert unpack(state["param_groups"][0]["geta"])["step"] == step
        steps(model, optimizer, step, step + 1)


def test_a_saver_that_flattens_groups_is_noticed():
    model, graph = unsharded("hesso")
    optimizer = geta.HESSO(torch.optim.AdamW(model.parameters()), graph, sparsity=0.5, schedule=SCHEDULE)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    with pytest.raises(CheckpointError, match="no 'geta' part"):
        set_optimizer_state_dict(model, optimizer, state, options=options)


def test_a_budget_bound_to_another_model():
    graph = unsharded("qasso")[1]
    bound = geta.Budget(bops=0.015).bind(graph)
    model = make_model()
    other = geta.analyze(model, (global_batch(0)[0],))
    with pytest.raises(ConfigError, match=r"bound to another model, which has '0\.weight'"):
        geta.HESSO(torch.optim.SGD(model.parameters(), lr=0.1), other, target=bound, schedule=STEPS)


def test_packed_sections_come_back_as_they_were():
    section = {
        "numbers": torch.arange(6, dtype=torch.float64).view(2, 3).t() / 7,
        "none": torch.zeros(0, 3, dtype=torch.bool),
        "half": torch.tensor(1.5, dtype=torch.bfloat16),
        0: {"step": 3, "name": "ä", "fine": True, "nothing": None, "list": [1, 2.5, torch.tensor([True, False])]},
    }
    found = unpack(pack(section))
    assert list(found) == list(section)
    for key in ("numbers", "none", "half"):
        assert torch.equal(found[key], section[key])
        assert found[key].dtype == section[key].dtype
    assert {**found[0], "list": found[0]["list"][:2]} == {**section[0], "list": [1, 2.5]}
    assert torch.equal(found[0]["list"][2], section[0]["list"][2])
    for damaged in ("{", '{"tensor": 3}', '{"tensor": ["float32", [2], "AAAA"]}', "[{}]"):
        with pytest.raises(CheckpointError, match="can't be read"):
            unpack(damaged)
