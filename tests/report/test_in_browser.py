"""The pages in a real browser: what a person sees there, and what hostile prompts do not do. Skipped without Chromium.

python -m pytest tests/report/test_in_browser.py --screenshots FOLDER      # and look at them
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report.browser import Browser, Page, installed

from pdprune.circuits.frontier_curve import FrontierPoint
from pdprune.report.figures import (
    Adversary,
    Check,
    ComparedRun,
    Comparison,
    Context,
    Curve,
    CurvePoint,
    Figures,
    FrontierFigures,
    Graph,
    NodeFigures,
    Opposed,
    Origin,
    OverlapFigures,
    Said,
    Series,
    Site,
    SiteRow,
    Sufferer,
    Text,
    Verdict,
)
from pdprune.report.page import comparison_page, frontier_page, report_page

EXECUTABLE = installed()
pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium is installed: apt-get install chromium")

HOSTILE = "</script><script>window.ran = 1</script><img src='https://example.com/x' onerror='window.ran = 2'>"
SITES = [f"blocks.{layer}.{site}" for layer in range(2) for site in ("attn.out", "mlp.down")]
SENTENCE = "Faithful under this attack: " + HOSTILE
VERDICT = Verdict("faithful", SENTENCE, HOSTILE, f"It tried `hard`: {HOSTILE}", f"It had `{HOSTILE}` converged.", True)
CHECKS = [Check("the model itself", 0.04, 0.04, 1.0, 0.0), Check("the rest by the adversary", 0.08, 0.08, 0.99, 0.3)]


def curve(chosen: int, worst: float) -> Curve:
    sizes = [chosen // 8, chosen // 2, chosen, 960]
    points = [
        CurvePoint(size, 0.01 * rank, 0.02, worst * (4 - rank), worst * (5 - rank)) for rank, size in enumerate(sizes)
    ]
    return Curve(points, CurvePoint(chosen, 0.006, 0.012, worst), "nodes", 960, 0.04, 0.15, None, HOSTILE)


def figures(n_nodes: int) -> Figures:
    """A run as it might be, of as many nodes as asked for, every string that data decide hostile."""
    vocabulary = [HOSTILE, " the", "\n", "'", "\u202e", "a"]
    nodes = [
        NodeFigures(
            node=number,
            label=f"{SITES[number % 4]}:{number}",
            site=number % 4,
            n_components=1,
            gate=1.0,
            positions=None,
            effect=math.sin(number),
            direct=math.sin(number) / 2,
            removed=0.08 + 0.2 / (1 + number),
            contexts=[Context(number % 3, 0, [0.0, -0.5, 1.0, 0.2, 0.0, 0.1])],
            raised=[(HOSTILE, 1.5), (f"token{number}", 1.0)],
            lowered=[("\n", -0.5)],
            choices=[("'", 0.25), (HOSTILE, -0.25)],
        )
        for number in range(n_nodes)
    ]
    edges = [
        (number, other, math.cos(number + other) / (1 + number))
        for number in range(n_nodes)
        for other in range(n_nodes)
        if number % 4 < other % 4 and (number * 7 + other) % max(1, n_nodes // 8) == 0
    ]
    said = Said(HOSTILE, 0.9)
    return Figures(
        name=HOSTILE,
        task=HOSTILE,
        target="tiny",
        loss="cross-entropy",
        verdict=VERDICT,
        checks=CHECKS,
        checks_note=HOSTILE,
        curve=curve(n_nodes, 0.08),
        sites=[Site(name, 400, n_nodes // 4, 20) for name in SITES],
        graph=Graph(nodes, edges, "the log-odds", 0.08, [HOSTILE]),
        adversary=Adversary(
            [Opposed(HOSTILE, 0, 0.0, 0.1)], [Opposed("b", 1, 1.0, 0.1)],
            [Sufferer(row, 0.1, 0.2, 3.0, said, said, said) for row in range(3)], [HOSTILE],
        ),
        training=[Series(HOSTILE, list(range(50)), [1 / (1 + step) for step in range(50)])],
        origin=Origin(HOSTILE, HOSTILE, [("seed", HOSTILE)]),
        vocabulary=vocabulary,
        texts=[Text([1, 5, 0, 2, 4, 3], "", "'"), Text([5, 0, 5, 1, 1, 2], "", HOSTILE), Text([0] * 6, "", None)],
    )  # fmt: skip


def comparison() -> Comparison:
    runs = [
        ComparedRun(f"{name} {HOSTILE}", "a/report.html", "adversarially", 960, 40, VERDICT, CHECKS, curve(40, worst))
        for name, worst in (("one", 0.1), ("two", 2.5))
    ]
    rows = [SiteRow(name, [1, None]) for name in SITES]
    return Comparison("Two circuits", HOSTILE, "tiny", "KL", runs, [OverlapFigures(0, 1, 0.25, 10)], rows)


def frontier() -> FrontierFigures:
    points = [
        FrontierPoint(HOSTILE, target, None, None, 0, size, True, 0.01, 0.02, 0.9 * target, True)
        for size, target in ((40, 0.6), (500, 0.15))
    ]
    return FrontierFigures(HOSTILE, HOSTILE, HOSTILE, HOSTILE, "cross-entropy", 960, 0.04, points, HOSTILE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert EXECUTABLE is not None
    with Browser(EXECUTABLE) as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "report.html").write_text(report_page(figures(80)))
    (folder / "large.html").write_text(report_page(figures(1000)))
    (folder / "empty.html").write_text(report_page(figures(0)))
    (folder / "comparison.html").write_text(comparison_page(comparison()))
    (folder / "frontier.html").write_text(frontier_page(frontier()))
    return folder


@pytest.fixture(scope="module")
def report(browser: Browser, pages: Path) -> Page:
    return browser.open(pages / "report.html")


def place_of(page: Page, node: int) -> tuple[float, float]:
    """Where a node is drawn, on the screen."""
    page.evaluate("document.getElementById('graph').scrollIntoView()")
    left, top = page.evaluate(
        "(({ left, top }) => [left, top])(document.getElementById('graph').getBoundingClientRect())"
    )
    at = page.evaluate(f"pdprune.graph.cy.getElementById('{node}').renderedPosition()")
    return left + at["x"], top + at["y"]


def chosen(page: Page) -> str:
    return str(page.evaluate("document.getElementById('graph').dataset.chosen"))


def let_go(page: Page) -> None:
    page.evaluate("pdprune.graph.pin(null)")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["report", "comparison", "frontier"])
def test_pages_render_quietly_at_both_widths_and_in_both_themes(
    browser: Browser, pages: Path, name: str, width: int, dark: bool, request: pytest.FixtureRequest
) -> None:
    page = browser.open(pages / f"{name}.html", width, 800, dark=dark)
    assert page.complaints() == []
    assert page.requests() == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "wider than the window"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 22, 27)") == dark
    assert page.evaluate("document.querySelectorAll('canvas').length") > 0
    if folder := request.config.getoption("--screenshots"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(Path(folder) / f"{name}-{width}-{'dark' if dark else 'light'}.png", whole=True)


def test_markup_in_data_is_shown_as_text_and_never_run(report: Page) -> None:
    assert report.evaluate("window.ran") is None
    assert report.evaluate("document.querySelectorAll('img').length") == 0
    assert HOSTILE in report.text("#verdict")
    report.evaluate("pdprune.graph.pin(0)")
    assert HOSTILE in report.text("#details")
    assert "\\u202e" in report.text("#details"), "a sign that turns text around is spelled out"
    assert report.requests() == [] and report.complaints() == []
    let_go(report)


def test_hovering_shows_what_a_node_reads_and_writes(report: Page) -> None:
    report.move_to(*place_of(report, 5))
    report.wait_for("document.getElementById('graph').dataset.chosen === '5'")
    told = report.text("#details")
    for part in ("blocks.0.mlp.down:5", "Raises", "token5", "Where it is most active", "Reads from", "worst case"):
        assert part in told
    tokens = "[...document.querySelectorAll('#details .token')]"
    shaded = report.evaluate(f"{tokens}.filter((token) => token.style.background).length")
    assert shaded > 0
    report.move_to(*place_of(report, 6))
    report.wait_for("document.getElementById('graph').dataset.chosen === '6'")


def test_a_pinned_node_stays_until_it_is_let_go(report: Page) -> None:
    report.click(*place_of(report, 8))
    report.wait_for("document.getElementById('details').classList.contains('pinned')")
    report.move_to(*place_of(report, 9))
    assert chosen(report) == "8"
    report.evaluate("document.querySelector('#details button').click()")
    assert not report.evaluate("document.getElementById('details').classList.contains('pinned')")


def test_the_address_leads_to_the_pinned_node(browser: Browser, pages: Path) -> None:
    page = browser.open(pages / "report.html")
    page.evaluate("pdprune.graph.pin(7)")
    address = page.evaluate("location.href")
    assert address.endswith("#node=blocks.1.mlp.down%3A7")
    page.evaluate("pdprune.graph.pin(null)")
    assert "node" not in page.evaluate("location.hash")
    page.evaluate(f"location.hash = '{address.partition('#')[2]}'; delete document.documentElement.dataset.ready")
    page.send("Page.reload")
    page.wait_for("document.documentElement?.dataset.ready === 'true'")
    assert chosen(page) == "7" and "blocks.1.mlp.down:7" in page.text("#details")
    assert page.complaints() == []


def test_tapping_on_a_narrow_screen(browser: Browser, pages: Path) -> None:
    page = browser.open(pages / "report.html", 400, 800)
    page.send("Emulation.setTouchEmulationEnabled", enabled=True)
    page.touch([place_of(page, 3)])
    page.wait_for("document.getElementById('graph').dataset.chosen === '3'")
    assert "blocks.1.mlp.down:3" in page.text("#details")


def test_fingers_scroll_the_page_and_zoom_the_graph(browser: Browser, pages: Path) -> None:
    page = browser.open(pages / "report.html", 400, 800)
    page.send("Emulation.setTouchEmulationEnabled", enabled=True)
    page.evaluate("document.getElementById('graph').scrollIntoView()")
    before, zoom = page.evaluate("[scrollY, pdprune.graph.cy.zoom()]")
    page.touch(*([(200, 400 - 30 * moment)] for moment in range(8)))
    page.wait_for(f"scrollY > {before} + 50")
    assert chosen(page) == ""
    page.evaluate("document.getElementById('graph').scrollIntoView()")
    page.touch(*([(180 - 10 * moment, 250), (220 + 10 * moment, 250)] for moment in range(8)))
    page.wait_for(f"pdprune.graph.cy.zoom() > {zoom} * 1.2")


def test_keys_walk_pin_and_zoom(report: Page) -> None:
    report.evaluate("document.getElementById('graph').focus()")
    report.press("ArrowUp")
    first = chosen(report)
    assert first != ""
    report.press("ArrowRight")
    assert chosen(report) != first
    report.press("Enter")
    assert report.evaluate("document.getElementById('details').classList.contains('pinned')")
    report.press("Escape")
    assert chosen(report) == ""
    zoom = report.evaluate("pdprune.graph.cy.zoom()")
    report.press("+")
    assert report.evaluate("pdprune.graph.cy.zoom()") > zoom
    report.press("0")
    assert report.evaluate("pdprune.graph.cy.zoom()") == pytest.approx(zoom)


def test_search_finds_labels_and_raised_tokens(report: Page) -> None:
    report.evaluate("document.getElementById('search').focus()")
    report.type("token42")
    assert report.text("#found") == "1 found"
    assert report.evaluate("pdprune.graph.cy.nodes('.match').map((node) => node.id())") == ["42"]
    report.press("Enter")
    assert chosen(report) == "42"
    report.set_value("#search", "")
    assert report.evaluate("pdprune.graph.cy.nodes('.match').length") == 0
    let_go(report)


def test_the_filter_leaves_the_strongest_edges(report: Page) -> None:
    def shown_at(position: float) -> list[float]:
        report.set_value("#strength", position)
        return list(report.evaluate("pdprune.graph.cy.edges().map((edge) => edge.data('share'))"))

    many, few = shown_at(1), shown_at(0.5)
    assert len(many) > len(few) > 0
    assert sorted(few) == sorted(many)[-len(few) :]
    assert shown_at(0) == []
    assert report.text("#edges-shown") == "none"


def test_the_table_of_nodes_leads_to_the_graph(report: Page) -> None:
    report.evaluate("document.querySelector('#circuit .fold').open = true")
    report.wait_for("document.querySelectorAll('#node-table tbody tr').length === 80")
    first = "document.querySelector('#node-table tbody button')"
    label = report.evaluate(f"{first}.textContent")
    report.evaluate(f"{first}.click()")
    assert report.evaluate("document.querySelector('#details .name').textContent") == label
    let_go(report)


def test_a_thousand_nodes_answer_at_once(browser: Browser, pages: Path) -> None:
    page = browser.open(pages / "large.html")
    seconds = page.evaluate(
        """(() => { const start = performance.now(); for (let node = 0; node < 10; node += 1) pdprune.graph.pin(node);
        return (performance.now() - start) / 10000; })()"""
    )
    assert seconds < 0.5, "smooth is a tenth of that; CI's machines are busy"
    assert page.complaints() == []


def test_a_circuit_of_no_nodes(browser: Browser, pages: Path) -> None:
    page = browser.open(pages / "empty.html")
    assert page.complaints() == []
    page.evaluate("document.getElementById('graph').focus()")
    page.press("ArrowUp")
    assert chosen(page) == ""


def test_the_comparison_shows_the_curves_that_are_asked_for(browser: Browser, pages: Path) -> None:
    page = browser.open(pages / "comparison.html")
    assert page.evaluate("window.ran") is None
    assert "0.250 (10 in both)" in page.text("#overlap")

    def legend() -> Any:
        return page.evaluate("document.querySelectorAll('#curves .u-series').length")

    before = legend()
    page.set_value("#schemes", "complete stochastic adversarial", "change")
    assert legend() == before + 4
    assert page.complaints() == []
