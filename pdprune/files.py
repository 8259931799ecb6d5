"""Files that are whole or absent, and errors about them in one line."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pdprune.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file at once: a reader, or a crash, finds the old one or the new one, never half of one.

    Raises:
        UserError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
        UserError: if it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a file that is there") from error


def read_json(path: Path, schema: str) -> dict[str, Any]:
    """A JSON object that says it is of a schema.

    Raises:
        UserError: if it is missing, damaged, or of another schema.
    """
    data = read_bytes(path)  # its own error says it all
    try:
        content = json.loads(data)
    except ValueError as error:  # what is no JSON, and what is no text
        raise UserError(f"{path}: is damaged or no JSON ({error}); expected a file by pdprune") from error
    if not isinstance(content, dict) or content.get("schema") != schema:
        found = content.get("schema") if isinstance(content, dict) else None
        raise UserError(f"{path}: its schema is {found!r}; expected {schema!r}")
    return content
