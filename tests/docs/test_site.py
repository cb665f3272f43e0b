"""The documentation site: built from this tree, without the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
    "image": "href",
    "use": "href",
}
"""Elements that make a browser fetch something, and the attribute that says what."""

pytest.importorskip("mkdocs", reason="needs the extra `docs`")
pytest.importorskip("material", reason="needs the extra `docs`")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it: strict, so that a dead link or anchor fails here."""
    directory = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(directory)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": _with_site(), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


def _with_site() -> str:
    return os.pathsep.join(filter(None, [str(ROOT / "docs" / "site"), os.environ.get("PYTHONPATH")]))


class Fetched(HTMLParser):
    """Collects what a browser would fetch for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        """Note the attribute of a loading element, and every class."""
        values = dict(attrs)
        self.classes.update((values.get("class") or "").split())
        if tag in LOADED and values.get(LOADED[tag]) and values.get("rel") not in {"canonical", "next", "prev"}:
            self.urls.append(values[LOADED[tag]])


def test_no_page_fetches_anything_from_elsewhere(site):
    """Scripts, styles and images are files of the site; no page makes the theme load Mermaid."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        found = Fetched()
        found.feed(page.read_text())
        assert len(found.urls) > 3, page
        assert [url for url in found.urls if re.match(r"(\w+:)?//", url)] == [], page
        assert "mermaid" not in found.classes, page


def test_no_style_fetches_anything_from_elsewhere(site):
    for style in site.rglob("*.css"):
        text = style.read_text()
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", text) == [], style


def test_pages_from_the_code_are_in_the_site(site):
    """A command, a metric, an error and a message that exist are on their pages."""
    for page, name in [
        ("commands", "wooly serve"),
        ("metrics", "wooly_resident_bytes"),
        ("errors", "out_of_memory"),
        ("messages", "RememberFiles"),
    ]:
        assert name in (site / "reference" / f"{page}.html").read_text()


def test_diagrams_are_drawn(site):
    """Every fence of the architecture page became an SVG, and the text of none is left over as code."""
    text = (site / "architecture.html").read_text()
    fences = re.findall(r"^```(sequence|states|stack)$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    assert text.count('<div class="diagram"><svg') == len(fences) > 5
    assert "<code>absent -&gt; publishing" not in text


def test_plots_are_in_the_site_without_their_white_paper(site):
    plots = list((site / "assets" / "plots").glob("*.svg"))
    assert {plot.name for plot in plots} == {
        plot.name for plot in (ROOT / "benchmarks" / "results" / "plots").glob("*.svg")
    }
    assert [plot.name for plot in plots if "#ffffff" in plot.read_text()] == []
