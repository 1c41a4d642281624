"""Show a dependency graph to people: a plain-text table and a Graphviz description."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geta.graph.families import Family
from geta.graph.names import find_tensor

if TYPE_CHECKING:
    from geta.graph.dependency import DependencyGraph


def covered_fraction(graph: DependencyGraph) -> float:
    """Share of the model's parameter elements that lie in a row or column of some prunable family."""
    hit: dict[str, set[int]] = {}
    for family in graph.prunable_families:
        for member in family.members:
            if member.role != "buffer":
                hit.setdefault(member.param, set()).add(member.dim)
    parameters = {id(p): p.numel() for p in graph.model.parameters()}
    covered = {id(find_tensor(graph.model, name)) for name in hit}
    total = sum(parameters.values())
    return sum(size for key, size in parameters.items() if key in covered) / total if total else 0.0


def to_table(graph: DependencyGraph) -> str:
    """Readable by somebody who has never seen the project."""
    rows = [("family", "groups", "each group is", "what shrinks with it", "prunable")]
    for family in graph.families:
        verdict = "yes" if family.prunable else f"no: it {family.reason}"
        if family.prunable and family.inexact:
            verdict = f"yes, inexactly: it {family.inexact}"
        rows.append((family.name, f"{family.size} {family.unit}", _each(family), _shrinks(family), verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in [*widths, 8]))
    share = covered_fraction(graph)
    lines.append("")
    lines.append(
        f"{graph.num_groups} groups in {len(graph.prunable_families)} families can be removed; they touch tensors holding "
        f"{share:.0%} of the parameters."
    )
    lines += [f"note: {note}" for note in graph.notes]
    return "\n".join(lines)


def _each(family: Family) -> str:
    """e.g. "1 row of conv1.weight": what one group means in its first producer."""
    main = next((member for member in family.members if member.role == "producer"), family.members[0])
    count = int(main.index.shape[1])
    word = ("row" if main.dim == 0 else "column" if main.dim == 1 else f"index of dim {main.dim}") + ("s" if count > 1 else "")
    return f"{count} {word} of {_tail(main.param)}"


def _shrinks(family: Family) -> str:
    """The modules that lose something, shortened."""
    modules = list(dict.fromkeys(member.param.rpartition(".")[0] or member.param for member in family.members))
    shown = ", ".join(_tail(module) for module in modules[:3])
    return shown if len(modules) <= 3 else f"{shown} and {len(modules) - 3} more"


def _tail(name: str) -> str:
    """The last two parts of a dotted name; the first column has the whole path."""
    return ".".join(name.split(".")[-2:])


def to_dot(graph: DependencyGraph) -> str:
    """Families (boxes) and the modules they touch (ellipses)."""
    lines = ["graph geta {", "  rankdir=LR;"]
    for number, family in enumerate(graph.families):
        colour = "palegreen" if family.prunable else "lightgrey"
        label = _escape(f"{family.name}\\n{family.size} {family.unit}")
        lines.append(f'  f{number} [shape=box, style=filled, fillcolor={colour}, label="{label}"];')
        for module in dict.fromkeys(member.param.rpartition(".")[0] or member.param for member in family.members):
            lines.append(f'  f{number} -- "{_escape(module)}";')
    return "\n".join([*lines, "}"])


def _escape(text: str) -> str:
    return text.replace('"', '\\"')
