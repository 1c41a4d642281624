"""The documentation site: it builds without a warning and without a network, asks nobody for anything, and has every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import geta

ROOT = Path(__file__).resolve().parent.parent
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}
"""Attributes whose addresses a browser fetches by itself."""


class Fetched(HTMLParser):
    """Collects what a page makes a browser fetch, and the names that can be linked to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.names: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if LOADS.get(tag) in found:
            self.addresses.append(found[LOADS[tag]] or "")
        if found.get("id"):
            self.names.add(str(found["id"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(ROOT / "mkdocs.yml"), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


def test_every_page_is_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    assert len(pages) > 25
    assert [page for page in pages if not re.search(rf"(?:- |: ){re.escape(page)}$", listed, flags=re.MULTILINE)] == []


def test_pages_fetch_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    fetched = {(str(page.relative_to(site)), one) for page in pages for one in Fetched(page.read_text()).addresses}
    assert len(fetched) > len(pages)
    assert sorted(pair for pair in fetched if re.match(r"(?:\w+:)?//", pair[1])) == []
    assert [page.name for page in pages if 'class="mermaid"' in page.read_text()] == []  # drawn by a script from elsewhere
    for sheet in sorted(site.rglob("*.css")):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:\w+:)?//[^)\"']*", sheet.read_text()) == [], sheet


def test_what_pages_fetch_is_there(site):
    for page in sorted(site.rglob("*.html")):
        for address in Fetched(page.read_text()).addresses:
            target = address.partition("?")[0].partition("#")[0]
            where = site / target.lstrip("/") if target.startswith("/") else page.parent / target  # the 404 page has absolute ones
            assert where.exists(), (page.name, address)


def test_every_public_name_has_an_entry(site):
    names = set().union(*(Fetched(page.read_text()).names for page in (site / "api").glob("*.html")))
    entries = {name: f"geta.{name}" for name in geta.__all__ if name != "__version__"}
    entries["cost"] = "geta.cost.cost"  # the function hides the package of the same name
    assert [name for name, entry in entries.items() if entry not in names] == []
