"""Where logged values go: `metrics.csv` in the run folder, and Weights & Biases.

Experiment trackers sort values by the group that their names begin with: `train/loss`, `select/adversarial`. In
`metrics.csv` what is logged at every step has its name alone, `loss`.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from pdprune.files import write_atomically


class MetricsCsv(Logger):
    """One row a step, one column a metric; a row is in the file as soon as its values are logged.

    Values logged again under the step of the last row are merged into it, so a row may be written before a checkpoint
    is saved and then again by Lightning, whose own turn comes only after.

    Args:
        path: the CSV file. One that exists is continued, less a last line cut short by a kill.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._rows: list[dict[str, Any]] = []
        self._columns = ["step"]
        self._last_row_at = 0  # the offset in the file at which the last row begins
        if path.exists():
            self._read()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def last_step(self) -> int:
        """The step of the last row, or -1."""
        return int(self._rows[-1]["step"]) if self._rows else -1

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Hyper-parameters stand in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        step = self.last_step + 1 if step is None else step
        is_new_row = step != self.last_step
        row: dict[str, Any] = {"step": step} if is_new_row else dict(self._rows[-1])
        row.update({name: format(value, ".9g") for name, value in metrics.items()})
        if not is_new_row and row == self._rows[-1]:
            return
        self._rows[-1:] = [row] if not is_new_row else [*self._rows[-1:], row]
        new_columns = sorted(row.keys() - set(self._columns))
        self._columns += new_columns
        if new_columns or not self.path.exists():
            self._rewrite()
        else:
            self._write_last_row(is_new_row)

    @rank_zero_only
    def drop_rows_after(self, step: int) -> None:
        """Forget the rows of steps later than `step`: a run that goes on from there will log them again."""
        kept = [row for row in self._rows if int(row["step"]) <= step]
        if len(kept) < len(self._rows):
            self._rows = kept
            self._rewrite()

    def _read(self) -> None:
        text = self.path.read_text()
        whole_lines = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole_lines))
        rows = [row for row in reader if row["step"] and None not in row.values()]
        self._rows = [{name: value for name, value in row.items() if value != ""} for row in rows]
        self._columns = list(reader.fieldnames or ["step"])
        self._rewrite()

    def _line(self, row: Mapping[str, Any]) -> str:
        return ",".join(str(row.get(name, "")) for name in self._columns) + "\n"

    @rank_zero_only
    def _rewrite(self) -> None:
        lines = [",".join(self._columns) + "\n", *map(self._line, self._rows)]
        write_atomically(self.path, "".join(lines).encode())
        self._last_row_at = sum(map(len, lines[:-1])) if self._rows else len(lines[0])

    def _write_last_row(self, is_new_row: bool) -> None:
        with open(self.path, "r+", newline="") as file:
            if is_new_row:
                self._last_row_at = file.seek(0, os.SEEK_END)
            else:
                file.seek(self._last_row_at)
                file.truncate()
            file.write(self._line(self._rows[-1]))


def read_metrics(path: Path) -> dict[str, list[float | None]]:
    """The columns of a `metrics.csv`, None where nothing was logged; no columns without the file."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [_number(row[name]) for row in rows] for name in (rows[0] if rows else {}) if name is not None}


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:  # a last line cut short by a kill
        return None


def group_names(logger: Logger) -> None:
    """From now on a logger gets every value under a name that begins with its group."""
    log_metrics = logger.log_metrics

    @functools.wraps(log_metrics)
    def with_groups(metrics: Mapping[str, float], step: int | None = None) -> None:
        log_metrics({grouped_name(name): value for name, value in metrics.items()}, step)

    logger.log_metrics = with_groups  # type: ignore[method-assign]  # of this instance: it may be of any class


def grouped_name(name: str) -> str:
    """`loss` is `train/loss`, `val_loss` is `val/loss`; `select/complete` and Lightning's own `epoch` stay."""
    if "/" in name or name == "epoch":
        return name
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if group in ("train", "val") and rest else f"train/{name}"


def wandb_logger(folder: Path, config: dict[str, Any], is_new_run: bool) -> Logger | None:
    """A Weights & Biases logger under `folder`: online if the user is logged in, offline otherwise.

    `WANDB_MODE` decides where it is set; None if it says "disabled". A run that is gone on with keeps its identity.
    """
    mode = os.environ.get("WANDB_MODE", "online" if _is_logged_in_to_wandb() else "offline")
    if mode == "disabled":
        return None
    import wandb  # takes seconds, so only where it is used
    from lightning.pytorch.loggers import WandbLogger

    earlier_runs = sorted((folder / "wandb").glob("*run-*-*"))
    logger = WandbLogger(
        project=os.environ.get("WANDB_PROJECT", "pdprune"),
        name=folder.name,
        save_dir=folder,
        offline=mode != "online",
        id=earlier_runs[-1].name.rsplit("-", 1)[1] if earlier_runs and not is_new_run else None,
        config=config,
        settings=wandb.Settings(silent=True, console="off"),
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning 2.6 passes it, and wandb 0.31 warns about it
    return logger


def _is_logged_in_to_wandb() -> bool:
    """Whether an API key can be found where `wandb login` and its users put it, without importing wandb."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = os.environ.get("NETRC") or Path.home() / ".netrc"
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(str(file)).authenticators(host) is not None
    return False
