"""What a page is made of."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from pdprune.report import page
from pdprune.report.figures import as_json

ASSETS = Path(page.__file__).parent / "assets"


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "&lt;", "\u2028", "\ud800", "{{style}}"])
def test_json_cannot_leave_its_element(text: str) -> None:
    inert = page.inert_json({"text": text})
    assert not set("<>&") & set(inert)
    assert inert.isascii()
    assert json.loads(inert) == {"text": text}


def test_numbers_are_short_and_finite() -> None:
    assert as_json([1.23456789, float("nan"), float("inf"), 0.0, 3, True, None]) == [
        1.235,
        None,
        None,
        0.0,
        3,
        True,
        None,
    ]


def test_what_is_embedded_is_what_was_published() -> None:
    listed = re.findall(
        r"^\| `([\w.]+)` .* `([0-9a-f]{64})` \|$", (ASSETS / "vendor/README.md").read_text(), re.MULTILINE
    )
    files = [path for path in (ASSETS / "vendor").iterdir() if path.suffix in (".js", ".css")]
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == dict(listed)
    assert {path.name for path in (ASSETS / "vendor").glob("*LICENSE*")} == {
        "cytoscape-LICENSE.txt",
        "uPlot-LICENSE.txt",
    }


@pytest.mark.parametrize("path", sorted(ASSETS.rglob("*.js")), ids=lambda path: path.name)
def test_no_script_ends_early_or_writes_markup(path: Path) -> None:
    source = path.read_text()
    assert "</script" not in source.lower()
    if path.parent == ASSETS:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source)
