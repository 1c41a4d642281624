"""The lowest-scored groups found on the device, for decisions that are taken at every step.

Legend: `G` groups, `F` families.
"""

from __future__ import annotations

import torch
from torch import Tensor

from geta.optim.groups import GroupIndex
from geta.optim.selection import Selector


class Lowest:
    """Which groups are the K lowest that may be removed together [G], on the device and without waiting for it.

    Of each family only as many as it may lose are candidates; equal scores count in the order of groups, as in `Selector`.
    """

    def __init__(self, index: GroupIndex, selector: Selector) -> None:
        self._family_G, self._count = index.family_of_G, selector.target
        self._first_F = torch.from_numpy(index.starts[:-1].copy()).to(index.device)
        most = [counts[-1] for counts in selector.options] if selector.counts is None else selector.counts
        self._most_F = torch.tensor(most, dtype=torch.int64, device=index.device)

    def __call__(self, scores_G: Tensor) -> Tensor:
        """Flags of the K lowest [G]."""
        by_score = torch.argsort(scores_G, stable=True)
        by_family = by_score[torch.argsort(self._family_G[by_score], stable=True)]
        family = self._family_G[by_family]
        rank = torch.arange(len(by_family), device=scores_G.device) - self._first_F[family]
        candidates = torch.zeros_like(self._family_G, dtype=torch.bool)
        candidates[by_family] = rank < self._most_F[family]
        order = torch.argsort(torch.where(candidates, scores_G, float("inf")), stable=True)
        lowest = torch.zeros_like(candidates)
        lowest[order[: self._count]] = True
        return lowest
