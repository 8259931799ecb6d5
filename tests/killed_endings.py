"""Selections and audits that are killed, and what is done once they are gone on with."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from pdprune.circuits import journal
from pdprune.circuits.attack_journal import Attacks
from pdprune.circuits.schemes import AdversarialScorer


def dying_at(number: int, fit: Callable[[], int]) -> int:
    """A fit that is killed when it is about to score its circuit of that number, saving after each; for a child."""
    score, scored = AdversarialScorer.score, [0]

    def dying(self: Any, *args: Any, **named: Any) -> float:
        scored[0] += 1
        if scored[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(self, *args, **named)

    AdversarialScorer.score = dying  # type: ignore[method-assign]
    journal.SECONDS_BETWEEN_SAVES, journal.SAVING_AT_MOST = 0, float("inf")
    return fit()


def numbers_scored(fit: Callable[[], int]) -> list[int]:
    """Which circuits of its selections, by number, a fit scores itself."""
    score, numbers = AdversarialScorer.score, []

    def counted(self: Any, *args: Any, **named: Any) -> float:
        value = score(self, *args, **named)
        numbers.append(self.memory()["asked"])
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdversarialScorer, "score", counted)
        assert fit() == 0
    return numbers


def dying_in_audit(number: int, fit: Callable[[], int]) -> int:
    """A fit that is killed when it is about to make its audits' attack of that number; for a child."""
    made, begun = Attacks.made, [0]

    def dying(self: Any, game: Any, attack: Callable[[], Any]) -> Any:
        def counted() -> Any:
            begun[0] += 1
            if begun[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return attack()

        return made(self, game, counted)

    Attacks.made = dying  # type: ignore[method-assign]
    journal.SECONDS_BETWEEN_SAVES, journal.SAVING_AT_MOST = 0, float("inf")
    return fit()


def attacks_made(fit: Callable[[], int]) -> int:
    """How many attacks of its audits a fit makes itself."""
    made, count = Attacks.made, [0]

    def counting(self: Any, game: Any, attack: Callable[[], Any]) -> Any:
        def counted() -> Any:
            count[0] += 1
            return attack()

        return made(self, game, counted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attacks, "made", counting)
        assert fit() == 0
    return count[0]
