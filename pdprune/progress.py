"""What long work is doing, how far it has come and how long it has to go: one live line on a terminal, for all of it.

    with telling("audit") as tell:          # the line is there while this lasts
        tell("random sources")              # what is being done
        with span(0.1, 0.8):                # what happens in here is this part of the work
            attack(...)                     # which calls moved(share) as it goes

Work inside of work shares the line of the outermost. `span` and `moved` find the work that is going on by themselves,
so that an attack need not know whether an audit or a selection called it; where nothing is told, they do nothing.

Where there is no terminal, as in a pipe, and in CI (the variable CI is set), nothing is told at all. With the variable
PDPRUNE_PROGRESS=lines a line is printed every few seconds there instead, for the log of a long job; with
PDPRUNE_PROGRESS=off it is quiet everywhere.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
VARIABLE = "PDPRUNE_PROGRESS"


class Tell(Protocol):
    """Told in a few words what is being done now."""

    def __call__(self, doing: str) -> None: ...


@dataclass
class Work:
    """Something long that goes on.

    Attributes:
        title: what it is.
        display: where it is shown; None where nobody looks.
        doing: what it does now.
        share: how much of it is done, from 0 to 1, as far as is known.
        outer: told how much is done, where this is a part of other work that is known to be so large.
    """

    title: str
    display: _Display | None = None
    doing: str = ""
    share: float | None = None
    outer: Callable[[float], None] | None = None

    def __call__(self, doing: str, share: float | None = None) -> None:
        """Tell what is being done now and, where it is known, how much of all is done by then."""
        self.doing = doing
        if share is not None:
            self.reach(share)
        elif self.display is not None:
            self.display.changed()

    def reach(self, share: float) -> None:
        """So much is done; never less than before."""
        self.share = max(self.share or 0.0, min(1.0, share))
        if self.outer is not None:
            self.outer(self.share)
        if self.display is not None:
            self.display.changed()


class _Listener(NamedTuple):
    """Who hears how far things have come."""

    reach: Callable[[float], None]
    is_span: bool


_listeners: list[_Listener] = []
"""Of the works and spans that are open, the innermost last."""
_displays: list[_Display] = []
"""The one that is shown, if there is one."""


@contextmanager
def telling(title: str, quiet: bool = False) -> Iterator[Work]:
    """Tell how some work goes while it goes on. Inside of other work it is told of as a part of that.

    Args:
        title: what it is, in a word or two.
        quiet: tell nothing, whatever the terminal.
    """
    if _displays and not quiet:
        with _nested(_displays[0], title) as work:
            yield work
        return
    display = None if quiet else _new_display()
    if display is None:
        yield Work(title)
        return
    work = display.add(title)
    _displays.append(display)
    _listeners.append(_Listener(work.reach, is_span=False))
    try:
        with display.shown():
            yield work
    finally:
        _listeners.pop()
        _displays.pop()


@contextmanager
def _nested(display: _Display, title: str) -> Iterator[Work]:
    """Work inside of other work; in a span, how far it has come counts for the outer one."""
    around = _listeners[-1]
    work = display.add(title)
    work.outer = around.reach if around.is_span else None
    _listeners.append(_Listener(work.reach, is_span=False))
    try:
        yield work
    finally:
        _listeners.pop()
        display.works.remove(work)


@contextmanager
def span(start: float, end: float) -> Iterator[None]:
    """While this lasts, work that moves from 0 to 1 takes what is going on around it from `start` to `end`."""
    if not _listeners:
        yield
        return
    outer = _listeners[-1].reach
    outer(start)
    _listeners.append(_Listener(lambda share: outer(start + (end - start) * min(1.0, share)), is_span=True))
    try:
        yield
    finally:
        _listeners.pop()
    outer(end)


def part(index: int, of: int) -> AbstractContextManager[None]:
    """A span for one of several parts that take equally long."""
    return span(index / of, (index + 1) / of)


def moved(share: float) -> None:
    """So much of what the innermost span is about is done. Outside of any span nobody has asked."""
    if _listeners and _listeners[-1].is_span:
        _listeners[-1].reach(share)


# -- where it is shown -----------------------------------------------------------------------------------------------


def _new_display() -> _Display | None:
    """A live line on a terminal, lines of text where they are asked for, else nothing; just on the first of all ranks.

    What the variable holds besides `lines` and `off` is taken for the default.
    """
    asked_for = os.environ.get(VARIABLE)
    if asked_for == "off" or getattr(rank_zero_only, "rank", None):
        return None
    console = Console(file=sys.stdout)
    if sys.stdout.isatty() and not console.is_dumb_terminal and not os.environ.get("CI"):
        return _LiveLine(console)
    return _Lines() if asked_for == "lines" else None


@dataclass
class _Display:
    """All work that is going on, the outermost first, and since when."""

    works: list[Work] = field(default_factory=list)
    started: float = field(default_factory=lambda: time.monotonic())
    first_told: tuple[float, float] | None = None
    """When the first share was told, and which it was: work may go on from a checkpoint."""

    def add(self, title: str) -> Work:
        work = Work(title, self)
        self.works.append(work)
        return work

    @property
    def words(self) -> str:
        """What is running, from the outermost work to what the innermost does."""
        return ": ".join(part for work in self.works for part in (work.title, work.doing) if part)

    @property
    def share(self) -> float | None:
        """Of the outermost work that knows."""
        return next((work.share for work in self.works if work.share is not None), None)

    @property
    def times(self) -> str:
        """How long it has taken, and how long it will take if it goes on at this pace."""
        now, share = time.monotonic(), self.share
        taken = _clock(now - self.started)
        if share is None or self.first_told is None:
            return taken
        since, at_first = self.first_told
        if not at_first < share < 1:
            return taken
        return f"{taken}, {_clock((now - since) * (1 - share) / (share - at_first))} to go"

    def changed(self) -> None:
        if self.first_told is None and self.share is not None:
            self.first_told = (time.monotonic(), self.share)
        self.show()

    def show(self) -> None: ...

    @contextmanager
    def shown(self) -> Iterator[None]:
        yield


@dataclass
class _Lines(_Display):
    """A line of text every few seconds."""

    told_at: float = field(default_factory=lambda: time.monotonic())

    def show(self) -> None:
        if time.monotonic() - self.told_at >= SECONDS_BETWEEN_LINES:
            self.told_at = time.monotonic()
            share = "" if self.share is None else f", {self.share:.0%}"
            print(f"{self.words}{share} ({self.times})", flush=True)


class _LiveLine(_Display):
    """A line that changes in place, and is gone when the work is done. What is printed meanwhile goes above it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        one_line = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        words = TextColumn("{task.description}", markup=False, table_column=one_line)
        self._bar = Progress(
            words,
            BarColumn(20),
            TextColumn("{task.fields[percent]}", justify="right"),
            _Times(self),
            console=console,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, percent="")

    def show(self) -> None:
        share = self.share
        percent = "" if share is None else f"{share:.0%}"
        total = None if share is None else 1.0
        self._bar.update(self._task, description=self.words, total=total, completed=share or 0.0, percent=percent)

    @contextmanager
    def shown(self) -> Iterator[None]:
        with self._bar:
            self.show()
            yield


class _Times(ProgressColumn):
    """Goes on counting between two things that are told."""

    def __init__(self, display: _Display) -> None:
        super().__init__()
        self._display = display

    def render(self, task: Task) -> Text:
        return Text(self._display.times, no_wrap=True)


def _clock(seconds: float) -> str:
    """`0:42`, `12:03`, `5:12:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
