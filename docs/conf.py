"""The site: Sphinx makes it of these documents, the docstrings and the records (`make docs`).

The sources are the repository's own files: no document is copied, and all navigation stands here.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from sphinx.application import Sphinx

import subspan
from subspan import report

ROOT = Path(__file__).resolve().parents[1]

NAVIGATION = {
    "Learn": (
        "docs/guide",
        "docs/variants",
        "docs/tutorials/intrinsic-dimension",
        "docs/tutorials/fine-tuning",
        "docs/fine-tuning",
        "docs/tutorials/slow-network",
        "docs/tutorials/low-rank",
        "docs/tutorials/your-projection",
        "docs/lora",
        "docs/hub",
        "examples/README",
    ),
    "Measure": ("docs/laboratory", "docs/bound", "docs/commands"),
    "Findings": (
        "docs/results",
        "docs/gallery",
        "docs/cost",
        "results/README",
        "results/pareto/pareto",
        "benchmarks/results/README",
        "benchmarks/gpu-instructions",
    ),
    "Reference": (
        "docs/api/subspan",
        "docs/api/optim",
        "docs/api/layers",
        "docs/api/projections",
        "docs/api/laboratory",
        "docs/format",
    ),
    "Extend": (
        "docs/add-a-projection",
        "docs/add-a-layer",
        "docs/add-an-optimizer",
        "docs/add-a-method",
        "docs/add-an-experiment",
        "docs/design",
        "CONTRIBUTING",
    ),
    "Project": ("CHANGELOG", "SECURITY"),
}

project = "subspan"
author = copyright = "the subspan developers"  # noqa: A001 (Sphinx's name)
release = subspan.__version__
root_doc = "README"
exclude_patterns = [".*", "build", "src", "tests"]  # which are not even looked through
include_patterns = [
    f"{root_doc}.md",
    *(f"{page}.md" for pages in NAVIGATION.values() for page in pages),
]

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_merge_streams = True
nb_output_stderr = "remove-warn"  # which stops the build
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
suppress_warnings = ["myst.header"]  # of a generated document, which goes from # to ###
copybutton_prompt_text = ">>> "
pygments_style = "default"

html_theme = "furo"
html_title = "subspan"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)\)")


def complete(app: Sphinx, page: str, source: list[str]) -> None:
    """Give a document what it needs as a page: navigation, families, links to what there is."""
    if page == root_doc:
        for caption, pages in NAVIGATION.items():
            entries = "\n".join(f"/{name}" for name in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"
    source[0] = source[0].replace("{{ families }}", families())
    folder = (ROOT / page).parent
    source[0] = LINK.sub(lambda link: linked(link, folder), source[0])


def families() -> str:
    """One directive for each family of projections."""
    classes = subspan.projections().values()
    return "\n".join(f".. autoclass:: {each.__module__}.{each.__qualname__}\n" for each in classes)


def linked(link: re.Match[str], folder: Path) -> str:
    """A link to a folder: to its reports, to its README, or else its path in the repository."""
    text, target = link.groups()
    path = (folder / target).resolve()
    if not path.is_dir():
        return link[0]
    if (path / "README.md").is_file():
        return f"[{text}]({target.rstrip('/')}/README.md)"
    where = path.relative_to(ROOT)
    records = sorted(path.rglob("sweep.json"))
    if where.parts[0] != "results" or not records:
        return f"{text} (`{where}`)" if str(where) not in text else text
    pages = {
        record.parent.relative_to(path).as_posix(): os.path.relpath(
            ROOT / "reports" / record.parent.relative_to(ROOT / "results") / "report.html", folder
        )
        for record in records
    }
    return " · ".join(
        f'<a href="{page}">report{"" if part == "." else f" of {part}"}</a>'
        for part, page in pages.items()
    )


def write_reports(app: Sphinx, failure: Exception | None) -> None:
    """Make the page of every committed sweep anew, and the front page's second name."""
    if failure is not None or app.builder.format != "html":
        return
    shutil.copy(app.outdir / f"{root_doc}.html", app.outdir / "index.html")
    for record in sorted((ROOT / "results").rglob("sweep.json")):
        folder = app.outdir / "reports" / record.parent.relative_to(ROOT / "results")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(record, folder)
        report.write(folder)


def setup(app: Sphinx) -> None:
    """Register the hooks above."""
    app.connect("source-read", complete)
    app.connect("build-finished", write_reports)
