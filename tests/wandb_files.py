"""Reads back what Weights & Biases wrote offline: a LevelDB log of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_HEADER = 7
BLOCK = 32 * 1024
RECORD_HEADER = struct.Struct("<IHB")
"""Checksum, length, and which part of a record it is."""
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What a run holds: rows of the history in order, the summary and the config as they ended, and where files lie."""

    files: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)


def read_offline_run(folder: Path) -> OfflineRun:
    """The one run in a folder that `wandb` was told to write to."""
    from wandb.proto import wandb_internal_pb2

    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    run = OfflineRun(log.parent / "files")
    for data in _records(log.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                run.config |= _values(record.run.config.update)
            case "config":
                run.config |= _values(record.config.update)
            case "history":
                run.history.append(_values(record.history.item))
            case "summary":
                run.summary |= _values(record.summary.update)
            case "artifact":
                run.artifacts.append(record.artifact.type)
    return run


def _records(data: bytes) -> Iterator[bytes]:
    at, joined = FILE_HEADER, b""
    while at + RECORD_HEADER.size <= len(data):
        left_in_block = BLOCK - at % BLOCK
        if left_in_block < RECORD_HEADER.size:
            at += left_in_block
            continue
        _, length, part = RECORD_HEADER.unpack_from(data, at)
        at += RECORD_HEADER.size
        joined = (b"" if part in (FULL, FIRST) else joined) + data[at : at + length]
        at += length
        if part in (FULL, LAST):
            yield joined


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
