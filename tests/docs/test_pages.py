"""The pages for people name what is there: files, modules, links, and messages that the code prints."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("fuxi_torchrec", "data_pipelines", "launch")
PAGES = sorted(path for folder in (".", "docs", "benchmarks") for path in (ROOT / folder).glob("*.md"))
FILE = r"(?:fuxi_torchrec|data_pipelines|launch|benchmarks|tests|configs|docs|requirements)/[\w./-]*\w/?"


def texts(path):
    """The literal pieces of every string of a Python file, those of a formatted one joined by "…"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_message_of_the_troubleshooting_page_is_one_that_the_code_prints():
    said = "\n".join(text for folder in CODE for path in (ROOT / folder).rglob("*.py") for text in texts(path))
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(rows) > 40
    unknown = [row for row in rows for piece in row.split("…") if piece.strip() not in said]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_module_and_link_of_a_page_exists(page):
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text)]
    files = [ROOT / name for name in re.findall(rf"(?<![\w/.-])({FILE})(?=[`:),\s])", text)]
    modules = [ROOT / name.replace(".", "/") for name in re.findall(r"python -m ((?:benchmarks|launch)[\w.]*)", text)]
    missing = [str(path) for path in links + files if not path.exists() and "NAME" not in path.name]
    missing += [str(path) for path in modules if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists()]
    assert not missing


def test_every_benchmark_has_a_row_that_says_what_it_asks():
    rows = (ROOT / "benchmarks" / "README.md").read_text()
    files = {path.name for path in (ROOT / "benchmarks").iterdir()} - {"README.md", "__init__.py", "__pycache__"}
    assert not [name for name in files if f"| `{name}" not in rows]


def test_every_room_of_the_library_is_on_the_architecture_page():
    rooms = [path.parent.name for path in (ROOT / "fuxi_torchrec").glob("*/__init__.py")]
    assert not [room for room in rooms if f"`{room}/`" not in (ROOT / "docs" / "architecture.md").read_text()]
