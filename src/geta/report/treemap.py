"""Treemaps: rectangles whose areas are shares of a whole, blocks of the model around their modules.

Source: "Squarified treemaps" (Bruls, Huizing, van Wijk 2000): rows are filled as long as their rectangles become squarer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from geta.graph.layout import block_of
from geta.report.charts import NARROW, WIDE
from geta.report.markup import Html, join, tag
from geta.report.words import magnitude, percent

_MOST_MODULES, _MOST_TILES = 60, 120
_LETTER = 6.4  # pixels


@dataclass(frozen=True)
class Share:
    """What a module takes: `value` of the dense network, `left` of that in the compact one."""

    module: str
    value: float
    left: float


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    x: float
    y: float
    width: float
    height: float


def treemap(shares: Sequence[Share], unit: str, label: str) -> Html:
    """The wide and the narrow drawing; the solid part of a tile is what is left of it."""
    tiles = _limited([share for share in shares if share.value > 0])
    wide = tag("div", _draw(tiles, Box(0, 0, WIDE, 300), unit, label), class_="wide")
    return join(wide, tag("div", _draw(tiles, Box(0, 0, NARROW, 340), unit, label), class_="narrow"))


def squarify(values: Sequence[float], box: Box) -> list[Box]:
    """Rectangles that fill `box`, with areas in proportion to `values` (positive, descending)."""
    found: list[Box] = []
    rest, total, start = box, sum(values), 0
    while start < len(values):
        scale = rest.width * rest.height / total if total else 0.0
        side = min(rest.width, rest.height)
        end = start + 1
        while end < len(values) and _worst(values[start : end + 1], scale, side) <= _worst(values[start:end], scale, side):
            end += 1
        row, rest = _row(values[start:end], scale, rest)
        found += row
        total -= sum(values[start:end])
        start = end
    return found


def _worst(values: Sequence[float], scale: float, side: float) -> float:
    """The longest side over the shortest one in a row of these values."""
    areas = [value * scale for value in values]
    total = sum(areas)
    if total <= 0 or side <= 0:
        return 1.0
    return max(side**2 * max(areas) / total**2, total**2 / (side**2 * max(min(areas), 1e-12)))


def _row(values: Sequence[float], scale: float, rest: Box) -> tuple[list[Box], Box]:
    """Lay one row along the shorter side; what remains of the box."""
    area = sum(values) * scale
    upright = rest.width >= rest.height
    side = rest.height if upright else rest.width
    thick = area / side if side else 0.0
    boxes, at = [], 0.0
    for value in values:
        length = value * scale / thick if thick else 0.0
        boxes.append(Box(rest.x, rest.y + at, thick, length) if upright else Box(rest.x + at, rest.y, length, thick))
        at += length
    if upright:
        return boxes, Box(rest.x + thick, rest.y, max(0.0, rest.width - thick), rest.height)
    return boxes, Box(rest.x, rest.y + thick, rest.width, max(0.0, rest.height - thick))


def _limited(shares: list[Share]) -> list[Share]:
    """Modules; where they are too many, the blocks that they belong to, or runs of neighbouring blocks. Largest first."""
    if len(shares) > _MOST_MODULES:
        shares = [_together(block, found) for block, found in _blocks(shares).items()]
    if len(shares) > _MOST_TILES:
        length = -(-len(shares) // _MOST_TILES)
        runs = [shares[start : start + length] for start in range(0, len(shares), length)]
        shares = [_together(f"{run[0].module} to {run[-1].module}", run) for run in runs]
    return sorted(shares, key=lambda share: -share.value)


def _blocks(shares: Sequence[Share]) -> dict[str, list[Share]]:
    blocks: dict[str, list[Share]] = {}
    for share in shares:
        blocks.setdefault(block_of(share.module), []).append(share)
    return blocks


def _together(name: str, shares: Sequence[Share]) -> Share:
    return Share(name, sum(share.value for share in shares), sum(share.left for share in shares))


def _draw(tiles: Sequence[Share], box: Box, unit: str, label: str) -> Html:
    whole = sum(share.value for share in tiles)
    ranked = sorted(_blocks(tiles).items(), key=lambda item: -sum(share.value for share in item[1]))
    parts: list[Html] = []
    for (_, inside), outer in zip(ranked, squarify([sum(s.value for s in found) for _, found in ranked], box), strict=True):
        inner = Box(outer.x + 1.5, outer.y + 1.5, max(0.0, outer.width - 3), max(0.0, outer.height - 3))
        for share, place in zip(inside, squarify([share.value for share in inside], inner), strict=True):
            parts += _tile(share, place, whole, unit)
    return tag("svg", *parts, viewBox=f"0 0 {box.width:.0f} {box.height:.0f}", class_="treemap", role="img", aria_label=label)


def _tile(share: Share, place: Box, whole: float, unit: str) -> Iterable[Html]:
    name = share.module or "(the model itself)"
    left = min(1.0, share.left / share.value)
    title = f"{name}: {magnitude(share.value)} {unit}, {percent(share.value / whole)} of all"
    title += f"; {magnitude(share.left)} left ({percent(share.left / share.value)})" if share.left != share.value else ""
    width, height = max(0.0, place.width - 1), max(0.0, place.height - 1)
    yield tag("rect", tag("title", title), x=place.x, y=place.y, width=width, height=height, class_="tile")
    yield tag("rect", x=place.x, y=place.y + height * (1 - left), width=width, height=height * left, class_="left")
    text = _fitted(name, width - 8)
    if text and height >= 17:
        yield tag("text", text, x=place.x + 4, y=place.y + 13, class_="name")
        if height >= 32:
            yield tag("text", percent(share.value / whole), x=place.x + 4, y=place.y + 27, class_="tick")


def _fitted(name: str, room: float) -> str:
    """As much of the end of a path as fits, from a dot on where that leaves something to read; "" where too little fits."""
    most = int(room / _LETTER)
    if len(name) <= most:
        return name
    if most < 5:
        return ""
    end = name[len(name) - most + 1 :]
    return f"\u2026{end.partition('.')[2] if len(end.partition('.')[2]) >= 3 else end}"
