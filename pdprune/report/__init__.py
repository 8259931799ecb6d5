"""A circuit's run as a page to look at, and several of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pdprune.circuits.frontier_curve import Frontier
from pdprune.files import write_atomically
from pdprune.report.audited_run import AuditedRun
from pdprune.report.comparison import comparison_of
from pdprune.report.figures import Figures, FrontierFigures
from pdprune.report.frontier import frontier_figures
from pdprune.report.gather import gather
from pdprune.report.page import comparison_page, frontier_page, report_page
from pdprune.run_folder import FRONTIER_PAGE, REPORT_FILE

__all__ = ["AuditedRun", "write_comparison", "write_frontier", "write_report"]

Tell = Callable[[str], None]


def write_report(run: AuditedRun, path: Path | None = None, tell: Tell = lambda doing: None) -> Figures:
    """Write the page of a run, by default as `report.html` into its folder; the figures on it are returned.

    Raises:
        UserError: it cannot be written.
    """
    figures = gather(run, tell)
    write_atomically(run.folder / REPORT_FILE if path is None else path, report_page(figures).encode())
    return figures


def write_comparison(runs: Sequence[AuditedRun], path: Path, tell: Tell = lambda doing: None) -> None:
    """Write the page of several runs.

    Raises:
        UserError: the runs do not compare, or it cannot be written.
    """
    write_atomically(path, comparison_page(comparison_of(runs, path, tell)).encode())


def write_frontier(folder: Path) -> FrontierFigures:
    """Write `frontier.html` into the folder of a frontier's run; the figures on it are returned.

    Raises:
        UserError: the folder has no `frontier.json`, or the page cannot be written.
    """
    figures = frontier_figures(Frontier.load(folder), folder.resolve().name)
    write_atomically(folder / FRONTIER_PAGE, frontier_page(figures).encode())
    return figures
