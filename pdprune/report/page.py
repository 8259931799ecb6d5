"""Figures as one HTML file that needs nothing else: styles, scripts and data are inside it.

Data go into the page as JSON that no HTML parser can read as markup, and the scripts put every string of it into the
document as text. The page's own policy allows the scripts in it, by their hashes, and nothing besides: no other script,
whoever wrote the prompts, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from importlib.resources import files

from pdprune.report.figures import Comparison, Figures, FrontierFigures, as_json

STYLES = ("vendor/uPlot.min.css", "report.css")
PLOTTING = ("vendor/uPlot-LICENSE.txt", "vendor/uPlot.iife.min.js")
CIRCUIT_SCRIPTS = ("layout.js", "details.js", "graph.js", "node_table.js")
RUN_SCRIPTS = (*PLOTTING, "vendor/cytoscape.min.js", "dom.js", "charts.js", *CIRCUIT_SCRIPTS, "report.js")
COMPARISON_SCRIPTS = (*PLOTTING, "dom.js", "charts.js", "comparison.js")
FRONTIER_SCRIPTS = (*PLOTTING, "dom.js", "charts.js", "frontier.js")


def report_page(figures: Figures) -> str:
    """The page of one run."""
    return _page("report.html", f"{figures.name}: circuit report", figures, RUN_SCRIPTS)


def comparison_page(comparison: Comparison) -> str:
    """The page of several runs side by side."""
    names = ", ".join(run.name for run in comparison.runs)
    return _page("comparison.html", f"{names}: circuits compared", comparison, COMPARISON_SCRIPTS)


def frontier_page(figures: FrontierFigures) -> str:
    """The page of a frontier."""
    return _page("frontier.html", f"{figures.name}: frontier", figures, FRONTIER_SCRIPTS)


def _page(content: str, title: str, figures: Figures | Comparison | FrontierFigures, scripts: tuple[str, ...]) -> str:
    sources = [_script(name) for name in scripts]
    parts = {
        "title": html.escape(title),
        "content": _asset(content),
        "style": "\n".join(_asset(name) for name in STYLES),
        "figures": inert_json(as_json(figures)),
        "scripts": "\n".join(f"<script>{source}</script>" for source in sources),
        "script_hashes": " ".join(_hash(source) for source in sources),
    }
    # All at once, so that nothing that is filled in is taken for a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _asset("page.html"))


def inert_json(value: object) -> str:
    """JSON that cannot end the element that it stands in, nor be read as markup."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _script(name: str) -> str:
    source = _asset(name)
    return f"/*\n{source}*/" if name.endswith(".txt") else source


def _hash(source: str) -> str:
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _asset(name: str) -> str:
    return files("pdprune.report").joinpath("assets", *name.split("/")).read_text(encoding="utf-8")
