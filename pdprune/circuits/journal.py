"""What a selection was told so far, so that one that is stopped goes on where it was.

A selection asks for the losses of circuits, and what it asks next follows from the answers: made again with the same
answers it comes to the same circuit. So they are kept in the run's checkpoint, together with what the scorer remembers,
and are given again without scoring.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor

from pdprune.adversary.objective import MaskedLoss
from pdprune.circuits.schemes import AdversarialScorer, Scorer, SmoothScorer
from pdprune.fingerprints import digest_of

SECONDS_BETWEEN_SAVES = 60.0
SAVING_AT_MOST = 0.05
"""Share of the time that saving may take."""


@dataclass
class Journal:
    """Questions and answers of one selection, in order.

    Attributes:
        about: a fingerprint of all that the answers follow from, but for the model.
        questions: fingerprints of the circuits that were asked about.
        answers: their losses.
        memory: what an adversarial scorer remembers after the last of them.
    """

    about: str
    questions: list[str] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)


def fingerprint_of(ranking: Float[Tensor, "*lead n"], losses: Sequence[MaskedLoss], *settings: Any) -> str:
    """Of what a selection follows from: the ranking, the batches, references, and settings whose `repr` says them."""
    return digest_of(settings, ranking, [(loss.batch.raw, loss.reference) for loss in losses])


class SavesNowAndThen:
    """Saves when it is asked to, but for once it has just done so, or would do little else.

    Args:
        save: what saving is.
    """

    def __init__(self, save: Callable[[], None]) -> None:
        self._save = save
        self._at = time.monotonic() + SECONDS_BETWEEN_SAVES

    def __call__(self) -> None:
        start = time.monotonic()
        if start >= self._at:
            self._save()
            end = time.monotonic()
            self._at = end + max(SECONDS_BETWEEN_SAVES, (end - start) / SAVING_AT_MOST)


@dataclass
class JournaledScorer:
    """A scorer that answers from a journal as far as that goes, and then writes into it.

    Attributes:
        scorer: answers what is not in the journal.
        journal: may hold what an earlier, stopped selection was told.
        save: puts the journal where it outlives the process; called now and then.
    """

    scorer: Scorer
    journal: Journal
    save: Callable[[], None]
    _asked: int = 0
    _save_now_and_then: SavesNowAndThen = field(init=False)

    def __post_init__(self) -> None:
        self._save_now_and_then = SavesNowAndThen(self.save)
        if self.journal.memory and isinstance(self.scorer, AdversarialScorer):
            self.scorer.recall(self.journal.memory)

    def score(self, keep: Float[Tensor, "*lead n"], stop_above: float | None = None) -> float:
        question = digest_of(keep, stop_above)
        number, journal = self._asked, self.journal
        self._asked += 1
        if number < len(journal.answers) and journal.questions[number] == question:
            return journal.answers[number]
        value = self.scorer.score(keep, stop_above)
        # Sums on a GPU are not always the same, and so may be a question: what was told after it is of no use then.
        journal.questions[number:] = [question]
        journal.answers[number:] = [value]
        if isinstance(self.scorer, AdversarialScorer):
            journal.memory = self.scorer.memory()
        self._save_now_and_then()
        return value

    def promise(self, keep: Float[Tensor, "*lead n"]) -> Float[Tensor, "*lead n"]:
        return cast(SmoothScorer, self.scorer).promise(keep)
