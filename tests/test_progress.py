"""Progress on a fake terminal, and none in a pipe and in CI."""

from __future__ import annotations

import functools
import io
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from circuits.networks import token_batch, token_model
from tiny_circuit import QUICK, write_material

from pdprune import audit, progress, prune
from pdprune.decomposition import co_important
from pdprune.progress import moved, part, span, telling
from pdprune.train import main


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def words(self) -> str:
        """What was written, without what moves the cursor and colours."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv(progress.VARIABLE, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return FakeTerminal()


def on_terminal(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test with its fixture `terminal` as standard output. pytest sets its own between fixtures and test."""

    @functools.wraps(test)
    def redirected(**fixtures: Any) -> None:
        with redirect_stdout(fixtures["terminal"]):
            test(**fixtures)

    return redirected


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("pdprune.progress.time.monotonic", lambda: self.now)


@on_terminal
def test_a_terminal_shows_what_runs_how_far_and_how_long_to_go(
    terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    with telling("audit") as tell:
        tell("random sources", 0.0)
        clock.now = 30.0
        tell("attack [1] of 2", 0.25)
        shown = tell.display
        assert (shown.words, shown.share, shown.times) == ("audit: attack [1] of 2", 0.25, "0:30, 1:30 to go")
    assert "audit: attack [1] of 2" in terminal.words
    assert "25%" in terminal.words and "1:30 to go" in terminal.words
    assert terminal.getvalue().endswith("\x1b[2K"), "the line is gone when the work is done"


@on_terminal
def test_time_to_go_is_told_from_where_a_run_goes_on(terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with telling("training") as tell:
        tell("step 80/100", 0.8)
        assert tell.display.times == "0:00"
        clock.now = 3600.0
        tell("step 90/100", 0.9)
        assert tell.display.times == "1:00:00, 1:00:00 to go"


@on_terminal
def test_work_inside_of_work_shares_its_line(terminal: FakeTerminal) -> None:
    with telling("training") as outer:
        outer("step 1 of 4", 0.25)
        with telling("validation") as inner:
            inner("batch 1 of 2", 0.5)
            assert inner.display is outer.display
            assert inner.display.words == "training: step 1 of 4: validation: batch 1 of 2"
            assert inner.display.share == 0.25, "how far all of it is"
        assert outer.display.words == "training: step 1 of 4"


@on_terminal
def test_spans_put_parts_together(terminal: FakeTerminal) -> None:
    with telling("audit") as tell:
        moved(0.9)
        assert tell.share is None, "nobody has asked yet"
        with span(0.2, 0.6):
            assert tell.share == pytest.approx(0.2)
            with part(1, 2):
                moved(0.5)
                assert tell.share == pytest.approx(0.5)
            assert tell.share == pytest.approx(0.6)
            with telling("part") as inner:
                inner.reach(0.5)
        with span(0.6, 1.0), telling("last") as last:
            last.reach(0.5)
            assert tell.share == pytest.approx(0.8), "work in a span moves what is around it"
        moved(0.1)
        assert tell.share == 1.0, "it never goes back"
    with span(0.0, 1.0):
        moved(0.5)


@on_terminal
def test_nothing_is_left_open_by_an_error(terminal: FakeTerminal) -> None:
    with pytest.raises(KeyError), telling("audit"), span(0, 1), telling("part"):
        raise KeyError
    assert not progress._listeners and not progress._displays
    assert sys.stdout is terminal


@pytest.mark.parametrize(
    ("is_terminal", "variables", "is_told"),
    [
        (True, {}, True),
        (True, {"CI": "true"}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {progress.VARIABLE: "off"}, False),
        (False, {}, False),
        (False, {"CI": "true"}, False),
        (False, {progress.VARIABLE: "lines"}, True),
    ],
)
@on_terminal
def test_where_it_is_quiet(
    is_terminal: bool,
    variables: dict[str, str],
    is_told: bool,
    terminal: FakeTerminal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeTerminal, "isatty", lambda self: is_terminal)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    clock = Clock(monkeypatch)
    with telling("audit") as tell:
        clock.now = 11.0
        tell("attack", 0.5)
    assert ("audit: attack" in terminal.words) is is_told
    assert is_terminal or "\x1b" not in terminal.getvalue()


def test_lines_of_a_log_are_few(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(progress.VARIABLE, "lines")
    clock = Clock(monkeypatch)
    with telling("audit") as tell:
        for second in range(25):
            clock.now = float(second)
            tell("attack", second / 100)
    assert capsys.readouterr().out.splitlines() == [
        "audit: attack, 10% (0:10, 1:30 to go)",
        "audit: attack, 20% (0:20, 1:20 to go)",
    ]


# -- that the long work tells


def shares_of(terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Filled with what a work's share becomes while it goes on."""
    seen: list[float] = []
    shown = progress._LiveLine.show
    monkeypatch.setattr(progress._LiveLine, "show", lambda self: (seen.append(self.share or 0.0), shown(self))[1])
    return seen


@on_terminal
def test_an_audit_tells_how_far_it_is(terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = shares_of(terminal, monkeypatch)
    with telling("audit") as tell:
        audit(token_model(), {0}, [token_batch()], ladder=(20, 40), second_attack=True, draws=2, progress=tell)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0)
    assert len({round(share, 2) for share in seen}) > 50, "in many small steps, also within an attack"


@on_terminal
def test_a_selection_tells_how_far_it_is(terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = shares_of(terminal, monkeypatch)
    with telling("selection"):
        prune(token_model(), [token_batch()], target_loss=0.1, steps=2, search="gradient")
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0)
    assert len(set(seen)) > 4


@on_terminal
def test_grouping_tells_how_far_it_is(terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = shares_of(terminal, monkeypatch)
    with telling("grouping nodes"):
        co_important(token_model(), [token_batch(seed=seed) for seed in range(4)])
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1.0)
    assert len(set(seen)) > 8


@on_terminal
def test_a_fit_is_one_line_on_a_terminal_and_none_in_a_pipe(
    terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(write_material(tmp_path))
    assert main(["fit", *QUICK, "--model.audit.draws", "500"]) == 0  # the line is drawn ten times a second
    shown = terminal.words
    for words in ("training: step 3/3  loss", "selection: bisecting", "audit: ", "to go"):
        assert words in shown
    assert not progress._displays

    monkeypatch.setattr(FakeTerminal, "isatty", lambda self: False)
    terminal.truncate(0)
    assert main(["fit", *QUICK, "--overwrite"]) == 0
    assert terminal.getvalue().lstrip("\0") == "Results are in runs/circuit\n"
