"""An audit that is stopped goes on where it was, and believes what it found only about the same circuit and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from circuits.networks import token_batch, token_model
from torch import Tensor

from pdprune.adversary.attack import Worst
from pdprune.adversary.game import Game
from pdprune.circuits import attack_journal, hypotheses
from pdprune.circuits.attack_journal import AttackJournal, Attacks
from pdprune.circuits.audit import Audit, audit
from pdprune.circuits.hypotheses import HypothesisSettings

MODEL = token_model()
KEEP = set(range(0, MODEL.n_nodes, 2))
BATCHES = [token_batch(4, seed) for seed in range(2)]


class Stopped(Exception):  # noqa: N818  # stands for a kill
    """The process is gone."""


class Stopping(Attacks):
    """Makes so many attacks and is stopped at the next; notes the numbers of those that it makes itself."""

    def __init__(self, journal: AttackJournal | None, after: int) -> None:
        super().__init__(journal)
        self.after = after
        self.made_itself: list[int] = []

    def made(self, game: Game, attack: Callable[[], Worst]) -> Worst:
        def counted() -> Worst:
            if len(self.made_itself) == self.after:
                raise Stopped
            self.made_itself.append(self._asked - 1)
            return attack()

        return super().made(game, counted)


@pytest.fixture(autouse=True)
def _removals_are_attacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypotheses, "UNCHANGED_ABSOLUTE", 100.0)


def audited(attacks: Attacks, keep: Any = KEEP, batches: Any = BATCHES, **rest: Any) -> Audit:
    tests = HypothesisSettings(circuits=2, points=2, removals=True, removal_attacks=2)
    options: dict[str, Any] = {"ladder": (30,), "second_attack": True, "draws": 2, "hypotheses": tests} | rest
    return audit(MODEL, keep, batches, attacks=attacks, **options)


def same(one: Audit, other: Audit) -> bool:
    assert isinstance(one.worst_source, Tensor) and isinstance(other.worst_source, Tensor)
    return str(one) == str(other) and torch.equal(one.worst_source, other.worst_source)


def test_none_of_its_attacks_is_made_twice() -> None:
    whole = Stopping(None, after=10_000)
    expected = audited(whole)
    number = len(whole.made_itself)
    # Two budgets, a second attack, two random circuits and two removals, on two batches each.
    assert number == (2 + 1 + 2 + 2) * 2
    journal, first = AttackJournal(), 0
    for stopped_after in (1, 4, 6):
        stopping = Stopping(journal, stopped_after)
        with pytest.raises(Stopped):
            audited(stopping)
        assert stopping.made_itself == list(range(first, first + stopped_after))
        first += stopped_after
    last = Stopping(journal, after=10_000)
    assert same(audited(last), expected)
    assert last.made_itself == list(range(first, number))


@pytest.mark.parametrize(
    "other",
    [
        {"keep": KEEP - {0}},
        {"batches": BATCHES[:1] * 2},
        {"loss": "mse"},
        {"scope": "position"},
        {"reference": "mean"},
        {"seed": 1},
        {"restarts": 5},
        {"steps": 25},
        {"max_ablated": 2},
        {"draws": 3},
        {"random_circuits": 1},
    ],
    ids=lambda other: next(iter(other)),
)
def test_whatever_differs_is_noticed(other: dict[str, Any]) -> None:
    journal = AttackJournal()
    with pytest.raises(Stopped):
        audited(Stopping(journal, 1))
    about = journal.about
    stopping = Stopping(journal, 0)
    with pytest.raises(Stopped):
        audited(stopping, **other)
    assert journal.about != about and not journal.found


def test_another_precision_is_noticed() -> None:
    journal = AttackJournal()
    with pytest.raises(Stopped):
        audited(Stopping(journal, 1))
    with pytest.raises(Stopped), torch.autocast("cpu", torch.bfloat16):
        audited(Stopping(journal, 0))
    assert not journal.found


def test_large_sources_are_found_again_instead_of_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = audited(Attacks())
    monkeypatch.setattr(attack_journal, "MOST_ENTRIES", 2 * (MODEL.n_nodes + MODEL.n_sites))
    journal = AttackJournal()
    audited(Attacks(journal))
    assert list(journal.found) == [0, 1]
    again = Stopping(journal, after=10_000)
    assert same(audited(again), expected)
    assert again.made_itself[0] == 2
