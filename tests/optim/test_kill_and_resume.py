"""Runs that are killed with SIGKILL wherever they happen to be: after going on from the last checkpoint the result is bitwise the same."""

from __future__ import annotations

import random
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from kill_runs import EVERY, SCHEDULE, STEPS, train, train_on_ranks
from optim_nets import leaves
from two_ranks import fork_server, on_two_ranks


def same_file(one: Path, two: Path) -> None:
    """Both checkpoints hold the same values: weights, optimizer, scheduler, random numbers."""
    found = [list(leaves(torch.load(path, weights_only=True))) for path in (one, two)]
    assert [path for path, _ in found[0]] == [path for path, _ in found[1]]
    for (path, mine), (_, theirs) in zip(*found, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, path


def kill_points(count: int) -> list[int]:
    """Steps at random, spread evenly over the stages."""
    numbers = random.Random(11)
    edges = [0, SCHEDULE.warmup_steps, SCHEDULE.joint_start, SCHEDULE.cooldown_start, STEPS - 4]
    return sorted(step for low, high in pairwise(edges) for step in numbers.sample(range(low + 1, high), count // 4))


def run_and_kill(kind: str, folder: Path, steps: list[int]) -> list[tuple[int, str]]:
    """Train, killing the process when it begins each of `steps`; (step, stage) that it had last announced."""
    context, killed = fork_server(), []
    for step in [*steps, None]:
        listen, announce = context.Pipe(duplex=False)
        process = context.Process(target=train, args=(kind, folder, announce))
        process.start()
        announce.close()
        last = (-1, "")
        while True:
            try:
                last = listen.recv()
            except EOFError:
                break
            if step is not None and last[0] >= step:
                process.kill()
                break
        process.join()
        assert process.exitcode == (0 if step is None else -signal.SIGKILL)
        if step is not None:
            killed.append(last)
    return killed


@pytest.mark.parametrize(("kind", "kills"), [("qasso", 20), ("hesso", 4), ("cric", 8)])
def test_killed_at_random_steps_of_all_stages(kind, kills, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    train(kind, whole)
    killed = run_and_kill(kind, cut, kill_points(kills))
    assert len(killed) == kills
    assert {stage for _, stage in killed} >= ({"warm-up", "joint"} if kind == "cric" else {"warm-up", "joint", "cool-down"})
    same_file(whole / "final.pt", cut / "final.pt")


def test_a_rank_killed_in_the_joint_stage(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert on_two_ranks(train_on_ranks, whole, whole, None) == [0, 0]
    step = SCHEDULE.joint_start + 9
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        on_two_ranks(train_on_ranks, cut, cut, (1, step))
    assert not (cut / "final.pt").exists()
    assert on_two_ranks(train_on_ranks, cut, cut, None) == [step // EVERY * EVERY] * 2
    same_file(whole / "final.pt", cut / "final.pt")
