"""How good a network is: the task's metric over a whole split."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geta import ranks
from geta.errors import ConfigError
from geta.graph.preserve import mode_of
from geta.recipes.batches import Split
from geta.recipes.order import rows_in
from geta.recipes.processes import Place
from geta.recipes.stopping import Stop
from geta.recipes.tasks.task import Task


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, split: Split, size: int, place: Place, stop: Stop | None = None) -> float | None:  # noqa: PLR0917
    """The metric of a model in evaluation mode, in float32; processes share the batches and all get the same number.

    size: examples per batch. stop: ends a single process's evaluation early, which gives None.

    Raises ConfigError for an empty split.
    """
    if not len(split):
        raise ConfigError("the data's test split is empty: there is nothing to measure on")
    total: Tensor | None = None
    count = ranks.count()  # not place.ranks: once the others have left, the first process looks at everything
    with mode_of(model, False):
        for number, rows in enumerate(rows_in(len(split), size)):
            mine = count == 1 or number % count == place.rank
            if not mine and total is not None:
                continue
            if stop is not None and count == 1 and stop.requested:
                return None
            batch = place.move(split.batch(rows))
            args, kwargs = task.call(batch)
            found = task.tally(model(*args, **kwargs), batch).double().cpu() * mine  # zeros of the right shape from who has no batch
            total = found if total is None else total + found
    assert total is not None
    return task.score(ranks.total(total))
