"""Several audited runs side by side."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pdprune.errors import UserError
from pdprune.report.audited_run import AuditedRun
from pdprune.report.curve import size_curve
from pdprune.report.examples import first_examples
from pdprune.report.figures import ComparedRun, Comparison, OverlapFigures, SiteRow
from pdprune.report.verdict import SCHEMES, checks_of, loss_title, verdict_of
from pdprune.report.worst_case import replay
from pdprune.run_folder import CONFIG_FILE, REPORT_FILE

Tell = Callable[[str], None]


def comparison_of(runs: Sequence[AuditedRun], page: Path, tell: Tell = lambda doing: None) -> Comparison:
    """What runs have in common and what sets them apart.

    Args:
        runs: audited on one loss; circuits of the same nodes are compared node by node.
        page: where the comparison will lie, for links to the runs' own reports.
        tell: told what is being done.

    Raises:
        UserError: the runs were audited on different losses.
    """
    for run in runs:
        if run.audit.loss != runs[0].audit.loss:
            raise UserError(
                f"{runs[0].folder} was audited on {runs[0].audit.loss}, {run.folder} on {run.audit.loss}; "
                "expected runs of one loss"
            )
    compared = []
    for run, name in zip(runs, _names(runs), strict=True):
        tell(f"curve of {name}")
        compared.append(_compared(run, name, page))
    return Comparison(
        headline=_headline(runs),
        task=_shared([run.circuit.task or "" for run in runs]),
        target=_shared([run.circuit.target.name for run in runs]),
        loss=loss_title(runs[0].audit.loss),
        runs=compared,
        overlaps=[_overlap(runs, first, second) for first, second in itertools.combinations(range(len(runs)), 2)],
        sites=_site_rows(runs),
    )


def _compared(run: AuditedRun, name: str, page: Path) -> ComparedRun:
    report = run.folder / REPORT_FILE
    return ComparedRun(
        name=name,
        link=Path(os.path.relpath(report, page.parent)).as_posix() if report.is_file() else None,
        scheme=SCHEMES.get(run.circuit.scheme, run.circuit.scheme),
        n_nodes=run.circuit.n_nodes,
        n_kept=run.circuit.n_kept,
        verdict=verdict_of(run.audit, run.folder / CONFIG_FILE),
        checks=checks_of(run.audit),
        curve=size_curve(run, replay(run, first_examples(run)[0])),
    )


def _names(runs: Sequence[AuditedRun]) -> list[str]:
    """The folders' names, or their paths where names are the same."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _headline(runs: Sequence[AuditedRun]) -> str:
    faithful = sum(run.audit.faithful is True for run in runs)
    asked = sum(run.audit.faithful is not None for run in runs)
    judged = f"{faithful} of {asked} faithful under attack" if asked else "none had a target"
    return f"{len(runs)} circuits side by side: {judged}"


def _shared(values: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _overlap(runs: Sequence[AuditedRun], first: int, second: int) -> OverlapFigures:
    one, other = runs[first].circuit, runs[second].circuit
    if one.decomposition.sha256 != other.decomposition.sha256:
        return OverlapFigures(first, second, None, None)
    overlap = one.compare(other)
    return OverlapFigures(first, second, overlap.jaccard, len(overlap.both))


def _site_rows(runs: Sequence[AuditedRun]) -> list[SiteRow]:
    names = dict.fromkeys(name for run in runs for name in run.model.site_names)
    return [SiteRow(name, [_kept_at(run, name) for run in runs]) for name in names]


def _kept_at(run: AuditedRun, site: str) -> int | None:
    if site not in run.model.sites:
        return None
    return sum(site == run.model.nodes[node].components[0][0] for node in run.circuit.kept)
