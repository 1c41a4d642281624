"""What changes in each example: `python examples/diffs.py` writes it into docs/frameworks.md."""

import difflib
import re
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
PAGE = EXAMPLES.parent / "docs" / "frameworks.md"
BLOCK = re.compile(r"(<!-- examples/(\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def lines(name: str, script: str) -> list[str]:
    return (EXAMPLES / name / f"{script}.py").read_text().splitlines()


def difference(name: str) -> str:
    """The changed lines of an example, each with one line around it."""
    found = difflib.unified_diff(lines(name, "plain"), lines(name, "compressed"), n=1, lineterm="")
    return "\n".join("@@" if line.startswith("@@") else line for line in list(found)[2:])


def filled(page: str) -> str:
    """The page with every block between `<!-- examples/NAME -->` and `<!-- end -->` made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}\n```diff\n{difference(block[2])}\n```\n\n", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
