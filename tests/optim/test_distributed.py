"""DistributedDataParallel on two processes (gloo) against one process with the same global batch: the same groups, bits and losses."""

from __future__ import annotations

import pytest

from rank_runs import SCHEDULE, STEPS, everything, resumed_at, same, saved_at, whole_run
from two_ranks import on_two_ranks

TOLERANCE = 1e-7
"""Float32's own; the runs are in float64, and Adam and learned step sizes amplify differences of the last digit."""
KINDS = ["qasso", "qasso-momentum", "qasso-budget", "qasso-outgrown", "hesso", "hesso-fisher", "hesso-activation", "cric"]
STOPS = {"qasso": 25, "qasso-budget": 17, "qasso-outgrown": 16, "hesso-activation": 8, "cric": 23}


@pytest.fixture(scope="module")
def foreign() -> dict[str, bytes]:
    """Checkpoints of runs on one process."""
    return {kind: saved_at(kind, stop) for kind, stop in STOPS.items()}


@pytest.fixture(scope="module")
def ranks(foreign, tmp_path_factory):
    return on_two_ranks(everything, tmp_path_factory.mktemp("ranks"), KINDS, STOPS, foreign)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict]:
    return {kind: whole_run(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_do_what_one_does(kind, ranks, alone):
    same(ranks[0]["whole"][kind], alone[kind], TOLERANCE)
    assert sum(int(removed.sum()) for removed in alone[kind]["selection"].values()) >= 9


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_end_bitwise_equal(kind, ranks):
    same(ranks[0]["whole"][kind], ranks[1]["whole"][kind], 0.0)


@pytest.mark.parametrize("kind", STOPS)
def test_a_resume_on_two_processes_is_bitwise(kind, ranks):
    for result in ranks:
        whole = result["whole"][kind]
        same(result["resumed"][kind], {**whole, "losses": whole["losses"][STOPS[kind] :]}, 0.0)


@pytest.mark.parametrize("kind", STOPS)
def test_one_process_goes_on_where_two_stopped(kind, ranks, alone):
    found = resumed_at(kind, STOPS[kind], ranks[0]["states"][kind].numpy().tobytes())
    same(found, {**alone[kind], "losses": alone[kind]["losses"][STOPS[kind] :]}, TOLERANCE)


@pytest.mark.parametrize("kind", STOPS)
def test_two_processes_go_on_where_one_stopped(kind, ranks, alone):
    for result in ranks:
        same(result["taken over"][kind], {**alone[kind], "losses": alone[kind]["losses"][STOPS[kind] :]}, TOLERANCE)


def test_ranks_with_other_settings_are_named(ranks):
    for result in ranks:
        assert result["disagreement"].startswith(f"{SCHEDULE.joint_start}: rank 1 decided otherwise than rank 0 about groups and bits")


def test_a_calibration_that_fails_on_one_rank_fails_on_all(ranks):
    assert [result["calibrations"] for result in ranks] == [ranks[0]["calibrations"]] * 2
    assert "infinite or NaN" in ranks[0]["calibrations"][0]


def test_stops_lie_in_the_joint_stage_and_in_a_window_of_observation():
    assert all(SCHEDULE.stage_at(stop) == "joint" for kind, stop in STOPS.items() if kind != "hesso-activation")
    assert SCHEDULE.cooldown_start < STEPS
