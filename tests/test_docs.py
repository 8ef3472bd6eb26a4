"""The site: every document has a place in it, every page loads, every link leads somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [*sorted((ROOT / "docs/tutorials").glob("*.md")), ROOT / "docs/commands.md"]
CELL = re.compile(r"```\{code-cell\} python\n(?::tags:[^\n]*\n)?(.*?)```", re.DOTALL)
BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


def test_every_document_has_a_place_on_the_site():
    conf = ast.parse((ROOT / "docs/conf.py").read_text("utf-8"))
    [navigation] = [
        ast.literal_eval(node.value)
        for node in conf.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAVIGATION"
    ]
    listed = [page for pages in navigation.values() for page in pages]
    documents = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("*.md")]
    there = {path.relative_to(ROOT).with_suffix("").as_posix() for path in documents}
    assert there - {*listed, "README"} == set()
    assert [page for page in listed if not (ROOT / f"{page}.md").is_file()] == []
    assert len(set(listed)) == len(listed)


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.stem)
def test_what_tutorials_import_is_there(page):
    """Building the site executes them; this finds a renamed module at once."""
    cells = CELL.findall(page.read_text("utf-8"))
    assert cells
    for node in ast.walk(ast.parse("\n".join(cells))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("subspan"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


class Page(HTMLParser):
    """The references of a page, and the places in it that others can refer to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name == "id" and value:
                self.ids.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("sphinx", "furo", "myst_nb", "sphinx_copybutton"):
        pytest.importorskip(module, reason="needs what makes the site: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-c", "docs", "-d", str(out / "doctrees")]
    options = ["--fail-on-warning", "--keep-going", "--quiet"]
    done = subprocess.run(
        [*command, *options, ".", str(out / "html")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text("utf-8")) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_the_site_has_what_it_should(site, pages):
    assert (site / "index.html").read_bytes() == (site / "README.html").read_bytes()
    records = [path.parent for path in (ROOT / "results").rglob("sweep.json")]
    for folder in records:
        assert site / "reports" / folder.relative_to(ROOT / "results") / "report.html" in pages
    reference = pages[site / "docs/api/subspan.html"].ids
    assert {"subspan.SubspaceModel", "subspan.SubspaceModel.merge", "subspan.load"} <= reference
    assert "subspan.optim.RandomBases.alignment" in pages[site / "docs/api/optim.html"].ids
    assert list((site / "_images").glob("*.png"))  # pictures of the executed tutorials


@pytest.mark.slow
def test_no_link_inside_the_site_is_broken(pages):
    assert sorted(broken(pages)) == []


def broken(pages: dict[Path, Page]) -> Iterator[str]:
    """Links and parts of pages that are not there, or that are loaded from elsewhere."""
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "data", "mailto"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{path.name}: {link} is not there"
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].ids
            ):
                yield f"{path.name}: {link} has no such place"


@pytest.mark.slow
def test_every_page_loads_without_an_error(pages, site):
    """In a browser without a network: nothing on the console, and a heading on the page."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    options += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"]
    for path in sorted(pages):
        shown = subprocess.run(
            [browser, *options, path.as_uri()], capture_output=True, text=True, timeout=120
        )
        said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
        assert said == [], f"{path.relative_to(site)}: {said}"
        assert "<h1" in shown.stdout or path.name in ("search.html", "genindex.html"), path
        loaded = re.findall(
            r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]*)"', shown.stdout
        )
        assert loaded == [], f"{path.relative_to(site)} loads from elsewhere: {loaded}"
