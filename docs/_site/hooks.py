"""Brings into the site what lies beside docs/: the changelog, how to contribute, and the measurements that pages refer to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.md"))
BESIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    **{f"bench/results/{path.name}": f"results/{path.name}" for path in RESULTS},
}
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)([^)#\s]+)(#[^)]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the list of measurements: they are dated, so that their names change."""
    for section in config.nav:
        for entry in section.get("Project", []):
            if isinstance(entry, dict):
                entry["Measurements"] = [f"results/{path.name}" for path in RESULTS]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from beside docs/, with their pictures."""
    for source, target in BESIDE.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text()))
    for picture in sorted((ROOT / "bench" / "results").glob("*.svg")):
        files.append(File.generated(config, f"results/{picture.name}", content=picture.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at where the files are in the site; what isn't in it (sources, examples) becomes the name of the file."""
    source = next((old for old, new in BESIDE.items() if new == page.file.src_uri), f"docs/{page.file.src_uri}")
    folder = (ROOT / source).parent

    def moved(link: re.Match[str]) -> str:
        text, place, anchor = link[1], link[2], link[3] or ""
        wanted = (folder / place).resolve()
        if not wanted.exists():
            return link[0]  # mkdocs says so, and --strict makes it an error
        name = wanted.relative_to(ROOT).as_posix()
        inside = BESIDE.get(name, name.removeprefix("docs/") if name.startswith("docs/") else None)
        if inside is None:
            return f"{text} (`{name}`)" if name not in text else text
        depth = page.file.src_uri.count("/")
        return f"[{text}]({'../' * depth}{inside}{anchor})"

    return _LINK.sub(moved, markdown)
