"""A selection's journal is believed only where everything that its answers follow from is the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from circuits.networks import token_batch, token_model

from pdprune.adversary.attack import Ascent
from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import as_batch
from pdprune.circuits.journal import Journal, JournaledScorer, fingerprint_of
from pdprune.circuits.schemes import AdversarialScorer

MODEL = token_model()
RANKING = torch.linspace(0, 1, MODEL.n_nodes)


def raw(**changes: Any) -> dict[str, Any]:
    return token_batch(size=4) | changes


def about(
    *batches: dict[str, Any], ranking: torch.Tensor = RANKING, reference: Any = None, settings: Any = ("kl", Ascent())
) -> str:
    losses = [MaskedLoss(MODEL, as_batch(batch), reference=reference) for batch in batches or (raw(),)]
    return fingerprint_of(ranking, losses, *settings)


def halves(batch: dict[str, Any]) -> list[dict[str, Any]]:
    whole = as_batch(batch)
    first = torch.arange(whole.size) < 2
    return [whole.select(examples.nonzero().squeeze(1)).raw for examples in (first, ~first)]


INPUTS = raw()["inputs"]
REFERENCE = {name: torch.ones(site.d_in) for name, site in MODEL.sites.items()}


@pytest.mark.parametrize(
    "other",
    [
        lambda: about(raw(labels=raw()["labels"] + 1)),
        lambda: about(raw(counterfactual=INPUTS)),
        lambda: about(raw(choices=raw()["choices"].flip(-1))),
        lambda: about(*halves(raw())),
        lambda: about(raw(), raw()),
        lambda: about(reference=REFERENCE),
        lambda: about(ranking=RANKING.flip(0)),
        lambda: about(settings=("ce", Ascent())),
        lambda: about(settings=("kl", Ascent(restarts=5))),
    ],
    ids=["labels", "counterfactual", "choices", "sizes", "more", "reference", "ranking", "loss", "attack"],
)
def test_whatever_differs_is_noticed(other: Callable[[], str]) -> None:
    assert about() == about() != other()


def test_answers_are_given_again_and_then_gone_on_with() -> None:
    def scorer() -> AdversarialScorer:
        return AdversarialScorer([MaskedLoss(MODEL, as_batch(raw()))], ascent=Ascent(4, 0.5, 2))

    circuits = [(bound < RANKING).float() for bound in (0.2, 0.7, 0.4, 0.5)]
    whole = scorer()
    expected = [whole.score(circuit) for circuit in circuits]
    told = Journal("the same")
    for stopped_after in (2, 3, 4):
        inner = scorer()
        again = JournaledScorer(inner, told, lambda: None)
        assert [again.score(circuit) for circuit in circuits[:stopped_after]] == expected[:stopped_after]
    assert told.answers == expected
    assert JournaledScorer(scorer(), told, lambda: None).score(circuits[1]) != expected[0], "another question"
    assert len(told.answers) == 1


def test_saving_takes_little_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, saved = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def save() -> None:
        saved.append(now[0])
        now[0] += 30

    class Slow:
        def score(self, keep: torch.Tensor, stop_above: float | None = None) -> float:
            now[0] += 10
            return 0.0

    scorer = JournaledScorer(Slow(), Journal(""), save)
    for _ in range(200):
        scorer.score(RANKING)
    assert saved == [60, 690, 1320, 1950], "30 seconds of saving, and 19 times as many and more of other work"
