"""A circuit's run as a page to look at, and several of them side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pdprune.circuits.frontier_curve import Frontier
from pdprune.files import write_atomically
from pdprune.report.audited_run import AuditedRun
from pdprune.report.comparison import comparison_of
from pdprune.report.frontier import frontier_figures
from pdprune.report.gather import gather
from pdprune.report.page import comparison_page, frontier_page, report_page
from pdprune.run_folder import FRONTIER_PAGE, REPORT_FILE

__all__ = ["AuditedRun", "write_comparison", "write_frontier", "write_report"]

Tell = Callable[[str], None]


def write_report(run: AuditedRun, path: Path | None = None, tell: Tell = lambda doing: None) -> Path:
    """Write the page of a run, by default as `report.html` into its folder.

    Raises:
        UserError: it cannot be written.
    """
    path = run.folder / REPORT_FILE if path is None else path
    write_atomically(path, report_page(gather(run, tell)).encode())
    return path


def write_comparison(runs: Sequence[AuditedRun], path: Path, tell: Tell = lambda doing: None) -> Path:
    """Write the page of several runs.

    Raises:
        UserError: the runs do not compare, or it cannot be written.
    """
    write_atomically(path, comparison_page(comparison_of(runs, path, tell)).encode())
    return path


def write_frontier(folder: Path) -> Path:
    """Write `frontier.html` into the folder of a frontier's run.

    Raises:
        UserError: the folder has no `frontier.json`, or the page cannot be written.
    """
    path = folder / FRONTIER_PAGE
    write_atomically(path, frontier_page(frontier_figures(Frontier.load(folder), folder.resolve().name)).encode())
    return path
