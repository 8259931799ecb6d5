"""What long work is doing, told as it goes: a status line on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0


class Tell(Protocol):
    """Told in a few words what is being done now."""

    def __call__(self, doing: str) -> None: ...


@contextmanager
def telling(title: str, quiet: bool = False) -> Iterator[Tell]:
    """Tell how `title` goes: `with telling("audit") as tell: tell("attack")`."""
    start = time.monotonic()
    if quiet:
        yield lambda doing: None
    elif sys.stdout.isatty():
        with Console().status(title) as status:
            yield lambda doing: status.update(f"{title}: {doing} ({time.monotonic() - start:.0f} s)")
    else:
        yield _Lines(title, start)


class _Lines:
    def __init__(self, title: str, start: float) -> None:
        self.title, self.start, self.told_at = title, start, start

    def __call__(self, doing: str) -> None:
        now = time.monotonic()
        if now - self.told_at >= SECONDS_BETWEEN_LINES:
            self.told_at = now
            print(f"{self.title}: {doing} ({now - self.start:.0f} s)", flush=True)
