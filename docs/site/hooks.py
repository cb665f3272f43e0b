"""Add to the site the pages that are written elsewhere: reference from the code, plots, and files of the top level.

MkDocs calls the functions by name. Relies on the packages being importable (``PYTHONPATH=.``), without an engine.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.wooly")

ROOT = Path(__file__).resolve().parents[2]
PLOTS = ROOT / "benchmarks" / "results" / "plots"
TOP_LEVEL = {"contributing.md": ROOT / "CONTRIBUTING.md", "changelog.md": ROOT / "CHANGELOG.md"}
_ELSEWHERE = re.compile(r"\]\((?:\.\./)+benchmarks/results/plots/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add generated pages, the plots, and the top level's documents."""
    for uri, write in reference.PAGES.items():
        files.append(File.generated(config, uri, content=write()))
    for plot in sorted(PLOTS.glob("*.svg")):
        files.append(File.generated(config, f"assets/plots/{plot.name}", content=_transparent(plot)))
    for uri, path in TOP_LEVEL.items():
        files.append(File.generated(config, uri, content=path.read_text().replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Page, **_others: Any) -> str:
    """Point links to plots, which in the repository lie beside the results, to their copies in the site."""
    up = "../" * page.file.src_uri.count("/")
    return _ELSEWHERE.sub(f"]({up}assets/plots/", markdown)


def _transparent(plot: Path) -> str:
    """Return a plot without its white background: the page gives it one that goes with either colour scheme."""
    text = plot.read_text()
    if "fill: #ffffff" not in text:
        raise PluginError(f"{plot.name} has no white background to remove; see docs/site/hooks.py")
    return text.replace("fill: #ffffff", "fill: none")
