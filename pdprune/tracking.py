"""What a finished run shows in an experiment tracker, whichever logger leads there.

A model's `results(folder)` says what there is to show. Summary values go to every logger; pictures, tables and files to
those that take them, Weights & Biases and TensorBoard. Nothing of a run depends on any of them: what is shown stands in
the run folder as well.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from pdprune.run_folder import REPORT_FILE

GROUP = "audit"
LEFT_OUT = ("checkpoints", "wandb")
"""Folders in a run folder that are no results."""
ROWS_AS_TEXT = 500
"""Of a table, where it is written out as text."""

Picture = UInt8[np.ndarray, "H W 4"]


@dataclass(frozen=True)
class Table:
    """Rows under named columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Results:
    """What a run came to.

    Attributes:
        summary: values by name, truth values among them; None is left out.
        tables: by name.
        draw: makes the pictures, by name; called only where they are shown.
    """

    summary: Mapping[str, float | bool | None]
    tables: Mapping[str, Table] = field(default_factory=dict)
    draw: Callable[[], Mapping[str, Picture]] = dict

    def values(self) -> dict[str, float | bool]:
        """The summary under its full names, without what there is not."""
        return {f"{GROUP}/{name}": value for name, value in self.summary.items() if value is not None}


def show_results(loggers: Iterable[Logger], results: Results, folder: Path, step: int) -> None:
    """Hand the results of a run to its loggers; to Weights & Biases, where it is online, the run folder as well.

    Args:
        loggers: a trainer's.
        results: what there is to show.
        folder: the run folder.
        step: of training, at its end.
    """
    for logger in loggers:
        match logger:
            case WandbLogger():
                _show_on_wandb(logger.experiment, results, folder)
                logger.experiment.finish()  # or the next run of this process would go on with it
            case TensorBoardLogger():
                _show_on_tensorboard(logger, results, step)
                logger.finalize("success")  # once more: Lightning has done so before there were results
            case _:
                logger.log_metrics({name: float(value) for name, value in results.values().items()}, step)
                logger.finalize("success")


def _show_on_wandb(run: Any, results: Results, folder: Path) -> None:
    import wandb

    run.summary.update(results.values())
    media: dict[str, Any] = {name: wandb.Image(picture) for name, picture in _pictures(results).items()}
    for name, table in results.tables.items():
        media[name] = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
    if (folder / REPORT_FILE).is_file():
        media["report"] = wandb.Html(str(folder / REPORT_FILE))
    if media:
        run.log(media)
    if not run.offline:
        artifact = wandb.Artifact(artifact_name(folder), type="run")
        for path in result_files(folder):
            artifact.add_file(str(path), name=path.relative_to(folder).as_posix())
        run.log_artifact(artifact)


def _show_on_tensorboard(logger: TensorBoardLogger, results: Results, step: int) -> None:
    logger.log_metrics({name: float(value) for name, value in results.values().items()}, step)
    for name, picture in _pictures(results).items():
        logger.experiment.add_image(name, picture, step, dataformats="HWC")
    for name, table in results.tables.items():
        logger.experiment.add_text(name, as_markdown(table), step)


def _pictures(results: Results) -> Mapping[str, Picture]:
    """Drawn with matplotlib; where that is missing, none, and a line that says so."""
    try:
        return results.draw()
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("pdprune: no pictures are logged: matplotlib is missing; pip install 'pdprune[report]'", file=sys.stderr)
        return {}


def result_files(folder: Path) -> list[Path]:
    """All files of a run folder but checkpoints and what loggers keep there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith(".tmp"))
    return [path for path in files if path.relative_to(folder).parts[0] not in LEFT_OUT]


def artifact_name(folder: Path) -> str:
    """The run folder's name with the characters that Weights & Biases allows in names of artifacts."""
    return re.sub(r"[^\w.-]+", "-", folder.resolve().name, flags=re.ASCII)


def as_markdown(table: Table) -> str:
    """A table as TensorBoard shows text; of a long one the first rows, and how many more there are."""
    shown = table.rows[:ROWS_AS_TEXT]
    lines = [table.columns, ["---"] * len(table.columns), *([_cell(value) for value in row] for row in shown)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    more = len(table.rows) - len(shown)
    return f"{text}\n\nand {more} more" if more else text


def _cell(value: Any) -> str:
    text = "" if value is None else format(value, ".4g") if isinstance(value, float) else str(value)
    return text.replace("|", "\\|")
