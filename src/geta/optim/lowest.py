"""The lowest-scored groups found on the device, for decisions that are taken at every step.

Legend: `G` groups, `F` families.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from geta.optim.groups import GroupIndex
from geta.optim.selection import Selector


class Lowest:
    """Which groups are the K lowest that may be removed together [G], on the device and without waiting for it.

    Of each family only as many as it may lose are candidates; equal scores count in the order of groups, as in `Selector`. Whole
    residual branches are chosen apart, as many as may go of them, and of each set all but one are candidates.
    """

    def __init__(self, index: GroupIndex, selector: Selector) -> None:
        layered = [family for together in selector.layers for family in together]
        if selector.counts is not None:
            blocks, most = np.arange(len(selector.options)), np.array(selector.counts, np.int64)
        else:
            blocks, most = np.arange(len(selector.options)), np.array([counts[-1] for counts in selector.options], np.int64)
            for together in selector.layers:
                blocks[together] = together[0]
                most[together] = len(together) - 1
        self._block_G = torch.from_numpy(np.repeat(blocks, index.sizes).astype(np.int64)).to(index.device)
        self._most_G = torch.from_numpy(np.repeat(most, index.sizes).astype(np.int64)).to(index.device)
        kind = np.isin(np.arange(len(selector.options)), layered)
        flags = torch.from_numpy(np.repeat(kind, index.sizes)).to(index.device)
        pools = [(~flags, selector.target - selector.layer_target), (flags, selector.layer_target)]
        self._pools = [(flags_G, count) for flags_G, count in pools if count]

    def __call__(self, scores_G: Tensor) -> Tensor:
        """Flags of the K lowest [G]."""
        by_score = torch.argsort(scores_G, stable=True)
        by_block = by_score[torch.argsort(self._block_G[by_score], stable=True)]
        block, place = self._block_G[by_block], torch.arange(len(by_block), device=scores_G.device)
        starts = torch.full_like(self._block_G, len(by_block)).scatter_reduce_(0, block, place, "amin")
        candidates = torch.zeros_like(self._block_G, dtype=torch.bool)
        candidates[by_block] = place - starts[block] < self._most_G[by_block]
        lowest = torch.zeros_like(candidates)
        for flags_G, count in self._pools:
            order = torch.argsort(torch.where(candidates & flags_G, scores_G, float("inf")), stable=True)
            lowest[order[:count]] = True
        return lowest
