"""Gathers the site's pages into one folder, for mkdocs: `python docs/assemble.py FOLDER`, as `make docs` does.

Pages keep their places relative to each other, so a link that works in the repository works on the site. Beside them come
the API's pages, one for each room of the library and each package beside it; mkdocs.yml names them in its navigation.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
SHOWN = {".md", ".svg", ".png", ".csv"}
SOURCES = {"notes.md"}  # of a page of results, which has their text


def api_page(package: str) -> str:
    """Returns the Markdown of a package's page; mkdocstrings fills it from the docstrings."""
    return f"# {package}\n\n::: {package}\n    options:\n      show_submodules: true\n"


def assemble(folder: Path) -> None:
    """Writes all pages to `folder`, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    written = [path for path in (ROOT / "docs").rglob("*") if path.suffix in SHOWN and path.name not in SOURCES]
    for page in [*(ROOT / page for page in PAGES), *written]:
        target = folder / page.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, target)
    rooms = [f"fuxi_torchrec.{init.parent.name}" for init in (ROOT / "fuxi_torchrec").glob("*/__init__.py")]
    (folder / "api").mkdir()
    for package in (*rooms, "data_pipelines", "launch"):
        (folder / "api" / f"{package}.md").write_text(api_page(package))


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))
