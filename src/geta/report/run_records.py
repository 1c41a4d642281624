"""What a run leaves behind, as frozen records: the meaning of every file of a run folder (docs/report.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class HistoryRow:
    """One evaluation of one run: a line of history.jsonl.

    run: "dense" or "compact". stage: of the optimizer, "" for a plain one. loss: mean over the steps since the row before.
    epoch: how many are done; None in a run that counts steps only.
    score: of the task's metric, None where it was not measured. group_sparsity: share of the groups that are zero.
    mean_weight_bits, upper_bound: in bits, None without quantizers. seconds: since the run began.
    """

    run: str
    step: int
    loss: float | None
    epoch: float | None = None
    score: float | None = None
    stage: str = ""
    group_sparsity: float = 0.0
    mean_weight_bits: float | None = None
    upper_bound: float | None = None
    learning_rate: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class MetricRecord:
    """The score of both networks; dense and difference are None without a baseline."""

    name: str
    unit: str = ""
    higher_is_better: bool = True
    dense: float | None = None
    compact: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Pair:
    """A cost of both networks; dense is None where it was not recorded."""

    compact: float
    dense: float | None = None

    @property
    def relative(self) -> float | None:
        """compact / dense; None where there is nothing to divide by."""
        return self.compact / self.dense if self.dense else None


@dataclass(frozen=True)
class Bytes:
    """compact_weights: packed weights and scales. compact_folder: all files of the saved model. dense_state_dict: the dense tensors."""

    compact_weights: float
    compact_folder: float | None = None
    dense_state_dict: float | None = None


@dataclass(frozen=True)
class Groups:
    """Groups that could be pruned, that were to be, and that were."""

    groups: int
    target_groups: int | None = None
    pruned_groups: int = 0


@dataclass(frozen=True)
class Times:
    """Milliseconds per call."""

    median: float
    p95: float | None = None
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Result:
    """result.json: what was measured when a run was done. Costs are per example. See docs/report.md for the keys."""

    name: str
    params: Pair
    macs: Pair
    bops: Pair
    bytes: Bytes
    groups: Groups
    format: int = 1
    task: str = ""
    metric: MetricRecord | None = None
    relative: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bits: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)
    latency_ms: Mapping[str, Mapping[str, Times]] = field(default_factory=dict)
    max_rel_difference: float | None = None
    max_rel_difference_float32: float | None = None
    reloaded_equal: bool | None = None
    seconds: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class FamilyRecord:
    """A family of analysis.json, without its members; see docs/json-format.md."""

    name: str
    size: int
    unit: str = "groups"
    prunable: bool = True
    reason: str = ""
    inexact: str = ""
    suggestion: str = ""


@dataclass(frozen=True)
class Operation:
    """One row of costs.json, per example. name: the module path that called the operator, "" for the model itself."""

    name: str
    op: str
    macs: float
    bops: float
    params: float | None = None
    bytes: float | None = None


@dataclass(frozen=True)
class Costs:
    """costs.json: the operations of both networks; dense is empty where it was not recorded."""

    compact: tuple[Operation, ...] = ()
    dense: tuple[Operation, ...] = ()


@dataclass(frozen=True)
class Environment:
    """environment.json: where and how a run was started."""

    versions: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    platform: str = ""
    threads: int | None = None
    device: str = ""
    command: tuple[str, ...] = ()
    started: str = ""


@dataclass(frozen=True)
class Run:
    """All that a report is made of.

    folder:  of the run, or of a saved compact model alone (`trained` is False then, and there is no history, recipe or environment).
    recipe:  the text of recipe.yaml; settings: the same as data, {} without one.
    graph:   the text of graph.json, which draws the operators; "" where it was not recorded.
    """

    folder: Path
    result: Result
    trained: bool
    families: tuple[FamilyRecord, ...] = ()
    costs: Costs = field(default_factory=Costs)
    history: tuple[HistoryRow, ...] = ()
    environment: Environment | None = None
    recipe: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    graph: str = ""

    @property
    def name(self) -> str:
        """What to call the run: its recipe's name, or that of its folder."""
        return self.result.name or self.folder.resolve().name
