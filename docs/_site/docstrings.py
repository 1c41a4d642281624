"""Makes Markdown of this project's docstrings: lines such as `name: meaning`, which may go on below, become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*):\s+(\S.*)$")


class Fields(griffe.Extension):
    """Rewrites every docstring before it is rendered."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """One item per field; a line that follows one, indented or not, belongs to it until an empty line or a `Raises`."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        field = _FIELD.match(line)
        if field and field[1] not in ("Source", "Deviation", "Example"):
            lines += ([] if inside else [""]) + [f"- `{field[1]}`: {field[2]}"]
            inside = True
        elif inside and line.startswith(" ") and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            lines += ([""] if inside else []) + [line]
            inside = False
    return "\n".join(lines)
