"""The lines of a task file: what is asked, what counts as right, and which split it belongs to.

A task file is JSONL, one prompt a line:

    {"prompt": "\\n    x = 'ab", "answer": "'", "wrong": "\\"", "split": "train"}

`wrong` is a string or a list of them; `split` is optional, for all lines or none. A text file, for the loss test on
running text, has `{"text": ..., "split": ...}` instead: every character after the first is asked for.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pdprune.errors import UserError

Split = Literal["train", "select", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""The gates learn on the first, the circuit is chosen on the second, nothing but the audit sees the third."""

SHIPPED = Path(__file__).parent / "shipped"
"""Folder of the task files that come with the package."""

SELECT_SHARE = 0.2
HELD_OUT_SHARE = 0.2
"""Shares of the prompts in the splits of a file that names none; the rest are for training."""


@dataclass(frozen=True)
class Prompt:
    """One example of a task."""

    text: str
    """What the target reads."""
    answer: str
    """The right next token."""
    wrong: tuple[str, ...]
    """The other tokens that the answer is chosen from."""
    split: Split


@dataclass(frozen=True)
class Window:
    """One example of the loss test on running text."""

    text: str
    """Read, and asked for one token further on, but for the first."""
    split: Split


Example = Prompt | Window


@dataclass(frozen=True)
class TaskFile:
    """A task as read from its file."""

    name: str
    path: Path
    sha256: str
    """Of the file."""
    examples: list[Example]
    """In the order of the file; all `Prompt` or all `Window`."""
    lines: list[int]
    """Line number of each example, from 1."""

    def where(self, index: int) -> str:
        """File and line of an example, for messages."""
        return f"{self.path}:{self.lines[index]}"


def shipped_tasks() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.jsonl"))


def read_task(name_or_path: str | Path, seed: int = 0) -> TaskFile:
    """Read a shipped task by name or a task file by path.

    A file without `split` is split by prompt: in the order of the SHA-256 of seed and prompt, a fifth each to `select`
    and `held_out`, the rest to `train`.

    Raises `UserError`, naming file and line, for whatever cannot be a task.
    """
    path = SHIPPED / f"{name_or_path}.jsonl" if str(name_or_path) in shipped_tasks() else Path(name_or_path)
    try:
        content = path.read_bytes()
    except OSError as error:
        names = ", ".join(shipped_tasks())
        raise UserError(
            f"task {str(name_or_path)!r}: cannot read {path} ({error.strerror}), expected one of {names}, or a file"
        ) from None
    rows = list(_rows(path, content))
    if not rows:
        raise UserError(f"task {path}: no prompts, expected one JSON object a line")
    examples, lines = _with_splits(path, rows, seed), [line for line, _ in rows]
    return TaskFile(path.stem, path, hashlib.sha256(content).hexdigest(), examples, lines)


def _rows(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """The checked JSON objects with their line numbers; blank lines are skipped."""
    first_line_of: dict[str, int] = {}
    kind = ""
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}), expected one JSON object a line") from None
        text = _check_row(f"{path}:{number}", row)
        kind = kind or ("text" if "text" in row else "prompt")
        if kind not in row:
            raise UserError(f"{path}:{number}: no {kind!r}, expected one on every line, as on the lines before")
        if text in first_line_of:
            raise UserError(f"{path}:{number}: same {kind} as on line {first_line_of[text]}, expected each only once")
        first_line_of[text] = number
        yield number, row


def _check_row(where: str, row: Any) -> str:
    """The text of a row, or `UserError` if its fields are not those of a prompt or a text."""
    if not isinstance(row, dict) or not ("prompt" in row or "text" in row):
        raise UserError(f'{where}: expected an object with "prompt", "answer" and "wrong", or with "text"')
    fields = ("text",) if "text" in row else ("prompt", "answer", "wrong")
    for field in fields:
        if field not in row:
            raise UserError(f"{where}: no {field!r}, expected {', '.join(map(repr, fields))}")
    for field in row:
        if field not in (*fields, "split"):
            raise UserError(f"{where}: unknown field {field!r}, expected {', '.join(map(repr, fields))} or 'split'")
    for field in fields:
        if field != "wrong" and not isinstance(row[field], str):
            raise UserError(f"{where}: {field!r} is {row[field]!r}, expected a string")
    if "wrong" in fields:
        _check_wrong(where, row)
    if row.get("split", "train") not in SPLITS:
        raise UserError(f"{where}: split {row['split']!r}, expected one of {', '.join(SPLITS)}")
    return row[fields[0]]


def _check_wrong(where: str, row: dict[str, Any]) -> None:
    wrong = row["wrong"]
    items = wrong if isinstance(wrong, list) else [wrong]
    if not items or not all(isinstance(item, str) for item in items):
        raise UserError(f"{where}: 'wrong' is {wrong!r}, expected a string or a list of strings")
    if row["answer"] in items:
        raise UserError(f"{where}: answer {row['answer']!r} is among the wrong ones, expected another token")


def _as_tuple(wrong: str | list[str]) -> tuple[str, ...]:
    return (wrong,) if isinstance(wrong, str) else tuple(wrong)


def _with_splits(path: Path, rows: list[tuple[int, dict[str, Any]]], seed: int) -> list[Example]:
    named = [line for line, row in rows if "split" in row]
    if named and len(named) < len(rows):
        line = next(line for line, row in rows if "split" not in row)
        raise UserError(f"{path}:{line}: no 'split', expected one on every line or on none")
    splits = [row["split"] for _, row in rows] if named else _draw_splits([_text(row) for _, row in rows], seed)
    for split in SPLITS:
        if split not in splits:
            raise UserError(
                f"task {path}: none of {len(rows)} prompts is left for the {split} split, expected some in each of "
                f"{', '.join(SPLITS)}"
            )
    return [_example(row, split) for (_, row), split in zip(rows, splits, strict=True)]


def _draw_splits(texts: list[str], seed: int) -> list[Split]:
    """A split for each text, by its rank among the hashes of all."""
    n_select, n_held_out = (max(1, round(share * len(texts))) for share in (SELECT_SHARE, HELD_OUT_SHARE))
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(f"{seed} {texts[i]}".encode()).digest())
    splits: list[Split] = ["train"] * len(texts)
    for rank, index in enumerate(order):
        if rank < n_held_out:
            splits[index] = "held_out"
        elif rank < n_held_out + n_select:
            splits[index] = "select"
    return splits


def _text(row: dict[str, Any]) -> str:
    return row["text"] if "text" in row else row["prompt"]


def _example(row: dict[str, Any], split: Split) -> Example:
    if "text" in row:
        return Window(row["text"], split)
    return Prompt(row["prompt"], row["answer"], _as_tuple(row["wrong"]), split)
