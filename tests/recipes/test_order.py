"""Which examples a step sees follows from (seed, epoch, step) alone."""

from __future__ import annotations

import pytest
import torch

from geta.errors import ConfigError
from geta.recipes.batches import TensorSplit
from geta.recipes.order import Batches, rows_in, seed_of, shuffled
from geta.recipes.read import check_recipe, parse_yaml
from recipe_nets import RECIPE


def batches(count: int = 50, **train: object) -> Batches:
    raw = parse_yaml(RECIPE, "test")
    raw["train"] |= {"batch_size": 8, "augment": [], **train}
    split = TensorSplit(
        {"images": torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 4, 4), "labels": torch.arange(count)}
    )
    return Batches(split, check_recipe(raw, "test").train)


def test_each_epoch_sees_every_example_at_most_once_in_another_order():
    found = batches()
    assert found.steps_per_epoch == 6
    epochs = [torch.cat([found[epoch * 6 + step]["labels"] for step in range(6)]) for epoch in range(2)]
    assert all(len(epoch.unique()) == 48 for epoch in epochs)
    assert not torch.equal(*epochs)


def test_a_batch_depends_on_its_number_and_the_seed_alone():
    first, second, other = batches(augment=[{"name": "shift"}]), batches(augment=[{"name": "shift"}]), batches(seed=2)
    torch.manual_seed(5)
    forward = [first[number] for number in range(12)]
    torch.manual_seed(6)
    backward = [second[number] for number in reversed(range(12))][::-1]
    assert all(torch.equal(a[key], b[key]) for a, b in zip(forward, backward, strict=True) for key in a)
    assert not torch.equal(forward[0]["labels"], other[0]["labels"])
    assert not torch.equal(forward[0]["images"], batches()[0]["images"])


def test_accumulated_batches_and_ranks_deal_out_one_step():
    whole, halves = batches(batch_size=16), batches(batch_size=8, accumulate=2)
    assert whole.total_steps == halves.total_steps == 40
    assert torch.equal(whole[3]["labels"], torch.cat([halves[6]["labels"], halves[7]["labels"]]))
    ranks = [Batches(whole.split, whole.settings, rank, 2)[3]["labels"] for rank in range(2)]
    assert torch.equal(torch.stack(ranks, dim=1).flatten(), whole[3]["labels"])
    assert Batches(whole.split, whole.settings, 0, 2).step_seed(1) != Batches(whole.split, whole.settings, 1, 2).step_seed(1)


def test_a_step_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="more than the 50 training examples: write at most 25"):
        batches(batch_size=32, accumulate=2)


def test_seeds_of_neighbours_differ():
    assert len({seed_of(seed, kind, step) for seed in range(5) for kind in range(3) for step in range(50)}) == 750
    assert shuffled(10, 0, 0) != shuffled(10, 0, 1)
    assert [list(rows) for rows in rows_in(5, 2)] == [[0, 1], [2, 3], [4]]
