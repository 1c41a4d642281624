"""The rules of the repository itself: one direction of imports, short files, a light package, documentation that runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import geta

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "geta"
ORDER = (
    "errors",
    "hints",
    "seeding",
    "ranks",
    "devices",
    "graph",
    "quant",
    "cost",
    "optim",
    "subnet",
    "export",
    "report",
    "integrations",
    "recipes",
    "cli",
)
LONGEST_FILE = 500

# A method of a lower part may reach up inside its body, so that `small.save(...)` reads well; each one is named here.
ALLOWED_UPWARD = {("subnet/model.py", "export"), ("graph/dependency.py", "report"), ("cost/latency.py", "report")}


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_parts(tree: ast.AST) -> list[tuple[str, int]]:
    """Parts of geta that a module imports anywhere, with line numbers; a name of the package itself counts as the part "geta"."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names = [f"geta.{alias.name}" for alias in node.names] if node.module == "geta" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name != "geta"]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"geta.{node.attr}"] if node.value.id == "geta" else []
        else:
            continue
        pieces = [name.split(".") for name in names]
        found += [(piece[1], node.lineno) for piece in pieces if piece[0] == "geta" and piece[1] != "__version__"]
    return found


def upward_imports(path: Path) -> list[str]:
    relative = path.relative_to(SOURCE)
    own = ORDER.index(relative.parts[0].removesuffix(".py"))
    wrong = []
    for part, line in imported_parts(ast.parse(path.read_text())):
        # public names come from parts up to the compressor's: only what stands above may take them from the package
        rank = ORDER.index(part) if part in ORDER else ORDER.index("export") + 1
        if rank > own and (relative.as_posix(), part) not in ALLOWED_UPWARD:
            wrong.append(f"{relative}:{line} imports geta.{part}")
    return sorted(wrong)


def test_imports_point_one_way():
    files = [path for path in python_files("src/geta") if path != SOURCE / "__init__.py"]
    assert len(files) > 20
    assert [line for path in files for line in upward_imports(path)] == []


def test_the_import_check_sees_an_upward_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "graph").mkdir()
    bad = tmp_path / "graph" / "bad.py"
    bad.write_text(
        "import geta\nfrom geta import compact\ndef f():\n    from geta.optim.schedule import Schedule\n"
        "    return geta.Bits, geta.__version__\n"
    )
    assert upward_imports(bad) == [
        f"graph/bad.py:{line}" for line in ("2 imports geta.compact", "4 imports geta.optim", "5 imports geta.Bits")
    ]


def test_every_part_has_a_place_in_the_order():
    parts = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in python_files("src/geta")} - {"__init__"}
    assert sorted(parts - set(ORDER)) == []


def test_no_file_is_longer_than_the_cap():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files("src", "tests", "bench", "examples")
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_import_geta_loads_no_dependency():
    code = "import sys, geta; print([name for name in ('torch', 'numpy', 'scipy', 'rich', 'typer') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [name for name in geta.__all__ if name != "__version__"])
def test_every_public_name_exists(name):
    assert getattr(geta, name).__module__.startswith("geta.")


def test_geta_cost_is_the_function_in_whatever_order_things_are_imported():
    code = "import geta.subnet; from geta.cost import cost; import geta.cost; print(geta.cost is cost)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        geta.prune  # noqa: B018


def code_blocks(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)


PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


@pytest.mark.parametrize("document", [page for page in PAGES if code_blocks(page)])
def test_code_in_the_documentation_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in code_blocks(document):
        exec(compile(block, document, "exec"), names)  # noqa: S102


def test_documented_files_exist():
    for document in (*PAGES, "CONTRIBUTING.md"):
        folder = (ROOT / document).parent
        links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / document).read_text())
        assert [link for link in links if not (folder / link).exists()] == [], document


def test_numerics_names_functions_and_tests_that_exist():
    text = (ROOT / "docs" / "numerics.md").read_text()
    places = re.findall(r"`((?:src/geta|tests|bench)/[\w/]+\.py)(?:::(\w+(?:\.\w+)?))?`", text)
    assert len(places) > 15
    for path, name in places:
        source = (ROOT / path).read_text()
        assert name == "" or re.search(rf"\b(?:def|class) {name.split('.')[-1]}\b", source), f"{path} has no {name}"
