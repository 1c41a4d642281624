"""HTML and SVG built so that nothing can be forgotten: every text and every attribute is escaped, only finished markup is not."""

from __future__ import annotations

import html

_VOID = frozenset(("br", "input", "wbr", "hr"))


class Html(str):
    """Finished markup, which may stand in a page as it is."""

    __slots__ = ()


def tag(name: str, *children: str | None, **attributes: str | float | bool | None) -> Html:
    """One element: `tag("td", text, class_="number")`.

    children: `Html` is put in as it is, other text is escaped, None is left out.
    attributes: a trailing `_` is dropped and other `_` become `-` (`class_`, `aria_label`, `stroke_width`); numbers are written with up to
        two decimals, True as an attribute without a value, None and False not at all.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items() if value is not None and value is not False)
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """Children one after the other, each escaped unless it is markup."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children if child is not None))


def breakable(path: str) -> Html:
    """A module path that may be broken after its dots."""
    return Html("<wbr>".join(html.escape(part) for part in _pieces(path)))


def _pieces(path: str) -> list[str]:
    parts = path.split(".")
    return [f"{part}." for part in parts[:-1]] + parts[-1:]


def _attribute(key: str, value: str | float | bool) -> str:
    name = key.rstrip("_").replace("_", "-") if key not in ("viewBox",) else key
    if value is True:
        return f" {name}"
    text = value if isinstance(value, str) else short(value)
    return f' {name}="{html.escape(text)}"'


def short(value: float) -> str:
    """A coordinate: at most two decimals and no useless zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
