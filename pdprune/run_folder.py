"""A run's folder: which files it holds, what state it is in, and how they are written.

Everything is written to a temporary file beside its place and then renamed, so that whoever is killed at whatever
moment leaves each file either as it was or complete.

    config.yaml          the whole resolved configuration
    checkpoints/         last.ckpt, previous.ckpt (what last was one save ago), and the mark of a finished run
    metrics.csv          every logged value by step
    ...                  what the model writes when its fit ends, for instance circuit.json and audit.json
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pdprune.errors import UserError
from pdprune.files import write_atomically

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.csv"
REPORT_FILE = "report.html"
FRONTIER_FILE = "frontier.json"
FRONTIER_TABLE = "frontier.csv"
FRONTIER_PAGE = "frontier.html"
LEVELS_FOLDER = "levels"
RESULT_FILES = (
    CONFIG_FILE,
    METRICS_FILE,
    "circuit.json",
    "circuit.safetensors",
    "audit.json",
    "decomposition/decomposition.safetensors",
    "decomposition/decomposition.json",
    "decomposition_audit.json",
    "predictions.jsonl",
    REPORT_FILE,
    FRONTIER_FILE,
    FRONTIER_TABLE,
    FRONTIER_PAGE,
    "export/circuit.graphml",
    "export/circuit.node_link.json",
    "export/nodes.csv",
    "export/nodes.parquet",
)
LEVEL_FILES = ("circuit.json", "circuit.safetensors", "audit.json")
"""Of every level of a frontier, in a folder of its own."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, the temporary one beside the place where it goes.

    Lightning's own writes to the system's temporary folder first, and moving from there is atomic only where both lie
    on one file system.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a Lightning checkpoint, loaded with `weights_only=True`.

    Raises:
        UserError: there is no such file, it is truncated or corrupt, or it is no Lightning checkpoint.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself doesn't look at the checksums
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"checksum of {damaged}")
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds, by where the damage lies
        raise UserError(
            f"checkpoint {path} cannot be read: it is truncated, corrupt or not a checkpoint"
            f" ({type(error).__name__}); give another, or --ckpt_path last"
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content or "loops" not in content:
        raise UserError(f"{path} is not a checkpoint of a run: it has no 'state_dict' and 'loops'")
    return content


class RunFolder:
    """The files of one run under `path`; nothing is created before `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.previous = self.checkpoints / "previous.ckpt"
        self.non_finite = self.checkpoints / "non-finite.ckpt"
        self._finished_mark = self.checkpoints / "finished"

    @property
    def has_checkpoint(self) -> bool:
        return self.last.exists() or self.previous.exists()

    @property
    def config(self) -> dict[str, Any] | None:
        """What the folder says that its run is; None where it says nothing, or nothing that can be read."""
        path = self.path / CONFIG_FILE
        try:
            return yaml.safe_load(path.read_text()) if path.is_file() else None
        except yaml.YAMLError:
            return None

    @property
    def has_ended_fit(self) -> bool:
        """Whether a fit came to its end here, and its checkpoints are still there."""
        return self._finished_mark.exists()

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds results that are complete, also those whose checkpoints were deleted."""
        if self.has_ended_fit:
            return True
        results = ("circuit.json", "audit.json", "decomposition_audit.json", FRONTIER_FILE)
        return not self.has_checkpoint and any((self.path / name).exists() for name in results)

    def mark_finished(self) -> None:
        write_atomically(self._finished_mark, b"")

    def mark_unfinished(self) -> None:
        self._finished_mark.unlink(missing_ok=True)

    def require_writable(self) -> None:
        """Raise a `UserError` unless the folder can be made and written to. Leaves no trace."""
        existing = self.path.absolute()
        while not existing.exists():
            existing = existing.parent
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise UserError(
                f"run folder {self.path} cannot be written to ({error.strerror} in {existing});"
                " choose another with --trainer.default_root_dir"
            ) from error

    def newest_readable_checkpoint(self) -> Path | None:
        """`last.ckpt`, or, with a warning, the one before it if that is damaged; None if there is none at all.

        Raises:
            UserError: there are checkpoints, but none can be read.
        """
        damaged = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            try:
                read_checkpoint(path)
            except UserError:
                damaged.append(path)
                continue
            if damaged:
                rank_zero_warn(f"{damaged[0]} cannot be read; going on from {path}", category=UserWarning)
            return path
        if damaged:
            raise UserError(
                f"no checkpoint in {self.checkpoints} can be read"
                f" ({', '.join(path.name for path in damaged)} damaged); start over with --overwrite"
            )
        return None

    def keep_last_as_previous(self) -> None:
        """Give the file that is `last.ckpt` now a second name, so that it outlives the next save."""
        if not self.last.exists():
            return
        temporary = self.previous.with_name(f"{self.previous.name}.tmp")
        temporary.unlink(missing_ok=True)
        os.link(self.last, temporary)
        os.replace(temporary, self.previous)

    def clear(self) -> None:
        """Remove an earlier run's files; whatever else lies in the folder stays."""
        for name in RESULT_FILES:
            (self.path / name).unlink(missing_ok=True)
        for path in self.path.glob(f"{LEVELS_FOLDER}/*/*"):
            if path.name in LEVEL_FILES:
                path.unlink()
        leftovers = (*self.path.glob(".*.tmp"), *self.checkpoints.glob("*.tmp"))
        for path in (*leftovers, *self.checkpoints.glob("*.ckpt"), self._finished_mark):
            path.unlink(missing_ok=True)
