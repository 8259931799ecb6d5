"""The documentation as a site: complete, without warnings, and without asking another host for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from documentation.pages import ROOT

FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
"""Attributes that a browser fetches by itself; of `<link>` it is `href`, but for the page's own canonical address."""


class Fetches(HTMLParser):
    """Collects what a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") != "canonical":
            self.addresses.append(given.get("href") or "")
        elif tag in FETCHED and given.get(FETCHED[tag]):
            self.addresses.append(given[FETCHED[tag]] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr, built.stderr
    return folder


def test_pages_fetch_from_nowhere_else(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        fetches = Fetches()
        fetches.feed(page.read_text())
        assert fetches.addresses
        assert not [address for address in fetches.addresses if re.match(r"(https?:)?//", address)], page


def test_styles_fetch_from_nowhere_else(site: Path) -> None:
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", style.read_text()), style


def test_notebooks_are_pages_with_what_they_printed_and_drew(site: Path) -> None:
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        page = (site / "notebooks" / f"{notebook.stem}.html").read_text()
        assert 'class="printed"' in page
    assert (site / "notebooks/quickstart-0.png").read_bytes().startswith(b"\x89PNG")


def test_reference_has_the_public_names(site: Path) -> None:
    import pdprune

    text = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    missing = [name for name in pdprune.__all__ if not re.search(rf'id="pdprune\.{name}"', text)]
    assert not missing


def test_links_that_leave_the_documentation_are_text(site: Path) -> None:
    assert not [page for page in site.rglob("*.html") if 'href="../configs/' in page.read_text()]
