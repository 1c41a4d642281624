"""Where to draw the operators of a graph: rows by longest path, lanes by barycentre, rows wrapped into columns.

A network of thousands of layers is a long thin strip, so the strip is cut like newspaper text: into columns side by side,
cut where few edges cross. All lengths are pixels at zoom 1. Legend: `N` operators, `R` rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from geta.graph.view import GraphView, NodeView

LANE, ROW, GUTTER = 196, 62, 130
_MOST_LANES = 24
_MOST_COLUMNS = 48
_WIDE = 1.5  # width / height of the drawing that the number of columns aims at


@dataclass(frozen=True)
class Band:
    """A block of the user's module tree within one column: its path and its corners."""

    label: str
    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Layout:
    """x, y: int [N], centre of each operator; column: int [N]; gutters: per column, the x of the free strip left of it."""

    x: np.ndarray
    y: np.ndarray
    column: np.ndarray
    gutters: tuple[int, ...]
    bands: tuple[Band, ...]


def lay_out(view: GraphView) -> Layout:
    """Place every operator; deterministic, and linear in the size of the graph."""
    nodes = view.nodes
    if not nodes:
        empty = np.zeros(0, dtype=np.int64)
        return Layout(empty, empty, empty, (), ())
    row, lane = _rows_and_lanes(nodes, _layers(nodes))
    starts = _cuts(nodes, row, lane)
    column = np.searchsorted(starts, row, side="right") - 1
    low = np.full(len(starts), np.inf)
    high = np.full(len(starts), -np.inf)
    np.minimum.at(low, column, lane)
    np.maximum.at(high, column, lane)
    widths = (high - low + 1) * LANE + GUTTER
    left = np.concatenate([[0.0], np.cumsum(widths)[:-1]])
    x = np.round(left[column] + GUTTER + (lane - low[column] + 0.5) * LANE).astype(np.int64)
    y = np.round((row - starts[column] + 0.5) * ROW).astype(np.int64)
    gutters = tuple(int(value) for value in np.round(left + GUTTER / 2))
    return Layout(x, y, column, gutters, _bands(nodes, x, y, column))


def _layers(nodes: Sequence[NodeView]) -> np.ndarray:
    """Longest path from the model inputs; what is computed from parameters alone stands just before its first reader."""
    layer = np.zeros(len(nodes), dtype=np.int64)
    for place, node in enumerate(nodes):
        fed = [layer[source] for source in node.inputs if nodes[source].fed]
        layer[place] = max(fed) + 1 if fed else 0
    first_reader = np.full(len(nodes), np.iinfo(np.int64).max)
    for place in reversed(range(len(nodes))):
        if not nodes[place].fed and first_reader[place] < np.iinfo(np.int64).max:
            layer[place] = first_reader[place] - 1
        for source in nodes[place].inputs:
            first_reader[source] = min(first_reader[source], layer[place])
    return np.asarray(layer - layer.min())


def _rows_and_lanes(nodes: Sequence[NodeView], layer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spread each layer over as many rows as it needs; put every operator below the middle of what it reads."""
    order = np.argsort(layer, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(layer[order])) + 1)
    readers: list[list[int]] = [[] for _ in nodes]
    for place, node in enumerate(nodes):
        for source in node.inputs:
            readers[source].append(place)
    row = np.zeros(len(nodes), dtype=np.int64)
    lane = np.zeros(len(nodes))
    base = 0
    for layer_members in members:
        wanted = {int(place): _wanted(int(place), nodes, readers, lane) for place in layer_members}
        ranked = sorted(wanted, key=lambda place: (wanted[place], place))
        rows = -(-len(ranked) // _MOST_LANES)
        for number in range(rows):
            mine = ranked[number::rows]
            weights = [8.0 if nodes[place].fed else 1.0 for place in mine]
            for place, at in zip(mine, _spread([wanted[place] for place in mine], weights), strict=True):
                row[place], lane[place] = base + number, at
        base += rows
    return row, lane


def _wanted(place: int, nodes: Sequence[NodeView], readers: Sequence[Sequence[int]], lane: np.ndarray) -> float:
    """The lane an operator would like: the mean of its sources; beside its reader's other source for an attached branch."""
    sources = [source for source in nodes[place].inputs if nodes[source].fed] or list(nodes[place].inputs)
    if sources:
        return float(np.mean(lane[sources]))
    beside = [source for reader in readers[place][:1] for source in nodes[reader].inputs if nodes[source].fed]
    grand = [source for other in beside for source in nodes[other].inputs if nodes[source].fed] or beside
    return (float(np.mean(lane[grand])) if grand else 0.0) + (0.0 if nodes[place].fed else 1.0)


def _spread(wanted: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Positions at least 1 apart in the given order, nearest to the wanted ones (weighted isotonic regression)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many
    for number, (want, weight) in enumerate(zip(wanted, weights, strict=True)):
        block = (want - number, weight, 1)
        while blocks and blocks[-1][0] >= block[0]:
            mean, before, count = blocks.pop()
            total = before + block[1]
            block = ((mean * before + block[0] * block[1]) / total, total, count + block[2])
        blocks.append(block)
    flat = [mean for mean, _, count in blocks for _ in range(count)]
    return [mean + number for number, mean in enumerate(flat)]


def _cuts(nodes: Sequence[NodeView], row: np.ndarray, lane: np.ndarray) -> np.ndarray:
    """First row of every column: as many columns as give the drawing its shape, moved to rows that few edges cross."""
    rows = int(row.max()) + 1
    low, high = np.full(rows, np.inf), np.full(rows, -np.inf)
    np.minimum.at(low, row, lane)
    np.maximum.at(high, row, lane)
    crossing = np.zeros(rows + 1, dtype=np.int64)
    for place, node in enumerate(nodes):
        for source in node.inputs:
            crossing[row[source] + 1] += 1
            crossing[row[place] + 1] -= 1
    crossing = np.cumsum(crossing)[:rows]  # edges that pass from above row r into it or beyond
    best = np.zeros(1, dtype=np.int64)
    best_miss = np.inf
    for count in range(1, min(_MOST_COLUMNS, rows) + 1):
        length = rows / count
        reach = max(1, int(length * 0.2))
        starts = [0]
        for number in range(1, count):
            middle = round(number * length)
            window = range(max(starts[-1] + 1, middle - reach), min(rows - 1, middle + reach) + 1)
            if window:
                starts.append(min(window, key=lambda at: (crossing[at], abs(at - middle), at)))
        width = float((np.maximum.reduceat(high, starts) - np.minimum.reduceat(low, starts) + 1).sum()) * LANE + GUTTER * len(starts)
        height = float(np.diff([*starts, rows]).max()) * ROW
        miss = abs(np.log(width / height / _WIDE))
        if miss < best_miss:
            best, best_miss = np.array(starts, dtype=np.int64), miss
    return best


def block_of(module: str) -> str:
    """The block that a module path belongs to: up to its first number (`layer1.0`, `encoder.layer.3`), else its first part."""
    parts = module.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def _bands(nodes: Sequence[NodeView], x: np.ndarray, y: np.ndarray, column: np.ndarray) -> tuple[Band, ...]:
    """One band per run of rows of a column in which a block has operators."""
    groups: dict[tuple[int, str], list[int]] = {}
    for place, node in enumerate(nodes):
        if node.module:
            groups.setdefault((int(column[place]), block_of(node.module)), []).append(place)
    bands = []
    for (_, label), places in groups.items():
        ranked = sorted(places, key=lambda place: (int(y[place]), place))
        runs = [[ranked[0]]]
        for before, place in pairwise(ranked):
            if y[place] - y[before] > 4 * ROW:
                runs.append([])
            runs[-1].append(place)
        for run in runs:
            left, right = int(x[run].min()) - LANE // 2, int(x[run].max()) + LANE // 2
            top, bottom = int(y[run].min()) - ROW // 2, int(y[run].max()) + ROW // 2
            bands.append(Band(label, left, top, right, bottom))
    bands.sort(key=lambda band: not any(part.isdigit() for part in band.label.split(".")))
    clear: list[Band] = []  # blocks without a number may hold others; they are shown only where they stand alone
    for band in bands:
        if any(part.isdigit() for part in band.label.split(".")) or not any(_overlap(band, other) for other in clear):
            clear.append(band)
    return tuple(clear)


def _overlap(one: Band, two: Band) -> bool:
    return one.left < two.right and two.left < one.right and one.top < two.bottom and two.top < one.bottom
