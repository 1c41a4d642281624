"""Show a dependency graph to people: a plain-text table and a Graphviz description."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geta.graph.branches import QuantizerBranch, summary
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
        hit.update({name: hit.get(name, set()) for name in family.removes})
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
    lines += [line for line in [summary(graph.quantizers)] if line]
    lines += _suggestions(graph.families)
    lines += [f"note: {note}" for note in graph.notes]
    return "\n".join(lines)


def _suggestions(families: list[Family]) -> list[str]:
    """One line for everything that would make more families prunable."""
    by_text: dict[str, list[Family]] = {}
    for family in families:
        if family.suggestion:
            by_text.setdefault(family.suggestion, []).append(family)
    lines = []
    for text, found in by_text.items():
        named = ", ".join(family.name for family in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        lines.append(f"suggestion for {named} ({sum(family.size for family in found)} groups): {text}")
    return lines


def _each(family: Family) -> str:
    """e.g. "1 row of conv1.weight": what one group means in its first producer."""
    if family.is_layer:
        return "the whole branch"
    main = next((member for member in family.members if member.role == "producer"), family.members[0])
    count = int(main.index.shape[1])
    word = ("row" if main.dim == 0 else "column" if main.dim == 1 else f"index of dim {main.dim}") + ("s" if count > 1 else "")
    return f"{count} {word} of {_tail(main.param)}"


def _shrinks(family: Family) -> str:
    """The modules that lose something, shortened."""
    names = [member.param for member in family.members] if not family.is_layer else family.removes
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    shown = ", ".join(_tail(module) for module in modules[:3])
    return shown if len(modules) <= 3 else f"{shown} and {len(modules) - 3} more"


def _tail(name: str) -> str:
    """The last two parts of a dotted name; the first column has the whole path."""
    return ".".join(name.split(".")[-2:])


def to_dot(graph: DependencyGraph) -> str:
    """Families (boxes) and the modules they touch (ellipses); quantizers attached to parameters (notes) or inserted (diamonds)."""
    lines = ["graph geta {", "  rankdir=LR;"]
    for number, family in enumerate(graph.families):
        colour = "palegreen" if family.prunable else "lightgrey"
        label = _escape(f"{family.name}\\n{family.size} {family.unit}")
        lines.append(f'  f{number} [shape=box, style=filled, fillcolor={colour}, label="{label}"];')
        for module in dict.fromkeys(member.param.rpartition(".")[0] or member.param for member in family.members):
            lines.append(f'  f{number} -- "{_escape(module)}";')
    lines += [line for number, branch in enumerate(graph.quantizers) for line in _branch_lines(number, branch)]
    return "\n".join([*lines, "}"])


def _branch_lines(number: int, branch: QuantizerBranch) -> list[str]:
    """A quantizer and a dashed line to the module that it belongs to."""
    shape = "note" if branch.kind == "attached" else "diamond"
    bits = f"{branch.bits} bits" if branch.bits is not None else "learned bits"
    module = branch.tensor.rpartition(".")[0] or branch.tensor if branch.tensor else branch.module or "the model itself"
    label = _escape(f"{branch.tensor or branch.module or 'activation'}\\n{bits} per {branch.granularity}")
    return [f'  q{number} [shape={shape}, label="{label}"];', f'  q{number} -- "{_escape(module)}" [style=dashed];']


def _escape(text: str) -> str:
    return text.replace('"', '\\"')
