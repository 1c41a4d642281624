"""Optimizers that compress while they train: QASSO, HESSO and their parts."""

from __future__ import annotations

from geta.optim.budget import Budget
from geta.optim.cric import HESSOCRIC
from geta.optim.forget import Forgetting
from geta.optim.groups import GroupIndex
from geta.optim.hesso import HESSO
from geta.optim.observe import OBSERVERS, Observer, register_observer
from geta.optim.qasso import QASSO
from geta.optim.saliency import CRITERIA, GroupStatistics, Saliency, register_criterion
from geta.optim.schedule import Schedule, Stage
from geta.optim.selection import Selector
from geta.optim.setup import quantizer_parameters

__all__ = [
    "CRITERIA",
    "HESSO",
    "HESSOCRIC",
    "OBSERVERS",
    "QASSO",
    "Budget",
    "Forgetting",
    "GroupIndex",
    "GroupStatistics",
    "Observer",
    "Saliency",
    "Schedule",
    "Selector",
    "Stage",
    "quantizer_parameters",
    "register_criterion",
    "register_observer",
]
